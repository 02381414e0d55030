"""mode=score of what mode=predict wrote: classes by name, references read as the data set's own, no key repeated."""

import json
import shutil

import numpy as np
import pytest
from command_line import call

from dinoseg.inference.class_record import write_class_record
from dinoseg.utils.images import write_png

CLASSES = ["background", "leaf"]


@pytest.fixture
def folders(tmp_path):
    """Write predictions of ids, half of their leaf right, beside references of 0 and 255 (of 3 and 7: `other`)."""
    for number in range(2):
        truth = np.zeros((8, 12), np.uint8)
        truth[:4] = 1
        guess = truth.copy()
        guess[:2] = 0
        write_png(tmp_path / f"run/masks/{number}.png", guess)
        write_png(tmp_path / f"binary/{number}.png", truth * 255)
        write_png(tmp_path / f"other/{number}.png", np.choose(truth, (3, 7)).astype(np.uint8))
    record(tmp_path, {"format": "binary"})
    return tmp_path


def record(folder, masks, classes=CLASSES, ignore_index=255, run="run", **more):
    write_class_record(folder / f"{run}/masks", classes, [(0, 0, 0), (0, 255, 0)], ignore_index, masks, **more)


def score(where, *words, prediction="run"):
    """Return what a command that must succeed wrote to its streams and as scores."""
    done = call(where, "mode=score", f"prediction={prediction}", "mode.workers=1", "hydra.run.dir=scored", *words)
    assert done.status == 0, done.err
    found = json.loads((where / "scored/scores.json").read_text())
    shutil.rmtree(where / "scored")
    return done, found


def refuse(where, *words, prediction="run"):
    done = call(where, "mode=score", f"prediction={prediction}", "mode.workers=1", "hydra.run.dir=refused", *words)
    assert done.status == 1 and "Traceback" not in done.err and not (where / "refused/scores.json").exists()
    return done.err


@pytest.mark.parametrize("prediction", ["run", "run/masks"])
def test_run_folder_alone_gives_the_classes_for_scoring(folders, prediction):
    done, found = score(folders, "reference=binary", prediction=prediction)
    rows = {row["name"]: row["IoU"] for row in found["per_class"]}
    assert rows == {"background": pytest.approx(4 / 6), "leaf": pytest.approx(2 / 4)}
    assert "leaf" in done.out and "50.00" in done.out


def test_intervals_are_over_the_recorded_groups(folders):
    assert score(folders, "reference=binary")[1]["n"] == 2
    record(folders, {"format": "binary"}, groups={"0": "drive", "1": "drive"})
    done, found = score(folders, "reference=binary")
    assert found["n"] == 1 and found["unit"] == "group" and "needs two groups" in done.out
    assert score(folders, "reference=binary", "protocol.classes=[a,b]", "protocol.binary=true")[1]["n"] == 1
    assert score(folders, "reference=binary", "data.group=null")[1]["n"] == 2
    shutil.copytree(folders / "run", folders / "other_run")
    record(folders, {"format": "binary"}, run="other_run", groups={"1": "another"})
    done, found = score(folders, "reference=binary", prediction="[run,other_run]")
    assert found["difference"]["mIoU"]["n"] == 1 and done.err.count("group images differently") == 1


def test_frames_of_a_tracked_video_are_one_group(folders):
    (folders / "run/track.json").write_text('{"input": "films/one.mp4"}')
    (folders / "run/masks/classes.json").unlink()
    (folders / "link").symlink_to(folders / "run/masks")
    for prediction in ("run", "run/masks", "link"):
        _, found = score(folders, "reference=binary", "protocol.binary=true", prediction=prediction)
        assert found["n"] == 1 and {row["group"] for row in found["per_image"]} == {"one"}, prediction
    assert "protocol=davis2016" in refuse(folders, "reference=binary")


def test_keys_of_masks_change_how_references_are_read(folders):
    assert "is not a binary mask" in refuse(folders, "reference=other")
    ids = ("reference=other", "data.reader.masks.format=ids")
    for table, background, more in (
        ("{0:-1,1:-1,3:0,7:1}", pytest.approx(4 / 6), ()),
        ("{0:-1,1:-1,3:255,7:1}", 0, ()),  # 3 is ignored
        ("{0:-1,1:-1,3:250,7:1}", 0, ("data.ignore_index=250",)),
    ):
        _, found = score(folders, *ids, f"data.reader.masks.ids={table}", *more)
        assert [row["IoU"] for row in found["per_class"]] == [background, pytest.approx(0.5)], table


def test_protocol_reads_references_as_recorded_in_the_run(folders):
    record(folders, {"format": "ids", "reduce_zero_label": True})
    for number in range(2):
        stored = np.zeros((8, 12), np.uint8)
        stored[:4], stored[4:6] = 2, 1  # leaf, background; the rest is 0, which is ignored
        write_png(folders / f"stored/{number}.png", stored)
    for words in ((), ("protocol.reduce_zero_label=true",)):  # once in either case
        _, found = score(folders, "reference=stored", *words)
        assert [row["IoU"] for row in found["per_class"]] == [pytest.approx(2 / 4), pytest.approx(2 / 4)]
        assert found["per_class"][1]["name"] == "leaf"
    words = ("reference=stored", "protocol=ade20k", "protocol.num_classes=2")
    of_run = score(folders, *words)[1]["scores"]
    (folders / "run/masks/classes.json").unlink()  # as in a folder that no run wrote
    assert score(folders, *words, prediction="run/masks")[1]["scores"] == of_run


def test_pixels_of_the_models_ignored_id_do_not_count(folders):
    record(folders, {"format": "ids"}, ignore_index=250)
    for number in range(2):
        truth = np.full((8, 12), 250, np.uint8)
        truth[2:4], truth[7] = 1, 0
        write_png(folders / f"void/{number}.png", truth)
    assert score(folders, "reference=void")[1]["scores"]["accuracy"] == 1  # what is wrong, rows 0 and 1, is void


def test_the_command_lines_data_is_read_too(folders):
    (folders / "run/masks/classes.json").unlink()

    def score_classes(*words):
        done, found = score(folders, *words, prediction="run/masks")
        return [row["name"] for row in found["per_class"]], done.err

    assert score_classes("reference=binary", "data=binary", "data.classes=[ground,leaf]")[0] == ["ground", "leaf"]
    alone = "THE SCORE IS OF CLASS 0 ALONE"
    assert alone in score_classes("reference=binary", "data.classes=[ground,leaf]")[1]
    (folders / "set").mkdir()
    (folders / "set/classes.yaml").write_text("classes: {soil: {ids: [3]}, leaf: {ids: [7]}}")
    assert score_classes("reference=other", "data.root=set")[0] == ["soil", "leaf"]


def test_other_classes_and_overlays_are_refused_with_a_remedy(folders):
    told = "data=binary has the classes background, object, and run/masks/classes.json has background, leaf"
    assert told in refuse(folders, "reference=binary", "data=binary")
    write_png(folders / "eval/predictions/0_pred.png", np.zeros((8, 12), np.uint8))
    said = refuse(folders, "reference=binary", "protocol.num_classes=2", prediction="eval/predictions")
    assert "mode=predict resume=RUN input=IMAGES" in said


def test_size_mismatch_names_the_key_that_fixes_it(folders):
    for number in range(2):
        truth = np.zeros((4, 6), np.uint8)
        truth[:2] = 255
        write_png(folders / f"binary/{number}.png", truth)
    remedy = "data.reader.masks.on_size_mismatch=resize_mask"
    assert remedy in refuse(folders, "reference=binary")
    assert score(folders, "reference=binary", remedy)[1]["per_class"][1]["IoU"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"classes": "ab"}', '{"classes": [1], "palette": [], "ignore_index": 0, "masks": {}}']
)
def test_invalid_class_record_is_one_message(folders, content):
    (folders / "run/masks/classes.json").write_text(content)
    assert "classes.json is not a valid class record" in refuse(folders, "reference=binary")
