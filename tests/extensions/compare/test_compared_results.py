"""Results of sides as tables for papers: intervals, deviations and bold scores, equal to a plain script."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import UnitScore
from dinoseg.extensions.compare.compare_mode import result_tables
from dinoseg.extensions.compare.comparison import find_best, find_bold, side_scores
from dinoseg.extensions.compare.sides import Side
from dinoseg.report.table import CHOSEN_HERE
from dinoseg.runs.folder import RunFolder

CASES = 40


def draw_sides(rng):
    """Return sides of runs on the same images: one unit or several, seeds, equal sides, an absent class."""
    images, classes = int(rng.integers(2, 40)), int(rng.integers(2, 5))
    held = rng.integers(0, 90, (images, classes)) * (rng.random((images, classes)) < 0.7)
    held[0, 0] = 50
    if rng.random() < 0.2:
        held[:, -1] = 0
    units = [str(number) for number in rng.integers(0, rng.choice([1, 8, 99]), images)]
    shares = 0.5 + rng.choice([0, 0.1, 0.5]) * rng.random((rng.integers(2, 5), classes))
    return [
        side_of(name, [counts_of(rng, held, share) for _ in range(rng.integers(1, 4))], units)
        for name, share in zip("abcd", shares, strict=False)
    ]


def counts_of(rng, held, share):
    right = rng.binomial(held, np.clip(share + 0.05 * rng.normal(), 0, 1))
    wrong = (held - right).sum(axis=1, keepdims=True) // held.shape[1] * (held.sum(axis=0) > 0)
    return np.stack([right, held, right + wrong], axis=1)


def side_of(name, runs, units, unit="group"):
    images = len(runs[0])
    classes = runs[0].shape[2]
    said = {"classes": [*"vwxyz"[:classes]], "palette": [(0, 0, 0)] * classes, "ignore_index": 255, "background": None}
    said |= {"data": "x", "root": "", "split": "val", "unit": unit, "source": "", "images": [*map(str, range(images))]}
    records = [ImageRecord(**said, units=units, counts=counts) for counts in runs]
    folders = [Path(f"{name}{number}") for number in range(len(runs))]
    return Side(name, folders, [folder.name for folder in folders], folders, records)


def plain_miou(counts):
    right, held, found = counts.sum(axis=0).astype(float)
    defined = held + found > 0
    return np.mean(right[defined] / (held + found - right)[defined]) if defined.any() else np.nan


def plain_accuracy(counts):
    right, held, _ = counts.sum(axis=(0, 2)).astype(float)
    return right / held if held else np.nan


def plain_mean(side, chosen, score=plain_miou):
    return np.mean([score(record.counts[chosen]) for record in side.records])


def plain_error(score, sides, of_run=plain_miou):
    """Return error and degrees of freedom of a score of images: over their units and the seeds of each side."""
    units = np.array(sides[0].records[0].units)
    labelled = sorted({unit for unit in units if sides[0].records[0].counts[units == unit].any()})
    seeds = [[of_run(record.counts) for record in side.records] for side in sides if len(side.records) > 1]
    parts = [(np.var(each, ddof=1) / len(each), len(each) - 1) for each in seeds]
    if len(labelled) > 1:
        left = np.array([score(units != unit) for unit in labelled])
        parts.append(((len(left) - 1) * np.var(left), len(left) - 1))
    elif len(seeds) < len(sides):
        return np.nan, np.nan
    variance = sum(part for part, _ in parts)
    return np.sqrt(variance), variance**2 / sum(part**2 / each for part, each in parts) if variance > 0 else 1


def plain_bold(sides, score):
    """Return the index of the side whose difference from each other one is significant by Holm's method, or None."""
    whole = np.ones(len(sides[0].records[0].units), dtype=bool)
    means = [plain_mean(side, whole, score) for side in sides]
    best = max(range(len(sides)), key=lambda index: (means[index], -index))
    p_values = []
    for index in {*range(len(sides))} - {best}:
        pair = [sides[best], sides[index]]
        error, freedom = plain_error(
            lambda chosen, pair=pair: plain_mean(pair[0], chosen, score) - plain_mean(pair[1], chosen, score),
            pair,
            score,
        )
        gap = means[best] - means[index]
        p_values.append(1 if np.isnan(error) else 2 * stats.t.sf(gap / error, freedom) if error else float(gap == 0))
    passed = [p_value * (len(p_values) - rank) < 0.05 for rank, p_value in enumerate(sorted(p_values))]
    return best if all(passed) else None


def test_scores_and_bold_equal_a_plain_script_on_random_sides():
    kinds = {"bold": 0, "not bold": 0, "no interval": 0, "one unit": 0, "one score": 0}
    for seed in range(CASES):
        sides = draw_sides(np.random.default_rng(seed))
        for side in sides:
            found = side_scores(side)["miou"]
            whole = np.ones(len(side.records[0].units), dtype=bool)
            value = plain_mean(side, whole)
            error, freedom = plain_error(lambda chosen, side=side: plain_mean(side, chosen), [side])
            assert found.value == pytest.approx(value)
            deviation = (
                np.std([plain_miou(record.counts) for record in side.records], ddof=1) if side.seeds > 1 else np.nan
            )
            assert found.deviation == (None if side.seeds == 1 else pytest.approx(deviation))
            if np.isnan(error):
                assert found.interval is None
                kinds["no interval"] += 1
                continue
            reach = stats.t.ppf(0.975, freedom) * error / (value * (1 - value))
            ends = [1 / (1 + np.exp(-np.log(value / (1 - value)) - sign * reach)) for sign in (-1, 1)]
            assert found.interval == pytest.approx(ends), seed
            kinds["one unit"] += len({*side.records[0].units}) == 1
        found = find_bold(find_best(sides), sides, len(sides))[0]
        bold = found.get("miou")
        assert bold == plain_bold(sides, plain_miou), seed
        assert found.get("accuracy") == plain_bold(sides, plain_accuracy), seed
        kinds["not bold" if bold is None else "bold"] += 1
        kinds["one score"] += bold != found.get("accuracy")
    assert min(kinds.values()) >= 3, kinds


def make_side(name, share, seeds=2, **changes):
    """Return a side whose runs are right in about this share of the pixels of each of 20 images."""
    shares = [share + 0.001 * number for number in range(seeds)]
    held = np.full((20, 2), 1000)
    right = [(held * each + np.arange(20)[:, None]).astype(int) for each in shares]
    counts = [np.stack([each, held, held], axis=1) for each in right]
    side = side_of(name, counts, [*map(str, range(20))], "image")
    return replace(side, records=[replace(record, **changes) for record in side.records])


def test_table_of_sides_has_bold_seeds_and_dashes():
    worse = UnitScore(0.5, [0.5] * 20, [True] * 20, "min")
    better = UnitScore(0.1, [0.1] * 20, [True] * 20, "min")
    undefined = replace(worse, value=None, left_out=[None] * 20)
    scores = ({"hole": worse, "none": undefined}, {"hole": better, "none": worse})
    sides = [make_side(name, share, scores=each) for name, share, each in zip("ab", (0.9, 0.7), scores, strict=True)]
    (table,) = result_tables(sides)
    assert table.heads == ["side", "seeds", "mIoU %", "mean Dice %", "pixel accuracy %", "hole %", "none %"]
    assert [row[:2] for row in table.rows] == [["a", "2"], ["b", "2"]]
    assert {*table.bold} == {(0, 2), (0, 3), (0, 4), (1, 5)}  # the lowest `hole`, and none beside an undefined score
    assert table.rows[0][6] == "-" and all("(2 seeds)" in cell for cell in table.rows[0][2:5])
    assert "Bold: significantly better than every other row" in table.caption and "over 20 images" in table.caption
    (equal,) = result_tables([make_side("a", 0.9, seeds=1), make_side("b", 0.9, seeds=1)])
    assert not equal.bold and "Nothing is bold" in equal.caption and equal.caption.startswith("Score, [95 %")
    assert "±" not in "".join(equal.rows[0]) and "[" in equal.rows[0][2]
    (group,) = result_tables([make_side("a", 0.9, seeds, units=["0"] * 20, unit="group") for seeds in (1, 3)])
    assert "over seeds alone, as there is one group." in group.caption and "mode=" not in group.caption
    assert ["[" in row[2] for row in group.rows] == [row[1] == "3" for row in group.rows]


def test_best_of_three_is_bold_only_if_better_than_both():
    better, near, far = make_side("a", 0.9), make_side("b", 0.902), make_side("c", 0.5)
    assert find_best([far, better, near])["miou"] == (2, 1)
    assert find_bold(find_best([far, better, near]), [far, better, near], 3)[0] == {}
    assert find_bold(find_best([far, better]), [far, better], 2)[0]["miou"] == 1
    (table,) = result_tables([far, make_side("d", 0.9, chosen_here=True)])
    assert not table.bold and "Never bold: d. " in table.caption and CHOSEN_HERE in table.caption


@pytest.mark.parametrize("key", ["head", "resume"])
def test_main_effects_of_jobs_follow_the_results(tmp_path, key):
    (tmp_path / "multirun.yaml").touch()
    sides = []
    for number, (head, rank) in enumerate((head, rank) for rank in (4, 8) for head in ("linear", "mlp")):
        side = make_side(f"{head}{rank}", 0.6 + 0.1 * (head == "mlp"))
        folders = [tmp_path / str(2 * number + seed) for seed in (0, 1)]
        for seed, folder in enumerate(folders):
            folder.mkdir()
            words = [f"{key}={head}", f"adapter.rank={rank}", f"seed={seed}", *["resume=auto"] * seed]
            RunFolder(folder).write_config({}, ["mode=train", *words])
        sides.append(replace(side, folders=folders))
    results, effects = result_tables(sides)
    assert len(results.rows) == 4
    assert [row[:4] for row in effects.rows] == [
        *([key, "linear", "4", "43.88"], [key, "mlp", "4", "55.04"]),
        *(["adapter.rank", "4", "4", "49.46"], ["adapter.rank", "8", "4", "49.46"]),
    ]
    assert effects.rows[1][4] == "+11.15" and effects.rows[3][4] == "+0.00"
    assert "seeds as replicates" in effects.caption and "5 degrees of freedom" in effects.caption
    assert "they differ from scores that pool the images of folds" in effects.caption
    assert len(result_tables([*sides[:3], replace(sides[3], folders=[Path("x"), Path("y")])])) == 1  # no job of a sweep
    (tmp_path / "7/config/overrides.txt").write_text(f"{key}=mlp\nseed=1")
    assert len(result_tables(sides)) == 1  # its rank is unknown
