"""task.threshold=auto from a training to its files: stored with its weights, used by each mode, marked where chosen."""

import json

import numpy as np
import pytest
import torch
from command_line import SMALL, call, succeed
from overlapping_shapes import CLASSES, write_overlaps
from plain_precision import plain_average_precision, search_threshold

import dinoseg
from dinoseg.core.metric import BINS
from dinoseg.report.table import CHOSEN_HERE
from dinoseg.training.checkpoint import describe, read
from dinoseg.utils.images import read_image

pytestmark = pytest.mark.slow
TRAIN = (
    *("mode=train", *SMALL, "data.classes=[disc,square]", "task=multilabel", "task.threshold=auto", "loss=bce_dice"),
    *("backbone.patch_size=4", "engine.precision=fp32", "optim.optimizer.lr=1e-2", "head.lr=1e-2"),
    *("data.batch_size=4", "mode.metrics_only=true", "optim.schedule.kind=constant"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a short training, with the masks of its images by name, and what it logged."""
    where = tmp_path_factory.mktemp("auto")
    masks = write_overlaps(where / "data", train=8)
    out = succeed(where, *TRAIN, "trainer.steps=16", "trainer.val_every=8", "hydra.run.dir=run").out
    return where, masks, out


def read_scores(folder):
    return json.loads((folder / "scores.json").read_text())


def stored(where, name="run/checkpoints/best.safetensors"):
    return describe(where / name).get("thresholds")


def count_pixels(where, masks):
    """Return the bins and labels of all validation pixels of each class, by the loaded model."""
    model = dinoseg.load(where / "run", device="cpu", precision="fp32")
    found = [[[], []] for _ in CLASSES]
    for name, layers in masks.items():
        if name.startswith("val"):
            shares = model.predict(read_image(where / f"data/val/images/{name}.png")).probabilities
            for label, (bins, labels) in enumerate(found):
                bins += np.minimum(np.floor(shares[label] * BINS), BINS - 1).astype(int).ravel().tolist()
                labels += layers[label].astype(int).ravel().tolist()
    return found


def test_stored_thresholds_and_precision_equal_a_plain_count(run):
    where, masks, _ = run
    succeed(where, "mode=eval", "resume=run", "hydra.run.dir=plain", "mode.metrics_only=true")
    scores = read_scores(where / "plain")
    chosen, values = [], []
    for bins, labels in count_pixels(where, masks):
        positives = np.bincount(bins, weights=labels, minlength=BINS).astype(int).tolist()
        chosen.append(search_threshold(positives, np.bincount(bins, minlength=BINS).tolist(), 1))
        values.append(plain_average_precision(bins, labels))
    assert stored(where) == chosen != [0.5, 0.5]
    assert [row["average_precision"] for row in scores["classes"]] == pytest.approx(values, abs=1e-12)
    assert scores["average_precision"] == pytest.approx(np.mean(values), abs=1e-12)
    points = (where / "plain/precision_recall.csv").read_text().splitlines()
    assert points[0] == "class,threshold,recall,precision,dice" and len(points) == 1 + 2 * BINS
    page = (where / "plain/report.html").read_text()
    assert "Precision and recall" in page and CHOSEN_HERE in page


def test_scores_are_marked_where_thresholds_were_chosen(run):
    where, _, out = run
    found = read_scores(where / "run/evaluation")["thresholds"]
    assert found == {"values": stored(where), "chosen_on": "val", "chosen_here": True}
    assert CHOSEN_HERE in out and stored(where, "run/checkpoints/last.safetensors") is None
    succeed(where, "mode=eval", "resume=run", "mode.split=train", "hydra.run.dir=train", "mode.report=false")
    assert read_scores(where / "train")["thresholds"] == {**found, "chosen_here": False}
    out = succeed(where, "mode=eval", "resume=run", "task.threshold=0.5", "hydra.run.dir=fixed").out
    assert CHOSEN_HERE not in out and CHOSEN_HERE not in (where / "fixed/report.html").read_text()
    compared = succeed(where, "mode=compare", "runs=[fixed,run]", "hydra.run.dir=compared")
    assert f"run: {CHOSEN_HERE}" in compared.err + compared.out
    assert json.loads((where / "compared/compare.json").read_text())["chosen_here"] == ["run"]


def test_evaluation_chooses_for_other_weights_and_another_beta(run):
    where, _, _ = run
    words = ("mode=eval", "mode.split=train", "mode.report=false", "mode.metrics_only=true")
    chosen = {}
    for beta in (1, 3):
        folder = f"beta_{beta}"
        typed = ("task.threshold=auto", f"task.beta={beta}")
        done = succeed(where, *words, "resume=run", *typed, f"hydra.run.dir={folder}")
        found = read_scores(where / folder)["thresholds"]
        assert found["chosen_on"] == "val" and not found["chosen_here"]
        chosen[beta] = found["values"]
        assert f"task.threshold=[{','.join(map(str, chosen[beta]))}]" in done.out + done.err
    assert chosen[1] == stored(where) and all(np.less_equal(chosen[3], chosen[1])) and chosen[3] != chosen[1]
    last = "resume=run/checkpoints/last.safetensors"  # without thresholds of its own
    assert "no thresholds were chosen" not in succeed(where, *words, last, "hydra.run.dir=last").err
    assert read_scores(where / "last")["thresholds"]["chosen_on"] == "val"


def test_files_hold_numbers(run):
    where, _, _ = run
    succeed(where, "mode=predict", "resume=run", "input=data/val/images", "hydra.run.dir=predicted")
    assert json.loads((where / "predicted/predict.json").read_text())["task"]["threshold"] == stored(where)
    succeed(where, "mode=export", "resume=run", "export=safetensors", "hydra.run.dir=exported")
    assert describe(where / "exported/model.safetensors")["config"]["task"]["threshold"] == stored(where)
    image = read_image(where / "data/val/images/val_0.png")
    for place in ("exported/model.safetensors", "run"):
        found = dinoseg.load(where / place, device="cpu", precision="fp32").predict(image)
        np.testing.assert_array_equal(found.mask, found.probabilities >= np.float32(stored(where))[:, None, None])
    last = "resume=run/checkpoints/last.safetensors"
    done = succeed(where, "mode=export", last, "export=safetensors", "hydra.run.dir=unchosen")
    assert "no thresholds were chosen for these weights, so 0.5" in done.out + done.err
    assert describe(where / "unchosen/model.safetensors")["config"]["task"]["threshold"] == [0.5, 0.5]
    model = dinoseg.create_model("rgb", classes=["leaf"], task={"name": "multilabel", "threshold": "auto"})
    model.save(where / "new.safetensors")
    assert describe(where / "new.safetensors")["config"]["task"]["threshold"] == [0.5]


def test_resume_is_exact_after_thresholds_are_stored(run):
    where, _, _ = run
    words = (*TRAIN, "trainer.val_every=2", "mode.report=false")
    succeed(where, *words, "trainer.steps=4", "hydra.run.dir=whole")
    succeed(where, *words, "trainer.steps=2", "hydra.run.dir=parts")
    assert stored(where, "parts/checkpoints/best.safetensors")
    succeed(where, *words, "trainer.steps=4", "hydra.run.dir=parts", "resume=auto")
    for name in ("last", "best"):
        whole, parts = (read(where / folder / f"checkpoints/{name}.safetensors") for folder in ("whole", "parts"))
        assert whole.tensors.keys() == parts.tensors.keys()
        assert all(torch.equal(whole.tensors[key], parts.tensors[key]) for key in whole.tensors)
        assert whole.info.get("thresholds") == parts.info.get("thresholds")
        assert whole.info["progress"] == parts.info["progress"]
    again = succeed(where, *words, "trainer.steps=4", "hydra.run.dir=parts", "resume=auto")
    assert "finished" in again.out + again.err


def test_classes_without_pixels_keep_a_half(run, tmp_path):
    write_overlaps(tmp_path / "data", train=4, val=1)
    (tmp_path / "data/val/masks/square/val_0.png").unlink()
    done = succeed(tmp_path, *TRAIN, "trainer.steps=2", "hydra.run.dir=run", "metric=[average_precision]")
    assert "square, whose threshold stays 0.5" in done.out + done.err
    assert stored(tmp_path)[1] == 0.5
    scores = read_scores(tmp_path / "run/evaluation")
    assert scores["classes"][1]["average_precision"] is None
    assert scores["average_precision"] == scores["classes"][0]["average_precision"]


def test_auto_needs_its_extension(run):
    where, _, _ = run
    refused = call(where, *TRAIN, "mode.choose_thresholds=null", "hydra.run.dir=refused")
    assert refused.status == 1 and "task.threshold=auto is not part of this installation" in refused.err
