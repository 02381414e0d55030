import json

import numpy as np
import pytest
import torch
from making import save
from mistakes import refusals
from pycocotools import mask as official
from pycocotools.coco import COCO

from dinoseg.data.classes.file import read_class_file
from dinoseg.data.classes.labels import Labels
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.splits import Partition
from dinoseg.extensions.annotations.annotated import Shapes, annotated_dataset
from dinoseg.extensions.annotations.annotation_files import AnnotationLayout
from dinoseg.extensions.annotations.written_files import PredictedShapes
from dinoseg.inference.outputs import ImagePrediction, check_outputs, image_writers
from dinoseg.utils.images import read_ids

CLASSES = ["background", 'leaf <&> "stem"', "ähre"]
TOOLS = ("coco", "labelme")
LABELS = Labels.of(CLASSES, [[0, 0, 0], [10, 200, 30], [200, 5, 5]], 255)


def blobs(seed):
    draw = np.random.default_rng(seed)
    smooth = np.add.reduce([np.roll(draw.standard_normal((50, 70)), s, a) for s in range(4) for a in (0, 1)])
    return (smooth + 1).clip(0, 2).astype(np.uint8)


def predictions(folder, names=("a", "b/c", "d")):
    for number, name in enumerate(names):
        ids = blobs(number)
        path = folder / f"{name}.jpg"
        if not path.exists():
            save(path, np.zeros((*ids.shape, 3)))
        shares = torch.nn.functional.one_hot(torch.from_numpy(ids).long(), 3).permute(2, 0, 1) * 0.8 + 0.05
        yield ImagePrediction(name, path, np.zeros((*ids.shape, 3), np.uint8), ids, shares)


def write(tmp_path, outputs, shapes, *, finish=True, **kept):
    writers = image_writers(outputs, tmp_path / "out", LABELS, kept.pop("background", 0), shapes)
    for prediction in predictions(tmp_path / "photos", **kept):
        for writer in writers.values():
            writer.write(prediction)
    for writer in writers.values() if finish else ():
        writer.finish()
    return tmp_path / "out"


def read_back(tmp_path, tool, *, unlabelled="background"):
    images = None if tool == "labelme" else str(tmp_path / "photos")
    lists = tmp_path / "out" / tool / "all.txt"
    lists.write_text("a\nb/c\nd")
    return annotated_dataset(
        tmp_path / "out" / tool, "train", kind=tool, classes=CLASSES, layout=AnnotationLayout(images=images),
        shapes=Shapes(unlabelled=unlabelled), partition=Partition("lists", {"train": "all.txt"}),
    )  # fmt: skip


@pytest.mark.parametrize(("form", "objects"), [("rle", "component"), ("polygons", "class"), ("polygons", "component")])
def test_written_annotations_are_read_back_to_the_pixel(tmp_path, form, objects):
    out = write(tmp_path, TOOLS, PredictedShapes(form, objects, tolerance=0))
    for tool in TOOLS:
        data = read_back(tmp_path, tool)
        assert data.names == ["a", "b/c", "d"]
        for index in range(3):
            np.testing.assert_array_equal(data[index]["mask"], blobs(index), err_msg=tool)
        said = read_class_file(out / tool / "classes.yaml", 255)
        assert said["classes"] == CLASSES and said["background"] == "background" and said["format"] == "labels"
        assert [list(color) for color in said["palette"]] == [list(color) for color in LABELS.palette]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
@pytest.mark.parametrize(("form", "tolerance"), [("rle", 1), ("polygons", 0), ("polygons", 1), ("polygons", 4)])
def test_coco_api_reads_written_annotations(tmp_path, form, tolerance):
    out = write(tmp_path, ["coco"], PredictedShapes(form, tolerance=tolerance))
    theirs = COCO(str(out / "coco/annotations.json"))
    assert theirs.dataset["info"]["description"] and theirs.dataset["licenses"] == []
    for number in theirs.getImgIds():
        again = np.zeros((50, 70), np.uint8)
        for row in theirs.loadAnns(theirs.getAnnIds(number)):
            mask = theirs.annToMask(row).astype(bool)
            again[mask] = row["category_id"] - 1
            left, top, width, height = row["bbox"]
            rows, columns = np.nonzero(mask)
            assert row["area"] == official.area(theirs.annToRLE(row)) == mask.sum()
            assert [left, top, width, height] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert form == "polygons" and tolerance or (again == blobs(number - 1)).all()


def test_simpler_polygons_differ_by_little(tmp_path):
    write(tmp_path, TOOLS, PredictedShapes(tolerance=1))
    for tool in TOOLS:
        ids = blobs(2)
        again = read_back(tmp_path, tool).mask(2)
        overlaps = [((ids == k) & (again == k)).sum() / ((ids == k) | (again == k)).sum() for k in range(3)]
        assert 0.6 < min(overlaps) < 1, (tool, overlaps)  # thin blobs of a few pixels, the worst there is


def test_pieces_of_a_part_share_a_group(tmp_path):
    out = write(tmp_path, ["labelme"], PredictedShapes(objects="class"), names=("a", "b/c"))
    shapes = json.loads((out / "labelme/a.json").read_text())["shapes"]
    assert {(shape["label"], shape["group_id"]) for shape in shapes} == {(CLASSES[1], 0), (CLASSES[2], 1)}


def test_small_parts_are_left_out(tmp_path):
    write(tmp_path, ["coco"], PredictedShapes(tolerance=0, min_area=20))
    areas = [row["area"] for row in json.loads((tmp_path / "out/coco/annotations.json").read_text())["annotations"]]
    assert areas and min(areas) >= 20


def test_stopped_and_resumed_run_write_one_complete_file(tmp_path):
    shapes = PredictedShapes()
    write(tmp_path, ["coco"], shapes, finish=False, names=("a", "b/c"))
    assert not (tmp_path / "out/coco/annotations.json").exists()
    write(tmp_path, ["coco"], shapes, names=("a",))
    halves = (tmp_path / "out/coco/annotations.json").read_bytes()
    write(tmp_path / "once", ["coco"], shapes, names=("a", "b/c"))
    once = (tmp_path / "once/out/coco/annotations.json").read_bytes()
    assert halves == once
    content = json.loads(once)
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [row["id"] for row in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))


def test_palette_probabilities_and_confidence(tmp_path):
    out = write(tmp_path, ["palette", "probabilities", "confidence"], PredictedShapes())
    (tmp_path / "all.txt").write_text("a\nb/c\nd")
    data = folder_dataset(
        tmp_path, "train", classes=CLASSES, layout=FolderLayout("photos", "out/palette"),
        partition=Partition("lists", {"train": "all.txt"}),
    )  # fmt: skip
    np.testing.assert_array_equal(data.mask(1), blobs(1))
    shares = np.load(out / "probabilities/b/c.npy")
    assert shares.shape == (3, 50, 70) and shares.dtype == np.float16
    np.testing.assert_array_equal(shares.argmax(axis=0), blobs(1))
    highest = np.load(out / "confidence/a.npy")
    assert highest.shape == (50, 70) and highest.dtype == np.float16 and np.allclose(highest, 0.85, atol=1e-3)
    assert (read_ids(out / "confidence/a.png") == round(0.85 * 255)).all()


def test_without_a_background_every_class_is_written(tmp_path):
    out = write(tmp_path, TOOLS, PredictedShapes("rle"), background=None)
    for tool in TOOLS:
        np.testing.assert_array_equal(read_back(tmp_path, tool, unlabelled="ignore").mask(0), blobs(0))
    assert read_class_file(out / "labelme/classes.yaml", 255)["background"] is None


test_message_names_value_and_remedy = refusals(
    {
        "another tool": (lambda: check_outputs(["coko"], PredictedShapes()), "mode.outputs names coko: choose some of"),
        "tolerance": (lambda: PredictedShapes(tolerance=float("nan")), "give a tolerance from 0 pixels"),
    }
)
