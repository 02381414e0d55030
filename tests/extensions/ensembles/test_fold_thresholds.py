"""task.threshold=auto of runs that are scored out of fold: each fold's thresholds come from the other folds."""

import json
import shutil

import numpy as np
import pytest
from command_line import SMALL, call, succeed
from mistakes import assert_refused
from overlapping_shapes import write_overlaps
from plain_precision import search_threshold

import dinoseg
from dinoseg.core.metric import BINS
from dinoseg.extensions.thresholds.choice import choose_by_fold, choose_thresholds
from dinoseg.utils.images import read_image

TRAIN = (
    *("mode=train", *SMALL, "data.classes=[disc,square]", "task=multilabel", "loss=bce_dice", "head.lr=1e-2"),
    *("backbone.patch_size=4", "engine.precision=fp32", "data.batch_size=4", "mode.metrics_only=true"),
    *("trainer.steps=8", "trainer.val_every=8", "mode.pictures=0", "task.threshold=auto", "trainer.patience=3"),
)


def test_each_fold_is_decided_by_the_counts_of_the_others():
    draw = np.random.default_rng(0)
    for _ in range(50):
        images, folds = int(draw.integers(3, 12)), int(draw.integers(2, 4))
        own = [number % folds for number in range(images)]
        totals = draw.integers(0, 5, (images, 2, BINS))
        positives = draw.integers(0, totals + 1) * draw.integers(0, 2, (images, 2, 1))
        counts = [{"positives": hits, "totals": all_} for hits, all_ in zip(positives, totals, strict=True)]
        expected = {}
        for fold in range(folds):
            rest = [number for number in range(images) if own[number] != fold]
            expected[fold] = choose_thresholds(positives[rest].sum(axis=0), totals[rest].sum(axis=0))
        assert choose_by_fold(counts, own) == expected


@pytest.mark.heavy
def test_out_of_fold_scores_use_thresholds_of_the_other_folds(tmp_path, monkeypatch):
    where = tmp_path
    masks = write_overlaps(where / "data", train=9)
    folds = ("data.folds=3", "data.fold=0,1,2", "hydra.sweep.dir=folds", "hydra.mode=MULTIRUN")
    succeed(where, "-m", *TRAIN, *folds)
    words = ("mode=eval", "task.threshold=auto", "engine=cpu", "engine.precision=fp32", "mode.metrics_only=true")
    done = succeed(where, *words, "resume=folds", "hydra.run.dir=pooled")
    assert "by fold: see scores.json (chosen on other folds)" in done.out and "thresholds:  of fold 2: disc" in done.err
    assert "trainer.patience may have stopped" in done.err and "no thresholds were chosen" not in done.err
    scores = json.loads((where / "pooled/scores.json").read_text())
    monkeypatch.chdir(where)
    found = []  # of each fold: bins and labels of its images by class
    for fold in range(3):
        model = dinoseg.load(f"folds/{fold}/checkpoints/last.safetensors", device="cpu", precision="fp32")
        split = json.loads((where / f"folds/{fold}/split.json").read_text())
        shares = [
            model.predict(read_image(f"data/{name.split('_')[0]}/images/{name}.png")).probabilities
            for name in split["val"]
        ]
        found.append([(np.stack(shares)[:, k], np.stack([masks[name][k] for name in split["val"]])) for k in range(2)])
    hits = np.zeros((2, 3), int)  # true, predicted and reference pixels of each class
    chosen = []
    for fold in range(3):
        chosen.append([])
        for label in range(2):
            others = [found[other][label] for other in range(3) if other != fold]
            bins = np.concatenate([np.minimum(np.floor(shares * BINS), BINS - 1).ravel() for shares, _ in others])
            labels = np.concatenate([layer.ravel() for _, layer in others])
            positives = np.bincount(bins.astype(int), weights=labels, minlength=BINS).astype(int)
            totals = np.bincount(bins.astype(int), minlength=BINS)
            chosen[-1].append(search_threshold(positives.tolist(), totals.tolist(), 1))
            shares, layer = found[fold][label]
            decided = shares >= chosen[-1][-1]
            hits[label] += [(decided & (layer > 0)).sum(), decided.sum(), (layer > 0).sum()]
    values = {str(fold): each for fold, each in enumerate(chosen)}
    assert scores["thresholds"] == {"values": values, "chosen_on": "other folds", "chosen_here": False}
    dice = 2 * hits[:, 0] / (hits[:, 1] + hits[:, 2])
    assert [row["dice"] for row in scores["classes"]] == pytest.approx(dice, abs=1e-9)
    assert len({tuple(each) for each in chosen}) > 1  # else the order of the folds would not matter
    shutil.copytree(where / "data/val", where / "data/test")
    listed = "resume=[folds/2,folds/0,folds/1]"  # without `auto`: chosen anew, since the stored ones saw these images
    words = (*words[:1], *words[2:])
    succeed(where, *words, listed, "mode.ensemble.out_of_fold=true", "mode.report=false", "hydra.run.dir=listed")
    again = json.loads((where / "listed/scores.json").read_text())
    assert again["thresholds"] == scores["thresholds"] and again["miou"] == scores["miou"]
    for more in ((), ("task.threshold=auto",)):
        done = call(where, *words, *more, listed, "mode.split=test", "hydra.run.dir=test")
        assert done.status and "Set task.threshold=[...] with numbers for all" in done.err
    done = succeed(where, *words, "task.threshold=[0.4,0.5]", listed, "mode.split=test", "hydra.run.dir=test")
    assert "If they are the same images" in done.err and "3 images" in done.err
    assert_refused(lambda: dinoseg.load(["folds/0", "folds/1"]), "Export each with one task.threshold=[...]")
