import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from failing import fail_after
from held_locks import start_behind_lock
from making import save
from mistakes import assert_refused, refusals
from PIL import Image

from dinoseg.data.label_tables.read import label_table
from dinoseg.extensions.idd.dataset import idd
from dinoseg.extensions.prepare import idd as prepare_idd
from dinoseg.extensions.prepare.idd import prepare
from dinoseg.extensions.prepare.prepare_mode import prepare as prepare_mode

# encoding to its file, the column of the official table, the background, and the number of values with it
ENCODINGS = {
    "id": ("labelids", "id", 35, 40),
    "csId": ("labelcsIds", "cs_id", 0, 31),
    "csTrainId": ("labelcsTrainIds", "cs_train_id", 255, 20),
    "level4Id": ("labellevel4Ids", "level4", 255, 31),
    "level3Id": ("labellevel3Ids", "level3", 255, 27),
    "level2Id": ("labellevel2Ids", "level2", 255, 17),
    "level1Id": ("labellevel1Ids", "level1", 255, 8),
}
NAMES = [row["name"] for row in label_table("idd")]
SIZE = (64, 48)  # width, height


def box(label, left, top, right, bottom, **more):
    """Return an object that fills the columns left..right and the rows top..bottom, both ends included."""
    return {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]], **more}


def add(part, split, name, objects, **more):
    path = part / f"gtFine/{split}/{name}_gtFine_polygons.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"imgWidth": SIZE[0], "imgHeight": SIZE[1], "objects": objects} | more
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return path


def label_map(part, split, name, encoding="level3Id"):
    path = part / f"gtFine/{split}/{name}_gtFine_{ENCODINGS[encoding][0]}.png"
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def paint_boxes(boxes, encoding):
    """Paint boxes of known labels, one after the other, by slices: the reference."""
    _, column, background, _ = ENCODINGS[encoding]
    values = {row["name"]: int(row[column]) for row in label_table("idd")}
    canvas = np.full((SIZE[1], SIZE[0]), background)
    for label, left, top, right, bottom in boxes:
        canvas[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = min(values[label], 255)
    return canvas


def test_every_label_in_every_encoding(tmp_path):
    boxes = [(name, 8 * (i % 7), 7 * (i // 7), 8 * (i % 7) + 7, 7 * (i // 7) + 6) for i, name in enumerate(NAMES)]
    add(tmp_path, "train", "0/000001", [box(*each) for each in boxes])
    counts = prepare(tmp_path, encodings=list(ENCODINGS), workers=1)
    assert counts == {"train": {"files": 1, "written": 7, "kept": 0}}
    for encoding, (*_, values) in ENCODINGS.items():
        drawn = label_map(tmp_path, "train", "0/000001", encoding)
        np.testing.assert_array_equal(drawn, paint_boxes(boxes, encoding), encoding)
        assert len(np.unique(drawn)) == values, encoding


def test_overlap_order_and_borders(tmp_path):
    rng = np.random.default_rng(3)
    boxes = []
    for _ in range(60):  # some wholly or partly outside of the picture
        left, top = (int(v) for v in rng.integers(-20, 70, 2))
        width, height = (int(v) for v in rng.integers(0, 40, 2))
        boxes.append((str(rng.choice(NAMES)), left, top, left + width, top + height))
    boxes = [each for each in boxes if each[3] >= 0 and each[4] >= 0]
    add(tmp_path, "train", "0/a", [box(*each) for each in boxes])
    add(tmp_path, "train", "0/b", [box(*each) for each in reversed(boxes)])
    prepare(tmp_path, encodings=list(ENCODINGS), workers=1)
    for encoding in ENCODINGS:
        for name, order in (("0/a", boxes), ("0/b", boxes[::-1])):
            np.testing.assert_array_equal(label_map(tmp_path, "train", name, encoding), paint_boxes(order, encoding))
    assert (label_map(tmp_path, "train", "0/a") != label_map(tmp_path, "train", "0/b")).any()


def test_slanted_polygons_of_fractions(tmp_path):
    """Near to OpenCV's filling: the two differ on the outline only."""
    rng = np.random.default_rng(5)
    for number in range(6):
        points = rng.uniform(-5, 60, (7, 2)).round(3)
        add(tmp_path, "train", f"0/{number}", [{"label": "sky", "polygon": points.tolist()}])
        prepare(tmp_path, workers=1)
        reference = np.full((SIZE[1], SIZE[0]), 255, np.uint8)
        shape = [(points * 16).round().astype(np.int32)]
        cv2.fillPoly(reference, shape, 25, shift=4)
        outline = np.zeros_like(reference)
        cv2.polylines(outline, shape, True, 1, thickness=3, shift=4)
        drawn = label_map(tmp_path, "train", f"0/{number}")
        assert not ((drawn != reference) & (outline == 0)).any()
        assert set(np.unique(drawn)) == {25, 255}


def test_deleted_and_group_polygons_are_skipped_or_renamed(tmp_path, caplog):
    objects = [
        box("cargroup", 0, 0, 9, 9), box("polegroup", 10, 0, 19, 9), box("car", 0, 0, 63, 47, deleted=1),
        box("car", 0, 0, 63, 47, deleted=True), box("road", 20, 0, 29, 9, deleted=0),
        box("sky", 30, 0, 39, 9, deleted=False, verified=1, user="x", date="y"), box("traffic cone", 0, 0, 63, 47),
        box("conegroup", 0, 0, 63, 47), box("conegroup", 0, 0, 63, 47), box("group", 0, 0, 63, 47),
        box("traffic cone", 0, 0, 63, 47, deleted=1), {"label": "wall", "polygon": [[0, 0], [60, 40]]},
        {"label": "wall", "polygon": []}, {"label": None, "polygon": None, "deleted": 1},
    ]  # fmt: skip
    first = add(tmp_path, "train", "0/a", objects)
    second = add(
        tmp_path, "val", "1/b", [box("traffic cone", 0, 0, 63, 47), {"label": "x", "polygon": [[1, 1], [2, 2]]}]
    )
    with caplog.at_level(logging.WARNING):
        counts = prepare(tmp_path, encodings=["id"], workers=1)
    assert counts["train"] == {
        "files": 1, "written": 1, "kept": 0,
        "unknown label traffic cone": 1, "unknown label conegroup": 2, "unknown label group": 1,
    }  # fmt: skip
    assert counts["val"] == {"files": 1, "written": 1, "kept": 0, "unknown label traffic cone": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "Objects with labels that IDD does not have were left out:"
        f"\n- conegroup (2): {first}\n- group (1): {first}\n- traffic cone (2): {first}, {second}"
    ]
    boxes = [("car", 0, 0, 9, 9), ("polegroup", 10, 0, 19, 9), ("road", 20, 0, 29, 9), ("sky", 30, 0, 39, 9)]
    np.testing.assert_array_equal(label_map(tmp_path, "train", "0/a", "id"), paint_boxes(boxes, "id"))
    assert (label_map(tmp_path, "val", "1/b", "id") == 35).all()


def test_both_parts_become_a_data_set(tmp_path):
    parts = {"IDD_Segmentation": ".png", "idd20kII": ".jpg"}
    boxes = [("road", 0, 20, 63, 47), ("sky", 0, 0, 63, 9)]
    for part, suffix in parts.items():
        for split, name in (("train", "7/a"), ("train", "7/b"), ("val", "8/c"), ("test", "9/d")):
            save(tmp_path / part / f"leftImg8bit/{split}/{name}_leftImg8bit{suffix}", np.zeros((SIZE[1], SIZE[0], 3)))
            if split != "test":
                add(tmp_path / part, split, name, [box(*each) for each in boxes])
    counts = prepare(tmp_path, encodings=["level3Id", "level1Id"], workers=2)
    assert counts == {
        f"{part}/{split}": {"files": count, "written": 2 * count, "kept": 0}
        for part in parts
        for split, count in (("train", 2), ("val", 1))
    }
    data = idd(tmp_path, "train", classes=[str(i) for i in range(26)])
    assert data.names == [f"{part}/7/{name}" for part in parts for name in "ab"]
    for index in range(4):
        np.testing.assert_array_equal(data[index]["mask"].numpy(), paint_boxes(boxes, "level3Id"))
    low = idd(tmp_path, "val", classes=[str(i) for i in range(7)], encoding="level1Id")
    assert np.unique(low.mask(0)).tolist() == [0, 6, 255]


def test_repeated_preparation_writes_only_missing_files(tmp_path):
    for name in "abc":
        add(tmp_path, "train", f"0/{name}", [box("road", 0, 0, 9, 9)])
    folder = tmp_path / "gtFine/train/0"
    save(folder / "a_gtFine_labellevel3Ids.png", [[9]])  # of another tool: whole, and kept
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "cut.png")
    cut = (tmp_path / "cut.png").read_bytes()[:-6]
    (folder / "b_gtFine_labellevel3Ids.png").write_bytes(cut)
    (folder / "c_gtFine_labellevel3Ids.png").write_bytes(b"")
    assert prepare(tmp_path, workers=1) == {"train": {"files": 3, "written": 2, "kept": 1}}
    assert label_map(tmp_path, "train", "0/a").tolist() == [[9]]
    assert label_map(tmp_path, "train", "0/b").shape == (48, 64)
    assert prepare(tmp_path, workers=1) == {"train": {"files": 3, "written": 0, "kept": 3}}
    both = prepare(tmp_path, encodings=["level3Id", "csId"], workers=1)
    assert both == {"train": {"files": 3, "written": 3, "kept": 3}}
    assert prepare(tmp_path, workers=1, overwrite=True)["train"]["written"] == 3
    assert label_map(tmp_path, "train", "0/a").shape == (48, 64)


def test_corrected_polygons_are_rasterised_again(tmp_path, caplog):
    paths = {name: add(tmp_path, "train", f"0/{name}", [box("road", 0, 0, 9, 9)]) for name in "abcdef"}
    encodings = ["level3Id", "id"]
    prepare(tmp_path, encodings=encodings, workers=1)
    old = time.time() - 1e6
    for name in "ab":
        add(tmp_path, "train", f"0/{name}", [box("sky", 0, 0, 9, 9)])
    os.utime(paths["b"], (old, old))  # unpacked again, with the time of the archive
    os.utime(paths["c"])  # touched alone
    paths["d"].write_bytes(paths["d"].read_bytes()[:-9])
    os.utime(paths["d"], (old, old))
    # drawn by another tool, before and after the polygons were last saved
    now = paths["e"].with_name("e_gtFine_labellevel3Ids.png").stat().st_mtime
    for name, stamp in (("e", now - 3600), ("f", now + 3600)):
        drawn = save(paths[name].with_name(f"{name}_gtFine_labellevel3Ids.png"), [[9]])
        os.utime(drawn, (stamp, stamp))
    with caplog.at_level(logging.INFO):
        damage = ("1 of 6 files ", "0/d_gtFine_polygons.json is damaged")
        assert_refused(lambda: prepare(tmp_path, encodings=encodings, workers=1), *damage)
    assert "5 label maps rasterised, 5 of them again since their polygons have changed; 5 reused." in caplog.text
    for name, label in (("a", "sky"), ("b", "sky"), ("c", "road"), ("e", "road")):
        expected = paint_boxes([(label, 0, 0, 9, 9)], "level3Id")
        np.testing.assert_array_equal(label_map(tmp_path, "train", f"0/{name}"), expected, name)
    assert label_map(tmp_path, "train", "0/f").tolist() == [[9]]
    paths["d"].unlink()
    assert prepare(tmp_path, encodings=encodings, workers=1) == {"train": {"files": 5, "written": 0, "kept": 10}}
    assert prepare(tmp_path, workers=1, overwrite=True) == {"train": {"files": 5, "written": 5, "kept": 0}}


def test_two_runs_at_once_leave_each_other_alone(tmp_path, caplog):
    for part in ("one", "two"):
        add(tmp_path / part, "train", "0/a", [box("road", 0, 0, 9, 9)])
    lock = tmp_path / "two/gtFine/.prepare.lock"  # as a run on this part alone holds it
    with start_behind_lock(lock, caplog, prepare, tmp_path, workers=1):
        assert not list(tmp_path.rglob("*.png"))
    assert len(list(tmp_path.rglob("*.png"))) == 2


def road(point):
    return {"objects": [{"label": "road", "polygon": [point, [5, 5], [9, 9]]}]}


BAD = {
    "no_width": ({"imgWidth": "absent"}, "it must be an object with imgWidth, imgHeight, objects"),
    "negative": ({"imgHeight": -48}, "it.imgHeight is -48; it must be a number from 1 to 16384"),
    "huge": ({"imgWidth": 10**12}, "it.imgWidth is 1000000000000; it must be a number"),
    "objects_word": ({"objects": "road"}, "it.objects is 'road'; it must be a list"),
    "object_word": ({"objects": ["road"]}, "it.objects[0] is 'road'; it must be an object"),
    "no_label": ({"objects": [box(3, 0, 0, 1, 1)]}, "objects[0].label is 3; it must be text"),
    "no_polygon": (
        {"objects": [box("sky", 0, 0, 1, 1), {"label": "road"}]},
        "objects[1] is {'label': 'road'}; it must be an object with label, polygon",
    ),
    "text_flag": ({"objects": [box("sky", 0, 0, 1, 1, deleted="0")]}, "objects[0]: deleted is '0'; it must be 0, 1,"),
    "bool_point": (road([True, 0]), "objects[0].polygon[0][0] is True; it must be a number"),
    "triple": (road([0, 0, 0]), "is [0, 0, 0]; it must be a list of 2"),
    "far": (road([-1e300, 0]), "is -1e+300; it must be a number from -1000000 to 1000000"),
}
RAW = {
    "cut": (b'{"imgWidth": 64, "obj', "is damaged (Unterminated string"),
    "latin": (b'{"user": "\xe9"}', "'utf-8' codec can't decode"),
}


def test_bad_files_are_named_and_others_are_prepared(tmp_path):
    for name, (change, _) in BAD.items():
        add(tmp_path, "train", f"3/{name}", **{"objects": [], **change})
    folder = tmp_path / "gtFine/train/3"
    for name, (content, _) in RAW.items():
        (folder / f"{name}_gtFine_polygons.json").write_bytes(content)
    (folder / "folder_gtFine_polygons.json").mkdir()
    add(tmp_path, "train", "3/good", [box("road", 0, 0, 9, 9)], imgWidth=64.0)
    add(tmp_path, "val", "4/good", [box("road", -1e6, -1e6, 1e6, 1e6)])
    reasons = {name: reason for name, (_, reason) in (BAD | RAW).items()} | {"folder": "is a folder"}
    count = len(reasons)
    start = f"{count} of {count + 2} files could not be rasterised, the others are ready:\n- {folder}"
    message = assert_refused(lambda: prepare(tmp_path, workers=1), start)
    assert message.startswith(start) and message.endswith("\nRun again to retry these.")
    lines = {line.split("_gtFine_polygons")[0].rsplit("/", 1)[1]: line for line in message.splitlines()[1:-1]}
    assert {name for name, reason in reasons.items() if reason not in lines[name]} == set() and len(lines) == count
    assert label_map(tmp_path, "train", "3/good")[0, 0] == 0 and (label_map(tmp_path, "val", "4/good") == 0).all()
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_failed_files_are_named_with_several_processes(tmp_path):
    for number in range(40):  # more than are under way at a time
        add(tmp_path, "train", f"3/{number:02d}", [box("road", 0, 0, 9, 9)], imgWidth=-1 if number == 30 else 64)
    said = ("1 of 40 files ", "3/30_gtFine_polygons.json is damaged (it.imgWidth is -1")
    assert_refused(lambda: prepare(tmp_path, workers=2), *said)
    assert len(list(tmp_path.rglob("*.png"))) == 39


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_stops_cleanly_and_the_next_run_resumes(tmp_path, monkeypatch, code):
    for name in "abcd":
        add(tmp_path, "train", f"0/{name}", [box("road", 0, 0, 9, 9)])
    with monkeypatch.context() as patch:
        fail_after(patch, prepare_idd, "write_png", 2, OSError(code, "No space left on device"))
        said = "disk of ", " is full: 2 of 4 files are rasterised, and no file is incomplete"
        assert_refused(lambda: prepare(tmp_path, workers=1), *said)
    assert prepare(tmp_path, workers=1) == {"train": {"files": 4, "written": 2, "kept": 2}}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    for name in "ab":
        add(tmp_path, "train", f"0/{name}", [])
    (tmp_path / "gtFine/train/0/a_gtFine_labellevel3Ids.png").mkdir()
    assert_refused(lambda: prepare(tmp_path, workers=1), "1 of 2 files ", "0/a_gtFine_polygons.json: ", "irectory")
    assert (label_map(tmp_path, "train", "0/b") == 255).all()


def test_no_torch_in_the_worker_processes():
    code = "import sys, dinoseg.extensions.prepare.idd; raise SystemExit(bool({'torch', 'hydra'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def prepare_packed():
    Path("idd-segmentation.tar.gz").touch()
    prepare(Path())


def prepare_without_polygons():
    Path("gtFine/train/0").mkdir(parents=True)
    prepare(Path())


test_message_names_value_and_remedy = refusals(
    {
        "encoding": (lambda: prepare(Path(), encodings=["level3"]), "encodings=['level3']: choose some of id, csId, "),
        "no encoding": (lambda: prepare(Path(), encodings=[]), "encodings=[]: choose"),
        "no folder": (lambda: prepare(Path("gone")), "does not hold IDD: no leftImg8bit or gtFine"),
        "archive": (prepare_packed, "Unpack idd-segmentation.tar.gz there first; for a tar file use ", "data"),
        "polygons": (prepare_without_polygons, "Nothing to prepare: no ", "polygons.json in ", "gtFine. Unpack"),
    }
)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("idd", "level3Id"), ("idd_level2", "level2Id"), ("idd_level1", "level1Id"), ("idd_cityscapes", "csTrainId"),
        ("idd_ids", "id"), ("idd_home_made", "level3Id"),
    ],
)  # fmt: skip
def test_each_data_set_prepares_its_own_encoding(name, encoding, compose):
    assert compose("mode=prepare", f"data={name}", "data.root=X").prepare.encodings == [encoding]


def test_mode_prepare_writes_label_maps_and_their_counts(tmp_path, caplog, compose):
    add(tmp_path, "val", "0/a", [box("road", 0, 0, 9, 9)])
    cfg = compose("mode=prepare", "data=idd", f"data.root='{tmp_path}'", "prepare.workers=1")
    with caplog.at_level(logging.INFO):
        prepare_mode(cfg, out_dir=tmp_path)
    assert "val: files 1, written 1, kept 0" in caplog.text
    assert f"{tmp_path} is ready. Counts of each of its folders (also in {tmp_path}/prepared.json):" in caplog.text
    assert json.loads((tmp_path / "prepared.json").read_text()) == {"val": {"files": 1, "written": 1, "kept": 0}}
    expected = paint_boxes([("road", 0, 0, 9, 9)], "level3Id")
    np.testing.assert_array_equal(label_map(tmp_path, "val", "0/a", "level3Id"), expected)
    assert len(list(tmp_path.rglob("*.png"))) == 1
