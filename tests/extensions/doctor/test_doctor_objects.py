"""mode=doctor counts objects, and names the images whose objects have a fault."""

import json

import numpy as np
import pytest
from command_line import call
from making import save

SIZE = (40, 56)
IDS = ("data=folder_instances", "data.classes=[ground,leaf,stem]", "data.objects.files=[masks,ids]")


def rectangle(left, top, width=6, height=6):
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def write(root, split, rows):
    """Write a COCO file; a row has the polygons of one annotation and whether it is a crowd."""
    for number in (1, 2):
        noise = np.random.default_rng(number + len(split)).integers(0, 255, (*SIZE, 3))
        save(root / split / f"{split}{number}.png", noise)
    images = [{"id": n, "file_name": f"{split}{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in (1, 2)]
    annotations = [
        {"id": number, "image_id": image, "category_id": 1, "iscrowd": crowd, "segmentation": polygons}
        for number, (image, polygons, crowd) in enumerate(rows, 1)
    ]
    path = root / f"annotations/instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "categories": [{"id": 1, "name": "leaf"}], "annotations": annotations}
    path.write_text(json.dumps(content))


def write_ids(root, masks, ids):
    """Write images of 8 pixels a side in both splits, with masks of classes and files of ids; the rows are equal."""
    for split in ("train", "val"):
        for number, (mask, row) in enumerate(zip(masks, ids, strict=True)):
            save(root / f"{split}/images/{number}.png", np.full((8, 8, 3), 40 * number + len(split)))
            save(root / f"{split}/masks/{number}.png", np.repeat([mask], 8, axis=0))
            save(root / f"{split}/ids/{number}.png", np.repeat([row], 8, axis=0))


def doctor(where, *words):
    """Return doctor.json and doctor.html."""
    call(where, "mode=doctor", "data=coco_instances", "data.root=data", "mode.workers=1", "mode.samples=0", *words)
    (path,) = where.glob("outputs/*/doctor_*/doctor.json")
    return json.loads(path.read_text()), path.with_suffix(".html").read_text()


def findings(where, *words):
    """Return the findings about objects of the training images by code."""
    found = doctor(where, *words)[0]["findings"]
    return {each["code"]: each for each in found if "objects" in each["code"] and "train" in each["message"]}


def test_doctor_counts_objects(tmp_path):
    two_parts = [rectangle(2, 2), rectangle(20, 2)]
    outside = [rectangle(-30, -30)]
    rows = [(1, two_parts, 0), (1, [rectangle(30, 20)], 0), (1, [rectangle(40, 20)], 1), (1, outside, 0)]
    write(tmp_path / "data", "train", [*rows, (2, [rectangle(5, 5)], 0)])
    write(tmp_path / "data", "val", [])
    found = findings(tmp_path, "head=eomt", "head.num_queries=1")
    text = "train: 3 objects in 2 images (median 1.5, at most 2), 1 crowd; of several parts: 1. By class: leaf 3."
    assert found["objects"]["message"] == text
    assert found["empty_objects"]["files"] == ["train1"]
    assert found["more_objects_than_queries"]["files"] == ["train1"]
    assert "head.num_queries" in found["more_objects_than_queries"]["remedy"]


def test_doctor_warns_about_more_crowds_than_objects(tmp_path):
    rows = [(1, [rectangle(9 * number, 20)], number > 0) for number in range(3)]
    write(tmp_path / "data", "train", rows)
    write(tmp_path / "data", "val", rows[:2])
    found = findings(tmp_path)["more_crowds_than_objects"]
    assert found["files"] == ["train1"] and "2 crowds and 1 object;" in found["message"]
    assert "data.reader.shapes.crowds=object" in found["remedy"]


@pytest.mark.parametrize(("words", "severity"), [((), "warning"), (("task=instance",), "error")])
def test_doctor_reports_data_without_objects(tmp_path, words, severity):
    """A training of classes needs none, and no training reads the split test."""
    write(tmp_path / "data", "train", [])
    write(tmp_path / "data", "val", [(1, [rectangle(2, 2)], 0)])
    write(tmp_path / "data", "test", [])
    found = [each for each in doctor(tmp_path, *words)[0]["findings"] if each["code"] == "no_objects"]
    assert {each["message"].split(":")[0]: each["severity"] for each in found} == {"train": severity, "test": "warning"}


@pytest.mark.parametrize(("words", "is_error"), [((), True), (("task=instance",), False)])
def test_doctor_accepts_objects_of_a_single_class(tmp_path, words, is_error):
    for split in ("train", "val"):
        write(tmp_path / "data", split, [(1, [rectangle(2, 2)], 0), (2, [rectangle(9, 9)], 0)])
    words = ("data.classes=[leaf]", "data.background=null", "data.unlabelled=ignore", *words)
    codes = {each["code"] for each in doctor(tmp_path, *words)[0]["findings"]}
    assert ("one_class" in codes) == is_error


def test_doctor_reports_objects_by_class(tmp_path):
    write_ids(tmp_path / "data", [[0, 0, 1, 1, 1, 2, 2, 2]] * 2, [[0, 0, 1, 2, 3, 4, 4, 4], [0, 0, 1, 1, 2, 3, 3, 3]])
    report, page = doctor(tmp_path, *IDS, "data.background=ground")
    for split in ("train", "val"):
        assert [row["objects"] for row in report["splits"][split]["classes"]] == [None, 5, 2]
        assert f"{split}: 7 objects" in str(report) and "By class: leaf 5, stem 2." in str(report)
    assert page.count(">objects</th>") == 2 and '<td class="number" data-value="5">5</td>' in page


def test_doctor_warns_about_things_without_objects(tmp_path):
    write_ids(tmp_path / "data", [[0, 0, 1, 1, 1, 2, 2, 2]] * 2, [[0, 0, 1, 2, 3, 0, 0, 0]] * 2)
    found = findings(tmp_path, *IDS)["things_without_objects"]
    assert found["severity"] == "warning" and "ground (32 pixels), stem (48 pixels)" in found["message"]
    assert "data.things=[leaf]" in found["remedy"]


def test_doctor_warns_about_images_whose_id_file_is_empty(tmp_path):
    masks = [[0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2, 2], [0] * 8, [1] * 8]
    ids = [[0, 0, 1, 2, 3, 4, 4, 4], [0] * 8, [0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]]
    write_ids(tmp_path / "data", masks, ids)
    found = findings(tmp_path, *IDS)["missing_objects"]
    assert found["severity"] == "warning" and found["files"] == ["1"] and "1 image of train" in found["message"]
    assert found["reasons"] == ["1: 24 pixels of leaf, 24 pixels of stem"] and "data.objects.files" in found["remedy"]


def test_doctor_accepts_images_with_crowds_alone(tmp_path):
    rows = [(1, [rectangle(2, 2)], 0), (2, [rectangle(2, 2)], 1)]
    write(tmp_path / "data", "train", rows)
    write(tmp_path / "data", "val", rows)
    assert findings(tmp_path).keys() == {"objects"}


def test_doctor_warns_about_objects_annotated_twice(tmp_path):
    rows = [(1, [rectangle(9, 20)], 0)] * 3 + [(1, [rectangle(9, 21)], 0), (1, [rectangle(20, 20)], 0)]
    for shift in (0, 1):  # of equal area, sum of positions, and first and last pixels
        parts = [(2, 2), (10 + shift, 15), (30 - shift, 25), (45, 30)]
        rows.append((1, [rectangle(*part) for part in parts], 0))
    crowds = [(2, [rectangle(9, 20)], 1)] * 2 + [(2, [rectangle(9, 20)], 0)]
    for split in ("train", "val"):
        write(tmp_path / "data", split, rows + crowds)
    found = findings(tmp_path)["repeated_objects"]
    assert found["severity"] == "warning" and found["files"] == ["train1"] and "2 objects" in found["message"]
    assert found["reasons"] == ["train1: 2 objects"]


def test_doctor_names_objects_that_cannot_be_read(tmp_path):
    write_ids(tmp_path / "data", [[1] * 8] * 2, [[1] * 2, [1] * 7])
    found = findings(tmp_path, *IDS)["objects_unreadable"]
    assert found["count"] == 2 and found["severity"] == "error" and "ids/1.png" in found["reasons"][1]
