"""A multi-label model from its training to its files: overlapping classes, each with a mask of its own."""

import json

import numpy as np
import pytest
import torch
from command_line import SMALL, call, succeed
from making import save
from overlapping_shapes import CLASSES, write_coco, write_overlaps

import dinoseg
from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.metrics import BoundaryIoU, SurfaceDice
from dinoseg.training.checkpoint import read
from dinoseg.utils.images import read_ids, read_image

pytestmark = pytest.mark.slow
TASK = (
    *(*SMALL, "data.classes=[disc,square]", "task=multilabel", "loss=bce_dice"),
    *("backbone.patch_size=4", "engine.precision=fp32"),
)
RATES = ("optim.optimizer.lr=1e-2", "head.lr=1e-2", "data.batch_size=4")


@pytest.fixture(scope="module")
def multilabel_run(tmp_path_factory):
    """Return the folder of a run that has learnt two overlapping shapes, and their masks."""
    where = tmp_path_factory.mktemp("multilabel")
    masks = write_overlaps(where / "data", train=16)
    succeed(where, "mode=train", *TASK, *RATES, "trainer.steps=60", "trainer.val_every=30", "hydra.run.dir=run")
    return where, masks


def read_layers(folder, names):
    return {
        name: np.stack([read_ids(folder / label / f"{name}.png") for label in CLASSES]).astype(bool) for name in names
    }


def scores_of(folder):
    return json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def predicted(multilabel_run):
    """Return the predicted masks of the validation images, and these images' masks, by name."""
    where, masks = multilabel_run
    words = ("input=val", "mode.outputs=[probabilities]", "hydra.run.dir=val_predicted")
    succeed(where, "mode=predict", "resume=run", *words)
    val = {name: mask for name, mask in sorted(masks.items()) if name.startswith("val")}
    return read_layers(where / "val_predicted/masks", val), val


def test_training_learns_classes_that_overlap(multilabel_run):
    where, _ = multilabel_run
    scores = scores_of(where / "run/evaluation")
    assert scores["miou"] > 0.75 and scores["matrix"] is None
    assert "with task=multilabel classes may overlap" in (where / "run/evaluation/report.html").read_text()


def test_evaluation_and_its_metrics_equal_numpy(multilabel_run, predicted):
    where, _ = multilabel_run
    words = ("metric=[boundary_iou,nsd,cldice,ece]", "metric.nsd.tolerance=1")
    succeed(where, "mode=eval", "resume=run", *words, "hydra.run.dir=eval")
    scores = scores_of(where / "eval")
    ours, theirs = (np.stack([*each.values()]) for each in predicted)
    ious = (ours & theirs).sum(axis=(0, 2, 3)) / (ours | theirs).sum(axis=(0, 2, 3))
    assert [row["iou"] for row in scores["classes"]] == pytest.approx(ious.tolist())
    assert scores["miou"] == pytest.approx(np.mean(ious))
    for name, metric in (("boundary_iou", BoundaryIoU()), ("nsd", SurfaceDice(1))):
        values = []
        for layer, row in enumerate(scores["classes"]):
            pairs = zip(ours[:, layer].astype(np.uint8), theirs[:, layer].astype(np.uint8), strict=True)
            counts = [metric.count(PredictedImage(ids), LabelledImage(mask, 2)) for ids, mask in pairs]
            totals = {key: sum(count[key] for count in counts) for key in counts[0]}
            values.append(metric.per_class(totals)[name][1])
            assert row[name] == pytest.approx(values[-1])
        assert scores[name] == pytest.approx(np.mean(values))
    assert 0 < scores["ece"] < 0.5 and 0 < scores["cldice"] <= 1 and "ece" in scores["classes"][0]
    assert "nsd" in (where / "eval/report.html").read_text()


def test_saved_predictions_are_rendered_read_back_and_scored(multilabel_run, predicted):
    where, _ = multilabel_run
    predictions, val = predicted
    palette = json.loads((where / "val_predicted/masks/classes.json").read_text())["palette"]
    drawn = read_image(where / f"val_predicted/{min(val)}_segmentation/segmentation_colored.png")
    coloured = drawn[predictions[min(val)].any(axis=0)]
    assert sorted(map(list, {tuple(colour) for colour in coloured.tolist()})) == sorted(palette)
    layout = FolderLayout(images="data/{split}/images", masks="{split}_predicted/masks")
    for sample in folder_dataset(where, "val", classes=CLASSES, layout=layout, layers=True):
        np.testing.assert_array_equal(sample["mask"], predictions[sample["name"]])
        shares = np.load(where / f"val_predicted/probabilities/{sample['name']}.npy")
        assert shares.shape == (2, 32, 48) and ((shares >= 0.5) == predictions[sample["name"]]).mean() > 0.99
    words = ("mode=score", "prediction=val_predicted", "mode.workers=1")
    layers = ("protocol=multilabel", "protocol.nsd=true")
    succeed(where, *words, *layers, "reference=data/val/masks", "hydra.run.dir=scored")
    scored, scores = scores_of(where / "scored"), scores_of(where / "run/evaluation")
    for ours, theirs in (("mIoU", "miou"), ("dice", "dice"), ("accuracy", "accuracy")):
        assert scored["scores"][ours] == pytest.approx(scores[theirs])
    assert scored["n"] == len(val) and scored["ci95"]["NSD"] is not None
    succeed(where, *words, *layers, "reference=val_predicted/references", "hydra.run.dir=again")
    assert scores_of(where / "again")["scores"]["mIoU"] == pytest.approx(scores["miou"])
    score = call(where, *words, "reference=val_predicted/references")
    assert score.status == 1 and "task=multilabel. Set protocol=multilabel" in score.err
    references = read_layers(where / "val_predicted/references", val)
    assert all((references[name] == val[name]).all() for name in val)


@pytest.mark.heavy
def test_windows_flips_and_thresholds_change_the_layers(multilabel_run):
    where, _ = multilabel_run
    averaged = ("inference=windows", "inference.size=24", "inference.flips=all", "inference.scales=[1.0,1.5]")
    succeed(where, "mode=eval", "resume=run", *averaged, "hydra.run.dir=windows", "mode.metrics_only=true")
    assert scores_of(where / "windows")["miou"] > 0.75
    recalls = []
    for threshold in (0.1, 0.9):
        folder = f"at_{threshold}"
        succeed(where, "mode=eval", "resume=run", f"task.threshold=[{threshold},0.5]", f"hydra.run.dir={folder}")
        recalls.append([row["recall"] for row in scores_of(where / folder)["classes"]])
    assert recalls[0][0] > recalls[1][0] and recalls[0][1] == recalls[1][1]
    succeed(where, "mode=compare", "runs=[at_0.1,at_0.9]", "hydra.run.dir=compared")
    compared = json.loads((where / "compared/compare.json").read_text())
    first, second = (scores_of(where / f"at_{threshold}") for threshold in (0.1, 0.9))
    gap = compared["others"]["at_0.9"]["differences"]["miou"]["value"]
    assert gap == pytest.approx(second["miou"] - first["miou"])
    assert compared["scores"]["accuracy"] == pytest.approx(first["accuracy"])


@pytest.mark.parametrize(
    ("words", "file", "thresholds"),
    [
        (("export=safetensors",), "model.safetensors", [0.5, 0.5]),
        pytest.param(*(("export=onnx", "task.threshold=[0.4,0.6]"), "model.onnx", [0.4, 0.6]), marks=pytest.mark.heavy),
    ],
)
def test_exported_file_equals_the_model(multilabel_run, words, file, thresholds):
    where, _ = multilabel_run
    succeed(where, "mode=export", "resume=run", *words, "hydra.run.dir=exported")
    image = read_image(where / "data/val/images/val_0.png")
    model = dinoseg.load(where / "exported" / file)
    source = dinoseg.load(where / "run", device="cpu", precision="fp32")
    found = model.predict(image)
    assert model.palette == source.palette and (0, 0, 0) not in model.palette
    drawn = {tuple(colour) for colour in found.overlay(1.0)[found.mask.any(axis=0)].tolist()}
    assert drawn == set(model.palette)
    assert found.mask.dtype == bool and found.mask.shape == (2, 32, 48)
    np.testing.assert_allclose(found.probabilities, source.predict(image).probabilities, atol=1e-4)
    np.testing.assert_array_equal(found.mask, found.probabilities >= np.float32(thresholds)[:, None, None])
    assert found.areas == {name: layer.sum() for name, layer in zip(CLASSES, found.mask, strict=True)}
    assert found.overlay().shape == image.shape and "square" in repr(found)
    found.save(where / "saved/x.png")
    np.testing.assert_array_equal(read_ids(where / "saved/square/x.png"), found.mask[1])


@pytest.mark.heavy
def test_a_resumed_run_equals_an_uninterrupted_one(multilabel_run):
    where, _ = multilabel_run
    words = ("mode=train", *TASK, *RATES, "loss=bce", "trainer.val_every=2", "mode.metrics_only=true")
    words += ("optim.schedule.kind=constant",)
    succeed(where, *words, "trainer.steps=4", "hydra.run.dir=whole_run")
    succeed(where, *words, "trainer.steps=2", "hydra.run.dir=parts")
    succeed(where, "mode=train", "resume=parts", "trainer.steps=4", "mode.metrics_only=true")
    whole, parts = (read(where / name / "checkpoints/last.safetensors").tensors for name in ("whole_run", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.heavy
def test_a_single_class_from_coco_is_trained(tmp_path):
    write_coco(tmp_path / "data")
    words = ("data=coco", "data.unlabelled=null", "data.classes=[disc]", "+data.reader.shapes.labels={square: ignore}")
    data = ("data.reader.partition.by=fraction", "data.reader.layout.annotations=annotations/instances_train.json")
    succeed(tmp_path, "mode=train", *TASK, *words, *data, "data.reader.partition.val_fraction=0.4", "hydra.run.dir=run")
    scores = scores_of(tmp_path / "run/evaluation")
    assert [row["id"] for row in scores["classes"]] == [0] and scores["ignored_pixels"] > 0


@pytest.mark.heavy
def test_modes_agree_on_a_single_class_of_0_and_255(tmp_path):
    masks = write_overlaps(tmp_path / "data", train=2, val=2)
    for name, layers in masks.items():
        save(tmp_path / "data" / name.split("_")[0] / "masks/disc" / f"{name}.png", 255 * layers[0].astype(np.uint8))
    task = ("data.classes=[disc]", "task=multilabel")
    remedy = "data.reader.masks.format=binary"
    training = ("mode=train", *TASK, *task, "trainer.steps=1")
    refused = call(tmp_path, *training, "hydra.run.dir=refused")
    assert refused.status == 1 and f"add {remedy}" in refused.err
    succeed(tmp_path, *training, remedy, "hydra.run.dir=run")
    succeed(tmp_path, "mode=doctor", "data=folder", "data.root=data", *task, remedy, "hydra.run.dir=doctor")
    report = json.loads((tmp_path / "doctor/doctor.json").read_text())
    pixels = sum(int(masks[f"val_{number}"][0].sum()) for number in range(2))
    assert report["splits"]["val"]["classes"][0]["pixels"] == pixels
    succeed(tmp_path, "mode=predict", "resume=run", "input=data/val/images", "hydra.run.dir=predicted")
    sides = ("prediction=predicted/masks", "reference=data/val/masks", "protocol=multilabel", "mode.workers=1")
    succeed(tmp_path, "mode=score", *sides, "hydra.run.dir=scored")
    evaluated = scores_of(tmp_path / "run/evaluation")["miou"]
    assert scores_of(tmp_path / "scored")["scores"]["mIoU"] == pytest.approx(evaluated) and evaluated > 0
