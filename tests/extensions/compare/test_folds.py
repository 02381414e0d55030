"""Folds of a side, pooled: against a plain script from the definitions, and the mistakes that are refused."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from mistakes import assert_refused
from scipy import stats

from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import UnitScore
from dinoseg.extensions.compare.compare_mode import run_rows
from dinoseg.extensions.compare.comparison import against, side_scores
from dinoseg.extensions.compare.sides import (
    Recipe,
    Side,
    describe_folds,
    describe_seeds,
    describe_units,
    divide_runs,
    group_runs,
    read_recipes,
)

CASES = 200


def draw_case(rng):
    """Return classes, background, groups of images, and of each side the counts of each fold's images and seeds.

    A side is a list of folds, each a list of images and the counts (S, N, 3, K) of its S seeds.
    """
    classes, images = int(rng.integers(1, 5)), int(rng.integers(2, 15))
    names = [f"image{number:02}" for number in rng.permutation(images)]
    groups = {name: f"g{rng.integers(rng.choice([1, 2, 5, images]))}" for name in names}
    reference = rng.integers(1, 900, (images, classes)) * (rng.random((images, classes)) < rng.choice([0.3, 0.8, 1.0]))
    reference[:, rng.random(classes) < 0.15] = 0  # absent everywhere
    reference[rng.random(images) < 0.1] = 0  # without a labelled pixel
    sides = []
    skills = rng.uniform(0.2, 1.0, 3)
    shared = int(rng.integers(1, 4)) if rng.random() < 0.5 else None  # seeds of each fold
    for skill in skills[: rng.integers(2, 4)]:
        folds = np.array_split(rng.permutation(images), rng.integers(2, min(5, images) + 1))
        side = []
        for fold in folds:
            held = np.stack([reference[fold]] * (shared or int(rng.integers(1, 4))))
            right = rng.binomial(held, np.clip(rng.normal(skill, 0.1, held.shape), 0, 1))
            wrong = rng.integers(0, 60, held.shape) * (rng.random((len(held), len(fold), classes)) < 0.7)
            wrong *= held.any(axis=-1, keepdims=True)  # predictions count where there are labels
            wrong[..., rng.random(classes) < 0.5] = 0
            side.append(([names[index] for index in fold], np.stack([right, held, right + wrong], axis=2)))
        sides.append(side)
    if rng.random() < 0.1:
        sides[1] = sides[0]
    background = 0 if classes > 1 and rng.random() < 0.5 else None
    return [f"class{index}" for index in range(classes)], background, groups, sides


# the plain script


def plain_scores(counts, background):
    """Return the scores of pixels (3, K)."""
    right, reference, predicted = counts
    ious, dices = [], []
    for hit, held, found in zip(right, reference, predicted, strict=True):
        ious.append(hit / (held + found - hit) if held + found > 0 else np.nan)
        dices.append(2 * hit / (held + found) if held + found > 0 else np.nan)

    def mean(values):
        defined = [value for value in values if not np.isnan(value)]
        return sum(defined) / len(defined) if defined else np.nan

    found = {"miou": mean(ious), "dice": mean(dices)}
    found["accuracy"] = sum(right) / sum(reference) if sum(reference) > 0 else np.nan
    if background is not None:
        found["miou_no_background"] = mean([iou for index, iou in enumerate(ious) if index != background])
    return found | {f"iou/{index}": iou for index, iou in enumerate(ious)}


def side_score(side, key, background, images, without=(None, None)):
    """Return a score of some images, without one seed of one fold."""
    total = np.zeros(side[0][1].shape[2:])
    for number, (names, counts) in enumerate(side):
        kept = [index for index in range(len(counts)) if (number, index) != without]
        for place, name in enumerate(names):
            if name in images:
                total += sum(counts[seed, place] for seed in kept) / len(kept)
    return plain_scores(total, background)[key]


def jackknife(values):
    """Return variance and degrees of freedom from the values without each unit or seed."""
    count = len(values)
    mean = sum(values) / len(values)
    return (count - 1) / count * sum((value - mean) ** 2 for value in values), count - 1


def seed_parts(side, key, background, images):
    """Return variance and degrees of freedom over the seeds of each fold, if each fold has several."""
    if any(len(counts) < 2 for _, counts in side):
        return []
    return [
        jackknife([side_score(side, key, background, images, (number, seed)) for seed in range(len(counts))])
        for number, (_, counts) in enumerate(side)
    ]


def estimate(score, groups, labelled, parts):
    """Return value, error and degrees of freedom of a function of images, over groups and `parts` of each side."""
    units = sorted({groups[name] for name in labelled})
    value = score(labelled)
    of_seeds = [part for of_side in parts for part in of_side]
    if len(units) > 1:
        left = [score({name for name in labelled if groups[name] != unit}) for unit in units]
        of_seeds.append(jackknife(left))
    elif not all(parts):
        return value, np.nan, np.nan
    variance = sum(part for part, _ in of_seeds)
    freedom = variance**2 / sum(part**2 / each for part, each in of_seeds) if variance > 0 else np.nan
    return value, np.sqrt(variance), freedom


def plain_difference(first, second, key, background, groups, labelled):
    """Return value, interval and p value, all None where undefined."""
    parts = [seed_parts(side, key, background, labelled) for side in (first, second)]

    def score(images):
        return side_score(second, key, background, images) - side_score(first, key, background, images)

    value, error, freedom = estimate(score, groups, labelled, parts)
    if np.isnan(value) or np.isnan(error):
        return None if np.isnan(value) else value, None, None
    if error == 0:
        return value, [value, value], 0.0 if value else 1.0
    reach = stats.t.ppf(0.975, freedom) * error
    return value, [value - reach, value + reach], 2 * stats.t.sf(abs(value) / error, freedom)


def plain_interval(side, key, background, groups, labelled):
    """Return the interval of a score of one side, on the logit scale."""
    parts = [seed_parts(side, key, background, labelled)]
    value, error, freedom = estimate(lambda images: side_score(side, key, background, images), groups, labelled, parts)
    if np.isnan(value) or np.isnan(error):
        return None
    reach = stats.t.ppf(0.975, freedom) * error if error else 0.0
    if value in (0, 1) or not error:
        return [max(value - reach, 0), min(value + reach, 1)]
    logit = np.log(value / (1 - value))
    reach = reach / (value * (1 - value))
    return [1 / (1 + np.exp(-(logit + sign * min(reach, 500)))) for sign in (-1, 1)]


def plain_holm(p_values):
    known = sorted((p_value, name) for name, p_value in p_values.items() if p_value is not None)
    found = dict.fromkeys(p_values)
    least = 0.0
    for rank, (p_value, name) in enumerate(known):
        found[name] = least = max(least, min(1.0, (len(known) - rank) * p_value))
    return found


# the runs of a case


def record_of(classes, background, groups, names, counts):
    said = {"classes": classes, "palette": [(0, 0, 0)] * len(classes), "ignore_index": 255, "background": background}
    units = [groups[name] for name in names]
    unit = "image" if len(set(units)) == len(units) else "group"
    said |= {"data": "x", "root": "", "split": "val", "unit": unit, "source": "r/checkpoints/last.safetensors"}
    return ImageRecord(**said, images=list(names), units=units, counts=counts.astype(np.int64))


def runs_of(rng, classes, background, groups, sides):
    """Return the runs of all sides in random order, their images in random order, and the side of each run."""
    runs = []
    for number, side in enumerate(sides):
        for fold, (names, counts) in enumerate(side):
            for seed, of_seed in enumerate(counts):
                order = rng.permutation(len(names))
                record = record_of(classes, background, groups, [names[index] for index in order], of_seed[order])
                recipe = Recipe({"head": number, "data.folds": len(side), "weights": "last"}, seed, fold)
                runs.append((number, Path(f"{number}/{fold}/{seed}"), record, recipe))
    runs = [runs[index] for index in rng.permutation(len(runs))]
    numbers, folders, records, recipes = ([*each] for each in zip(*runs, strict=True))
    return numbers, Side("", folders, [str(folder) for folder in folders], folders, records, recipes)


def pool_case(seed):
    rng = np.random.default_rng(seed)
    classes, background, groups, sides = draw_case(rng)
    numbers, runs = runs_of(rng, classes, background, groups, sides)
    found = group_runs(runs.recipes)
    assert [{numbers[index] for index in side} for side in found] == [{numbers[side[0]]} for side in found]
    assert len(found) == len(sides)  # each with the runs of all its folds and seeds
    order = [numbers[side[0]] for side in found]
    return background, groups, [sides[number] for number in order], divide_runs(runs, found)


def about(value):
    return value if value is None else pytest.approx(value, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("start", range(0, CASES, 20))
def test_pooled_folds_equal_a_plain_script(start):
    for seed in range(start, start + 20):
        background, groups, drawn, sides = pool_case(seed)
        first, *others = drawn
        labelled = {name for names, counts in first for name, each in zip(names, counts[0], strict=True) if each.any()}
        compared = against(sides, pytest.fail)
        keys = [*compared[0].differences]
        assert len(keys) == 3 + (background is not None) + len(sides[0].scored[0].classes)
        raw = {}
        for number, (other, shown) in enumerate(zip(others, compared, strict=True)):
            for key in keys:
                value, interval, p_value = plain_difference(first, other, key, background, groups, labelled)
                gap = shown.differences[key]
                assert gap["value"] == about(value), (seed, key)
                assert gap["ci95"] == about(interval), (seed, key)
                raw[number, key] = p_value
            score = side_score(other, "miou", background, labelled)
            assert shown.scores["miou"] == about(None if np.isnan(score) else score)
        families = [[key] for key in keys if not key.startswith("iou/")]
        for family in [*families, [key for key in keys if key.startswith("iou/")]]:
            adjusted = plain_holm({name: p_value for name, p_value in raw.items() if name[1] in family})
            for (number, key), p_value in adjusted.items():
                assert compared[number].differences[key]["p"] == about(p_value), (seed, key)
        for key, found in side_scores(sides[0]).items():
            assert found.interval == about(plain_interval(first, key, background, groups, labelled)), (seed, key)


def test_random_cases_lack_groups_classes_and_seeds():
    cases = [draw_case(np.random.default_rng(seed)) for seed in range(CASES)]
    assert sum(len({*groups.values()}) == 1 for _, _, groups, _ in cases) > 10

    def absent(counts):
        return ~counts[..., 1, :].any(axis=(0, 1))

    folds = [[absent(counts) for _, counts in side] for *_, sides in cases for side in sides]
    assert sum(any((fold & ~np.all(side, axis=0)).any() for fold in side) for side in folds) > 50
    assert sum(np.all(side, axis=0).any() for side in folds) > 20
    seeds = [[len(counts) for _, counts in side] for *_, sides in cases for side in sides]
    assert min(sum(min(side) > 1 for side in seeds), sum(min(side) == 1 < max(side) for side in seeds)) > 20


def simple_runs(*folds, seeds=1, **changes):
    """Return a run of each fold, given by the numbers of its images, and a second side of the same folds."""
    records, recipes, folders = [], [], []
    for head, (fold, images) in [(head, each) for head in "ab" for each in enumerate(folds)]:
        for seed in range(seeds):
            counts = np.array([[[5 + image + seed + (head == "b")], [20], [25]] for image in images])
            names = [f"{image}" for image in images]
            records.append(record_of(["a"], None, {name: name for name in names}, names, counts))
            recipes.append(Recipe({"head": head, "data.folds": len(folds), "weights": "last"} | changes, seed, fold))
            folders.append(Path(f"{head}{fold}{seed}"))
    return Side("", folders, [str(folder) for folder in folders], folders, records, recipes)


def list_runs(runs):
    return runs.folders, runs.names, runs.places, runs.records, runs.recipes


def test_an_image_in_two_folds_is_named():
    runs = simple_runs((0, 1), (1, 2), (3,))
    said = "folds overlap: a00, a10", "the same 1 image (1)", "data.folds"
    assert_refused(lambda: divide_runs(runs, group_runs(runs.recipes)), *said)


def test_images_of_the_own_training_are_refused(tmp_path):
    runs = simple_runs((0, 1), (2, 3))
    places = [tmp_path / str(folder) / "evaluation" for folder in runs.folders]
    for number, place in enumerate(places):
        place.mkdir(parents=True)
        train = [["2", "3"], ["0", "1"]][number % 2]
        (place.parent / "split.json").write_text(json.dumps({"train": train, "val": []}))
    runs = Side("", runs.folders, runs.names, places, runs.records, runs.recipes)
    assert len(divide_runs(runs, group_runs(runs.recipes))) == 2
    (places[3].parent / "split.json").write_text(json.dumps({"train": ["0", "3"], "val": []}))
    said = "b10/evaluation was evaluated on 1 image of its own training (3)", "split.json"
    assert_refused(lambda: divide_runs(runs, group_runs(runs.recipes)), *said)


def test_split_of_the_training_is_found_by_its_checkpoint(tmp_path):
    """A side of one fold is checked as well: the evaluation of its run may be of another fold."""
    runs = simple_runs((0, 1))
    trained = [tmp_path / name for name in ("a", "b")]
    for folder in trained:
        folder.mkdir()
        (folder / "split.json").write_text(json.dumps({"train": ["2", "3"], "val": ["0", "1"]}))
    sources = [str(folder / "checkpoints/last.safetensors") for folder in trained]
    runs = replace(
        runs, records=[replace(each, source=source) for each, source in zip(runs.records, sources, strict=True)]
    )
    assert len(divide_runs(runs, [[0], [1]])) == 2
    (trained[1] / "split.json").write_text(json.dumps({"train": ["1", "3"], "val": []}))
    said = "b00 was evaluated on 1 image of its own training (1)", "split.json"
    assert_refused(lambda: divide_runs(runs, [[0], [1]]), *said)
    on_train = replace(runs, records=[replace(record, split="train") for record in runs.records])
    assert len(divide_runs(on_train, [[0], [1]])) == 2


def test_a_lacking_fold_and_another_recipe_are_named(caplog):
    runs = simple_runs((0, 1), (2, 3), (4, 5))
    runs.recipes[-1].keys["trainer.steps"] = 20
    found = group_runs(runs.recipes)
    assert found == [[0, 1, 2], [3, 4], [5]]
    said = "b00+b10 (2 folds) were not evaluated on the same images", "2 images only in the first (data=x, x): 4, 5"
    assert_refused(lambda: divide_runs(runs, found), *said)
    assert "b00+b10 has no run of fold 2. Runs of other folds differ in trainer.steps." in caplog.text
    divide_runs(runs, [[0, 1, 2], [3, 4, 5]])
    assert "b00, b10, b20 are one side, but differ in more than seed and fold: trainer.steps." in caplog.text


def test_advice_on_a_lacking_fold_names_runs_of_that_fold(caplog):
    runs = simple_runs((0, 1), (2, 3), (4, 5))
    chosen = [0, 1, 3, 4]  # fold 2 is lacking in both sides, so that neither has it for the other
    runs = Side("", *([each[number] for number in chosen] for each in list_runs(runs)))
    divide_runs(runs, [[0, 1], [2, 3]])
    assert caplog.text.count("has no run of fold 2.\n") == 2


def test_number_of_folds_as_text_is_ignored():
    runs = simple_runs((0, 1), (2, 3), **{"data.folds": "2"})
    assert len(divide_runs(runs, group_runs(runs.recipes))) == 2


def test_folds_are_not_ranked_among_each_other():
    runs = simple_runs((0, 1), (90, 91), (40, 41))  # the score of an image grows with its number
    sides = divide_runs(runs, group_runs(runs.recipes))
    assert [row["run"] for row in run_rows(sides)] == ["b00", "b10", "b20", "a00", "a10", "a20"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_runs_that_differ_in_their_fold_alone_are_one_side(seeds):
    recipes = [Recipe({"head": 1}, seed, fold) for seed in range(seeds) for fold in range(3)]
    assert group_runs(recipes) == [[0, 1, 2], [3, 4, 5]][:seeds]


def test_notes_state_folds_seeds_and_weights():
    runs = simple_runs((0, 1), (2, 3))
    sides = divide_runs(runs, group_runs(runs.recipes))
    assert describe_units(sides) == "over 4 images"
    assert describe_seeds(sides).startswith("one trained model per fold: ")
    note = describe_folds(sides)
    assert (
        "by the run of its fold (2, 2 folds). Weights: the last, which no score" in note
        and "share training images" in note
    )
    assert describe_folds([Side("a", [], [], [], runs.records)]) == ""
    chosen = change_record(runs, 0, chosen_here=True)
    assert "no score" not in describe_folds(divide_runs(chosen, group_runs(chosen.recipes)))
    runs = simple_runs((0, 1), (2, 3), seeds=2, weights="best")
    sides = divide_runs(runs, group_runs(runs.recipes))
    assert describe_seeds(sides).startswith("the variance over seeds is included in the intervals (2, 2 runs)")
    said = (
        "the best ones of a00+a01+a10+a11, b00+b01+b10+b11 were chosen on",
        "too high",
        "resume=RUN/checkpoints/last.safetensors",
    )
    assert all(words in describe_folds(sides) for words in said)
    runs = simple_runs((0, 1), (2, 3), **{"trainer.patience": 3})
    note = describe_folds(divide_runs(runs, group_runs(runs.recipes)))
    assert "trainer.patience may have stopped" in note and "no score" not in note


def change_record(runs, number, **changes):
    records = [replace(each, **changes) if index == number else each for index, each in enumerate(runs.records)]
    return replace(runs, records=records)


def test_folds_of_other_settings_are_refused():
    runs = change_record(simple_runs((0, 1), (2, 3)), 1, ignore_index=254)
    said = "folds a00 and a10 cannot be pooled", "ignore_index: 255 in the first; 254 in the second"
    assert_refused(lambda: divide_runs(runs, group_runs(runs.recipes)), *said)


def test_folds_of_other_units_are_pooled_as_groups(caplog):
    runs = simple_runs((0, 1), (2, 3))
    for number in (0, 2):
        runs = change_record(runs, number, unit="video")
    sides = divide_runs(runs, group_runs(runs.recipes))
    assert [side.pooled.record.unit for side in sides] == ["group", "group"]
    assert "group their images differently (data.group): a00 by video, a10 by image" in caplog.text


def test_a_group_in_several_folds_is_named(caplog):
    runs = simple_runs((0, 1), (2, 3))
    divide_runs(runs, group_runs(runs.recipes))
    assert "in several folds" not in caplog.text
    for number in range(4):
        runs = change_record(runs, number, units=["drive", f"{number % 2}"], unit="group")
    divide_runs(runs, group_runs(runs.recipes))
    assert "1 group of the side of a00 with images in several folds: drive." in caplog.text


def test_a_run_on_all_images_is_compared_with_pooled_seeds():
    """Its counts get the scale of the seeds' sums, so that the references are equal."""
    runs = simple_runs((0, 1), (2, 3), seeds=2)
    whole = simple_runs((0, 1, 2, 3))
    first = [[*each[:4], *other[:1]] for each, other in zip(list_runs(runs), list_runs(whole), strict=True)]
    first[2][4] = Path("whole")
    first[4][4] = Recipe({"head": "c", "weights": "last"}, 0)
    sides = divide_runs(Side("", *first), [[0, 1, 2, 3], [4]])
    assert sides[1].pooled is None and not np.array_equal(sides[0].scored[0].counts, sides[1].scored[0].counts)
    gap = against(sides, pytest.fail)[0].differences["accuracy"]
    assert gap["value"] == pytest.approx(-0.5 / 20)  # the seeds of an image have 5 and 6 right pixels more


def test_side_has_its_fewest_seeds_and_places_of_images():
    runs = simple_runs((0, 1), (2, 3), seeds=2)
    kept = [number for number in range(8) if number not in (1, 5)]  # one seed of fold 0
    runs = Side("", *([each[number] for number in kept] for each in list_runs(runs)))
    first = divide_runs(runs, group_runs(runs.recipes))[0]
    assert first.pooled.seeds == [1, 2] and first.seeds == 1
    assert [str(first.place_of(image)) for image in "0123"] == ["a00", "a00", "a10", "a10"]


def test_folds_of_the_test_split_are_not_pooled(tmp_path):
    """Models of all folds predict the same test images, so that they are replicates."""
    (tmp_path / "config").mkdir()
    config = {"seed": 0, "data": {"fold": 1, "folds": 3}}
    (tmp_path / "config/config.yaml").write_text(json.dumps(config))
    record = record_of(["a"], None, {"0": "0"}, ["0"], np.array([[[5], [20], [25]]]))
    found = [read_recipes([tmp_path], [replace(record, split=split)])[0] for split in ("val", "test")]
    assert [recipe.fold for recipe in found] == [1, None]
    assert [recipe.keys.get("data.fold") for recipe in found] == [None, 1]


def test_evaluation_and_end_of_training_are_one_recipe(tmp_path):
    """mode=eval composes the group `slots`, and empty tables of groups that it does not read."""
    config = {"seed": 0, "data": {"folds": 3}, "trainer": {"evaluate": "last"}, "choices": {"head": "linear"}}
    loaded = {"loss": {"counts": {}}, "slots": {"match": "auto"}, "choices": {"head": "linear", "slots": "free"}}
    others = {"slots": {"match": "auto"}, "choices": {"head": "slots", "slots": "free"}}
    changes = {"trained": {}, "evaluated": loaded, "slots": others, "hungarian": {**others, "slots": {"match": "iou"}}}
    for fold, (name, change) in enumerate(changes.items()):
        (tmp_path / name / "config").mkdir(parents=True)
        content = {**config, **change, "data": {"folds": 3, "fold": fold}}
        (tmp_path / name / "config/config.yaml").write_text(json.dumps(content))
    record = record_of(["a"], None, {"0": "0"}, ["0"], np.array([[[5], [20], [25]]]))

    def group(*names):
        return group_runs(read_recipes([tmp_path / name for name in names], [record] * len(names)))

    assert group("trained", "evaluated", "slots") == [[0, 1], [2]]
    assert group("slots", "hungarian") == [[0], [1]]


def test_weights_of_a_run_follow_checkpoint_and_config(tmp_path):
    def weights(source, evaluate, fold=0):
        folder = tmp_path / f"{source}{evaluate}{fold}"
        (folder / "config").mkdir(parents=True)
        config = {"seed": 0, "data": {"fold": fold, "folds": 3}, "trainer": {"evaluate": evaluate}}
        (folder / "config/config.yaml").write_text(json.dumps(config))
        record = record_of(["a"], None, {"0": "0"}, ["0"], np.array([[[5], [20], [25]]]))
        (recipe,) = read_recipes([folder], [ImageRecord(**{**vars(record), "source": f"checkpoints/{source}"})])
        return recipe.keys["weights"], recipe.fold

    default = "${dinoseg.evaluate:${oc.select:data.fold}}"
    assert weights("best.safetensors", "best") == ("best", 0)
    assert weights("last.safetensors", "best") == ("last", 0)
    assert weights("best.safetensors", "last") == weights("best.safetensors", default) == ("last", 0)
    assert weights("best.safetensors", default, fold=None) == ("best", None)


def test_pooling_does_not_depend_on_the_number_of_seeds():
    """Counts stay whole: a class that one group alone has is undefined without it, whatever is averaged."""
    for seeds in (1, 2, 3):
        runs = simple_runs((0, 1), (2, 3), seeds=seeds)
        sides = divide_runs(runs, group_runs(runs.recipes))
        assert sides[0].scored[0].counts.dtype == np.int64
        shares = [side.scored[0].counts.sum(axis=0) for side in sides]
        expected = [(20 * 4) * seeds] * 2
        assert [int(share[1, 0]) for share in shares] == expected
    for one, other in combinations(sides, 2):
        assert one.scored[0].images == other.scored[0].images


def test_further_metrics_are_left_out():
    score = UnitScore(0.5, [0.5, 0.5], [True, True])
    runs = simple_runs((0, 1), (2, 3))
    records = [ImageRecord(**{**vars(record), "scores": {"cldice": score}}) for record in runs.records]
    runs = Side("", runs.folders, runs.names, runs.places, records, runs.recipes)
    sides = divide_runs(runs, group_runs(runs.recipes))
    assert [*sides[0].scored[0].scores] == [] and [*sides[0].records[0].scores] == ["cldice"]
