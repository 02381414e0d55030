"""Effect of removing regions: counts of both predictions, paired intervals, and equal ids wherever a model predicts."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, call, succeed, write_data
from scipy.stats import t as student

import dinoseg
from dinoseg.extensions.regions.effect import region_effect
from dinoseg.extensions.regions.regions import Regions
from dinoseg.inference.windows import Whole
from dinoseg.report.log import read_rows
from dinoseg.training import checkpoint
from dinoseg.utils.images import read_ids, read_image, write_png

REGIONS = ("inference.min_region=25", "inference.largest_component=[bright]")
OFF = ("inference.min_region=0", "inference.largest_component=[]")


def mean_iou(masks, predictions, count, ignored):
    """Return the mean IoU of classes that occur, over all labelled pixels; None without one."""
    ious = []
    for label in range(count):
        correct = union = 0
        for mask, prediction in zip(masks, predictions, strict=True):
            known = mask != ignored
            correct += np.sum((mask == label) & (prediction == label) & known)
            union += np.sum(((mask == label) | (prediction == label)) & known)
        if union:
            ious.append(correct / union)
    return float(np.mean(ious)) if ious else None


def plain_interval(masks, pairs, units, count, ignored=255):
    """Return the difference in mIoU, and its 95 % interval by the jackknife over units with labels, in plain loops."""
    labelled = [unit for mask, unit in zip(masks, units, strict=True) if (mask != ignored).any()]
    known = list(dict.fromkeys(labelled))

    def difference(without=None):
        rows = [row for row, unit in enumerate(units) if unit != without]
        first, second = (
            mean_iou([masks[row] for row in rows], [pairs[row][side] for row in rows], count, ignored)
            for side in (0, 1)
        )
        return None if first is None else second - first

    value = difference()
    parts = [difference(unit) for unit in known]
    if len(known) < 2 or value is None or None in parts:
        return value, None
    spread = sum((part - sum(parts) / len(parts)) ** 2 for part in parts)
    reach = math.sqrt((len(parts) - 1) / len(parts) * spread) * student.ppf(0.975, len(parts) - 1)
    return value, [value - reach, value + reach]


@pytest.mark.parametrize("seed", range(60))
def test_interval_equals_a_plain_script(seed, tmp_path, capsys):
    rng = np.random.default_rng(seed)
    count, images = int(rng.choice([2, 3, 40])), int(rng.integers(1, 9))
    names = [f"{rng.integers(4)}_{number}" for number in range(images)]
    group = [None, "^[0-9]"][seed % 2]
    engine = SimpleNamespace(rank=0, world_size=1, is_main=True, gather=list)
    strategy = Regions(Whole(), 5)
    data = SimpleNamespace(classes=[f"c{k}" for k in range(count)], ignore_index=255, names=names)
    effect = region_effect(strategy, data, engine).watch(None)
    masks, pairs = [], []
    for _ in names:
        size = rng.integers(1, 9, 2)
        mask = rng.integers(0, rng.integers(1, count + 1), size).astype(np.uint8)
        mask[rng.random(size) < rng.choice([0, 0.3, 1], p=[0.4, 0.4, 0.2])] = 255
        before, after = (np.where(rng.random(size) < 0.6, mask % count, rng.integers(count, size=size)) for _ in "ab")
        masks.append(mask)
        pairs.append((before.astype(np.uint8), after.astype(np.uint8)))
        strategy.original, ids = (torch.from_numpy(part)[None] for part in pairs[-1])
        effect.add(SimpleNamespace(mask=torch.from_numpy(mask)[None], names=names[:1]), ids, None)
    result = effect.report(tmp_path, "val", group)
    units = names if group is None else [name[0] for name in names]
    value, interval = plain_interval(masks, pairs, units, count)
    found = result["differences"]["miou"]
    assert found["value"] == pytest.approx(value, abs=1e-12)
    assert found["ci95"] == (interval if interval is None else pytest.approx(interval, abs=1e-12))
    assert json.loads((tmp_path / "regions.json").read_text()) == result
    verdict = "no significant difference" if interval is None or interval[0] <= 0 <= interval[1] else "er"
    assert capsys.readouterr().out.rstrip().endswith(verdict)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder with a training that validates without small regions."""
    where = tmp_path_factory.mktemp("regions")
    write_data(where / "data", val=5)
    for number in range(5):  # ignored pixels
        path = where / f"data/val/masks/{number}.png"
        mask = read_ids(path).copy()
        mask[:3] = 255
        write_png(path, mask)
    length = ("trainer.steps=4", "trainer.val_every=1", "mode.metrics_only=true", "logger=[]", "hydra.run.dir=run")
    succeed(where, "mode=train", *SMALL, "inference=whole", *REGIONS, *length)
    return where


def evaluate(run, name, *words):
    done = succeed(run, "mode=eval", "resume=run", "engine=cpu", "engine.workers=0", *words, f"hydra.run.dir={name}")
    return done, json.loads((run / name / "scores.json").read_text())


def test_evaluation_states_the_effect_of_one_pass(run):
    done, scores = evaluate(run, "with", "metric=average_precision")
    plain, without = evaluate(run, "without", *OFF)
    found = json.loads((run / "with/regions.json").read_text())
    names = [str(number) for number in range(5)]
    masks = [read_ids(run / f"data/val/masks/{name}.png") for name in names]
    pairs = [
        [read_ids(run / f"{folder}/predictions/{name}_pred.png") for folder in ("without", "with")] for name in names
    ]
    assert any((before != after).any() for before, after in pairs)
    value, interval = plain_interval(masks, pairs, names, 2)
    assert found["differences"]["miou"]["value"] == pytest.approx(value, abs=1e-12) and value != 0
    assert found["differences"]["miou"]["ci95"] == pytest.approx(interval, abs=1e-12)
    assert scores["miou"] - without["miou"] == pytest.approx(value, abs=1e-12)
    assert "regions:      removing them changes mIoU by" in done.out and "over 5 images" in done.out
    assert "Confirm the choice on another split" in done.err
    assert "Average precision" in done.err and "edited probabilities" in done.err
    assert "edited probabilities" not in plain.err
    for folder, calibrates in (("with", False), ("run/evaluation", False), ("without", True)):
        assert ("Fitted temperature" in (run / folder / "report.html").read_text()) == calibrates
    assert "regions:" not in plain.out and not (run / "without/regions.json").exists()


def test_best_checkpoint_is_selected_by_the_evaluation_score(run):
    _, scores = evaluate(run, "again", "mode.metrics_only=true", "mode.report=false")
    progress = checkpoint.describe(run / "run/checkpoints/best.safetensors")["progress"]
    rows = [row for row in read_rows(run / "run/metrics.jsonl") if "val/miou" in row]  # not those of training
    row = next(row for row in rows if row["step"] == progress["best_step"])
    assert scores["miou"] == progress["best"] == row["val/miou"]


def test_predictions_of_all_ways_are_equal(run):
    evaluate(run, "scored")
    succeed(run, "mode=predict", "resume=run", "input=data/val/images", "engine=cpu", "hydra.run.dir=predicted")
    model = dinoseg.load(run / "run", device="cpu")
    model.save(run / "model.safetensors")
    saved = dinoseg.load(run / "model.safetensors", device="cpu")
    plain = dinoseg.load(run / "run", device="cpu", inference="whole")
    differs = False
    for number in range(5):
        image = read_image(run / f"data/val/images/{number}.png")
        ids = read_ids(run / f"scored/predictions/{number}_pred.png")
        assert np.array_equal(read_ids(run / f"predicted/masks/{number}.png"), ids)
        assert np.array_equal(model.predict(image).mask, ids) and np.array_equal(saved.predict(image).mask, ids)
        differs |= not np.array_equal(plain.predict(image).mask, ids)
    assert differs


def test_unknown_class_is_refused_before_weights_are_read(run):
    done = call(run, "mode=eval", "resume=run", "inference.largest_component=[dusk]", "hydra.run.dir=wrong")
    assert done.status == 1 and "dusk" in done.err and "dark, bright" in done.err


def test_tracking_warns_that_regions_stay(run):
    words = ("resume=run", "input=data/val/images", "engine=cpu", "hydra.run.dir=tracked")
    assert "inference.min_region" in succeed(run, "mode=track", *words).err
