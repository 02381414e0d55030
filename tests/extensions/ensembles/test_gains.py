"""How much better an ensemble is than its members, against a plain script, and which images it may be scored on."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from mistakes import assert_refused
from scipy import stats

from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.extensions.ensembles import scoring


def draw_case(rng):
    """Return classes, background, the unit of each image, and counts (M + 1, N, 3, K), the ensemble's last."""
    classes, images, members = int(rng.integers(1, 5)), int(rng.integers(1, 12)), int(rng.integers(2, 5))
    reference = rng.integers(1, 900, (images, classes)) * (rng.random((images, classes)) < rng.choice([0.3, 0.8, 1.0]))
    reference[:, rng.random(classes) < 0.15] = 0  # absent everywhere
    reference[rng.random(images) < 0.15] = 0  # without a labelled pixel
    held = np.stack([reference] * (members + 1))
    right = rng.binomial(held, rng.uniform(0.3, 1.0, (members + 1, 1, 1)))
    wrong = rng.integers(0, 60, held.shape) * (rng.random(held.shape) < 0.6) * held.any(axis=-1, keepdims=True)
    units = [f"g{rng.integers(rng.choice([1, 2, 5, 20]))}" for _ in range(images)]
    background = 0 if classes > 1 and rng.random() < 0.5 else None
    return classes, background, units, np.stack([right, held, right + wrong], axis=2)


def plain_scores(counts, background):
    """Return the scores of pixels (3, K)."""
    ious, dices = [], []
    for hit, held, found in counts.T.tolist():
        ious.append(hit / (held + found - hit) if held + found > 0 else math.nan)
        dices.append(2 * hit / (held + found) if held + found > 0 else math.nan)

    def mean(values):
        defined = [value for value in values if not math.isnan(value)]
        return sum(defined) / len(defined) if defined else math.nan

    found = {"miou": mean(ious), "dice": mean(dices)}
    found["accuracy"] = counts[0].sum() / counts[1].sum() if counts[1].sum() else math.nan
    if background is not None:
        found["miou_no_background"] = mean(ious[:background] + ious[background + 1 :])
    return found | {f"iou/{number}": iou for number, iou in enumerate(ious)}


def plain_gain(counts, units, background, key):
    """Return the difference of a score from the members' mean, and its 95 % interval by leaving out each unit."""
    labelled = [unit for unit in dict.fromkeys(units) if counts[-1, [each == unit for each in units]].any()]

    def difference(kept):
        rows = [each in kept for each in units]
        *members, ensemble = (plain_scores(each[rows].sum(axis=0), background)[key] for each in counts)
        return ensemble - sum(members) / len(members)

    value = difference(labelled)
    count = len(labelled)
    left_out = [difference([each for each in labelled if each != unit]) for unit in labelled]
    if math.isnan(value):
        return None, None
    if count < 2 or any(map(math.isnan, left_out)):
        return value, None
    middle = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((each - middle) ** 2 for each in left_out))
    reach = error * stats.t.ppf(0.975, count - 1)
    return value, [value - reach, value + reach]


def test_gains_equal_a_plain_script():
    rng = np.random.default_rng(0)
    intervals = 0
    for _ in range(200):
        classes, background, units, counts = draw_case(rng)
        names = [f"run{number}" for number in range(len(counts) - 1)]
        record = ImageRecord(
            classes=[f"class{number}" for number in range(classes)],
            palette=[(0, 0, 0)] * classes,
            ignore_index=255,
            background=background,
            data="folder",
            root="",
            split="test",
            unit="group",
            images=[str(number) for number in range(len(units))],
            units=units,
            source="",
            counts=counts[-1],
        )
        members = {name: [(row, []) for row in own] for name, own in zip(names, counts[:-1], strict=True)}
        found = scoring.measure_gain(record, members)
        for name, own in zip(names, counts[:-1], strict=True):
            for key, value in plain_scores(own.sum(axis=0), background).items():
                held = found["members"][name][key]
                assert (held is None) == math.isnan(value) and (held is None or abs(held - value) < 1e-12)
        for key, gap in found["over_mean"].items():
            value, interval = plain_gain(counts, units, background, key)
            assert gap["value"] == pytest.approx(value, abs=1e-9)
            assert (gap["ci95"] is None) == (interval is None)
            if interval is not None:
                assert gap["ci95"] == pytest.approx(interval, abs=1e-9)
                intervals += 1
    assert intervals > 300


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that writes a run with a split, and returns its checkpoint."""
    configs = {}
    monkeypatch.setattr(scoring.checkpoint, "describe", lambda path: {"config": configs[path.parent.parent]})

    def write(name, train, val, *, stem="best", evaluate=None, fold=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "split.json").write_text(json.dumps({"train": train, "val": val}))
        configs[folder] = {"trainer": {"evaluate": evaluate}, "data": {"fold": fold}}
        return folder / "checkpoints" / f"{stem}.safetensors"

    return write


def test_images_and_groups_of_a_training_are_refused(run, caplog):
    path = run("a", ["d1_0", "d1_1"], ["d2_0"], evaluate="last")
    for names, group, seen in ((["d1_1", "d3_0"], None, "d1_1"), (["d1_7", "d3_0"], r"^(d\d)", "d1_7")):
        data = SimpleNamespace(names=names)
        assert_refused(partial(scoring.check_unseen, data, group, [path]), seen, "mode.split=test", "out_of_fold")
        scoring.check_unseen(data, group, [path], split="test")
        assert f"1 image here ({seen})" in caplog.text
        caplog.clear()
    scoring.check_unseen(SimpleNamespace(names=["d2_0", "d3_0"]), r"^(d\d)", [path], split="test")
    assert not caplog.text
    scoring.check_unseen(SimpleNamespace(names=["d2_0", "d3_0"]), r"^(d\d)", [path])


@pytest.mark.parametrize(
    ("settings", "selected"),
    [
        ({}, True),
        ({"stem": "last"}, False),
        ({"evaluate": "last"}, False),
        ({"fold": 0}, False),  # folds evaluate the last weights
        ({"fold": 0, "evaluate": "best"}, True),
    ],
)
def test_images_that_chose_the_weights_are_refused(run, settings, selected):
    path = run("a", ["t"], ["v"], **settings)
    assert scoring.read_seen(path) == {"train": ["t"], **({"val": ["v"]} if selected else {})}


def test_a_run_without_its_split_is_refused(run):
    path = run("a", ["t"], ["v"])
    (path.parent.parent / "split.json").unlink()
    assert_refused(lambda: scoring.read_seen(path), "split.json", "mode.split=test")


def test_images_without_masks_were_seen_too(run, caplog):
    path = run("a", ["t"], ["v"], evaluate="last")
    (path.parent.parent / "split.json").write_text(json.dumps({"train": ["t"], "unlabelled": ["u", "unlabelled/w"]}))
    assert_refused(lambda: scoring.check_unseen(SimpleNamespace(names=["u"]), None, [path]), "1 image of this split")
    new = SimpleNamespace(names=["w"])  # of another folder, so that it may be another image
    scoring.check_unseen(new, None, [path])
    scoring.check_unseen(new, None, [path], split="test")
    assert "1 image here (w)" in caplog.text
    folds = SimpleNamespace(names=["t", "v"], skipped={}, fold_of={"t": "0", "v": "1"})
    scoring.check_folds(folds, [path])


def test_equal_names_of_different_splits_are_different_images(run, caplog):
    """As in folders train/images and val/images that both have 0.png."""
    data = SimpleNamespace(names=["0", "1"])
    scoring.check_unseen(data, None, [run("a", ["0", "1", "2"], ["0", "1"], evaluate="last")])
    chosen = run("b", ["0", "1", "2"], ["0"])
    assert_refused(lambda: scoring.check_unseen(data, None, [chosen]), "1 image of this split", "(0)")
    scoring.check_unseen(data, None, [chosen], split="test")
    assert not caplog.text
