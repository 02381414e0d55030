"""Files of predicted objects: COCO's results and segments, polygons of annotation tools, and their scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from mistakes import refusals
from object_models import CLASSES, draw_image, make_model, make_predictor

from dinoseg.core.objects import RunLengths
from dinoseg.data.classes.file import read_class_file
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.annotations.coco_ids import CocoIds
from dinoseg.extensions.annotations.entry import polygons
from dinoseg.extensions.annotations.rle import from_text
from dinoseg.extensions.annotations.written_files import PredictedShapes
from dinoseg.extensions.objects.scoring.coco_instances import CocoInstances
from dinoseg.extensions.objects.scoring.coco_panoptic import CocoPanoptic
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.summary import summary
from dinoseg.inference.outputs import ImagePrediction, image_writers
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png

LABELS = Labels.of(CLASSES, [[0, 0, 0], [34, 119, 255], [204, 255, 0]], 255)
NAMES = ("a", "b/c", "d")


def write(folder, outputs, *, task="panoptic", background=None, **shapes):
    """Write the objects of three images; return the folder of the outputs, and the masks of each image."""
    writers = image_writers(
        outputs, folder / "out", LABELS, background, PredictedShapes(**shapes), make_model(task).task
    )
    drawn = {name: draw_image(seed=number) for number, name in enumerate(NAMES)}
    predictor = make_predictor(task)
    for name, (image, _) in drawn.items():
        path = folder / "images" / f"{name}.png"
        write_png(path, image)
        prediction = ImagePrediction(name, path, image, *predictor.predict([image])[0])
        for writer in writers.values():
            writer.write(prediction)
    for writer in writers.values():
        writer.finish()
    return folder / "out", {name: masks for name, (_, masks) in drawn.items()}


def read_json(*parts):
    return json.loads(Path(*parts).read_text(encoding="utf-8"))


def score(protocol, reference, prediction):
    return summary(protocol, score_cases(protocol, protocol.find(reference, prediction), where="both"))["scores"]


def write_reference(folder, name, things=(1, 2)):
    """Write the ids of a reference, whose images and categories have numbers of their own."""
    images = [
        {"id": 70 + number, "file_name": f"{image}.png", "height": 60, "width": 90}
        for number, image in enumerate(NAMES)
    ]
    categories = [
        {"id": 10 * label + 5, "name": CLASSES[label], "isthing": int(label in things)} for label in (2, 1, 0)
    ]
    path = folder / name
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}), encoding="utf-8")
    return path


def test_instance_results_are_scored_with_ids_of_the_reference(tmp_path):
    ids = write_reference(tmp_path, "ids.json")
    out, drawn = write(tmp_path, ["coco"], task="instance", ids=str(ids), format="rle")
    results = read_json(out, "coco", "results.json")
    assert {entry["image_id"] for entry in results} == {70, 71, 72}
    assert {entry["category_id"] for entry in results} == {15, 25}
    assert len(results) > 9  # of any score
    counted = read_json(out, "coco", "annotations.json")
    assert len(counted["annotations"]) == 9 and {entry["category_id"] for entry in counted["annotations"]} == {15, 25}
    first = results[0]
    mask = RunLengths.of_counts(from_text(first["segmentation"]["counts"])).to_mask((60, 90))
    assert first["score"] == pytest.approx(0.99, abs=1e-4) and np.array_equal(mask, drawn["a"][0])
    # its own annotations are a valid reference, of the same numbers
    found = score(CocoInstances(), out / "coco" / "annotations.json", out / "coco" / "results.json")
    assert found["AP"] == 1.0


def test_panoptic_files_score_with_the_ids_of_the_reference(tmp_path):
    ids = write_reference(tmp_path, "ids.json")
    out, drawn = write(tmp_path, ["panoptic"], ids=str(ids))
    whole = read_json(out, "panoptic", "panoptic.json")
    assert [image["id"] for image in whole["images"]] == [70, 71, 72]
    assert {entry["name"]: entry["isthing"] for entry in whole["categories"]} == {"ground": 0, "leaf": 1, "stone": 1}
    # black means void in this format
    assert [entry["color"] for entry in whole["categories"]] == [[255] * 3, [34, 119, 255], [204, 255, 0]]
    entry = whole["annotations"][1]
    pixels = read_ids(out / "panoptic" / "panoptic" / entry["file_name"]).astype(int) @ [1, 256, 65536]
    for segment, mask in zip(entry["segments_info"], drawn["b/c"], strict=False):
        assert np.array_equal(pixels == segment["id"], mask) and segment["area"] == mask.sum()
    assert (pixels > 0).all()
    path = out / "panoptic" / "panoptic.json"
    assert score(CocoPanoptic(), path, path)["PQ"] == 1.0


def test_files_without_a_reference_number_from_one(tmp_path):
    out, _ = write(tmp_path, ["coco", "panoptic"])
    whole = read_json(out, "coco", "annotations.json")
    assert [image["id"] for image in whole["images"]] == [1, 2, 3]
    assert [category["id"] for category in whole["categories"]] == [1, 2, 3]
    assert {entry["category_id"] for entry in read_json(out, "coco", "results.json")} == {2, 3}  # no stuff
    segments = read_json(out, "panoptic", "panoptic.json")["annotations"][0]["segments_info"]
    assert [entry["id"] for entry in segments] == [
        1, 2, 3, 4,
    ]  # fmt: skip


def test_background_that_the_reference_lacks_is_void(tmp_path):
    ids = write_reference(tmp_path, "ids.json")
    content = read_json(ids)
    content["categories"] = [each for each in content["categories"] if each["name"] != "ground"]
    ids.write_text(json.dumps(content))
    out, drawn = write(tmp_path, ["panoptic"], background=0, ids=str(ids))
    pixels = read_ids(out / "panoptic" / "panoptic" / "a.png")
    assert np.array_equal(pixels.any(axis=-1), drawn["a"].any(axis=0))
    with pytest.raises(UserError, match="ground"):
        write(tmp_path / "other", ["panoptic"], ids=str(ids))


def test_polygons_of_labelme_have_the_number_of_their_object(tmp_path):
    out, drawn = write(tmp_path, ["labelme"], background=0, tolerance=0)
    assert read_class_file(out / "labelme/classes.yaml", 255)["things"] == CLASSES[1:]
    shapes = read_json(out, "labelme", "b", "c.json")["shapes"]
    assert [(shape["label"], shape["group_id"]) for shape in shapes] == [("leaf", 1), ("leaf", 2), ("stone", 3)]


def test_coco_polygons_draw_the_objects(tmp_path):
    out, drawn = write(tmp_path, ["coco"], background=0, tolerance=0)
    entries = [entry for entry in read_json(out, "coco", "annotations.json")["annotations"] if entry["image_id"] == 1]
    for entry, mask in zip(entries, drawn["a"], strict=True):
        canvas = np.zeros((60, 90), bool)
        polygons(entry["segmentation"]).paint(canvas, True)
        assert np.array_equal(canvas, mask) and entry["area"] == mask.sum() and entry["score"] > 0.8


def change_reference(change):
    """Write a reference whose content a function has changed, and return its path as text."""
    path = write_reference(Path(), "ids.json")
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


def write_without_image():
    write(Path(), ["coco"], ids=change_reference(lambda content: content["images"].pop(1)))


def start_without_class():
    """Make the writers alone: a class that lacks is refused before any image."""
    shapes = PredictedShapes(ids=change_reference(lambda content: content["categories"].pop(0)))
    image_writers(["coco"], Path(), LABELS, 0, shapes, make_model("instance").task)


def read_twins(kind, **same):
    return lambda: CocoIds.read(change_reference(lambda content: content[kind][1].update(same)), LABELS)


test_message_names_value_and_remedy = refusals(
    {
        "segments of a model of instances": (
            lambda: write(Path(), ["panoptic"], task="instance"),
            "task=panoptic",
        ),
        "no reference": (lambda: write(Path(), ["coco"], ids="missing.json"), "mode.shapes.ids=missing.json"),
        "image that the reference lacks": (write_without_image, "b/c"),
        "class that the reference lacks": (start_without_class, "stone"),
        "two images of one id": (read_twins("images", id=70), "several images"),
        "two images of one name": (read_twins("images", file_name="a.jpg"), "several images"),
        "two classes of one id": (read_twins("categories", id=25), "several categories"),
        "two classes of one name": (read_twins("categories", name="stone"), "several categories"),
    }
)


@pytest.mark.parametrize("output", ["coco", "panoptic"])
def test_two_images_with_one_id_are_refused(tmp_path, output):
    ids = write_reference(tmp_path, "ids.json")
    writer = image_writers([output], tmp_path, LABELS, 0, PredictedShapes(ids=str(ids)), make_model().task)[output]
    image, _ = draw_image()
    for name in ("left/a", "right/a"):
        result = make_predictor().predict([image])[0]
        writer.write(ImagePrediction(name, tmp_path / f"{name}.png", image, *result))
    with pytest.raises(UserError, match=r"left/a\.png and right/a\.png"):
        writer.finish()
