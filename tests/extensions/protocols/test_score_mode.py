"""mode=score from the command line: its files, its messages, and that it needs no torch."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from PIL import Image

from dinoseg.utils.images import write_png

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from dinoseg.__main__ import main; main()"


def masks(folder, rng, wrong=0.3, count=6):
    """Write references and, wrong on a share of the pixels, predictions."""
    for number in range(count):
        truth, other = rng.integers(0, 4, (2, 20, 30)).astype(np.uint8)
        prediction = np.where(rng.random((20, 30)) < wrong, other, truth)
        truth[:2] = 255
        write_png(folder / f"reference/{number % 2}/{number}.png", truth)
        write_png(folder / f"prediction/{number % 2}/{number}.png", prediction)


@pytest.fixture
def folders(tmp_path):
    masks(tmp_path, np.random.default_rng(0))
    return tmp_path


@pytest.fixture
def run(tmp_path):
    """Return a function that scores in the test's own process, and returns what it wrote and printed."""

    def score(*words, reference="reference", prediction="prediction", status=0):
        folder = Path(f"run_{len(list(tmp_path.glob('run_*')))}")
        words = ("mode=score", f"reference={reference}", f"prediction={prediction}", *words)
        if not any(word.startswith("protocol=") for word in words):
            words = (*words[:3], "protocol.num_classes=4", *words[3:])
        done = call(tmp_path, *words, "mode.workers=1", f"hydra.run.dir={folder}")
        written = tmp_path / folder / "scores.json"
        assert (done.status, written.exists()) == (status, not status), done.err
        return None if status else json.loads(written.read_text()), done, tmp_path / folder

    return score


BETTER = "[prediction,better/prediction]"


@pytest.fixture
def better(folders):
    """Write predictions of a second model, of which fewer pixels are wrong."""
    masks(folders / "better", np.random.default_rng(0), wrong=0.1)


def expected_miou(folder):
    hits, reference, predicted = np.zeros(4), np.zeros(4), np.zeros(4)
    for number in range(6):
        truth, guess = (
            np.asarray(Image.open(folder / f"{side}/{number % 2}/{number}.png")) for side in ("reference", "prediction")
        )
        for label in range(4):
            inside = truth != 255
            hits[label] += ((truth == label) & (guess == label)).sum()
            reference[label] += (truth == label).sum()
            predicted[label] += ((guess == label) & inside).sum()
    return (hits / (reference + predicted - hits)).mean()


def test_a_folder_is_scored_without_torch(folders):
    words = ["mode=score", "protocol=semantic", "reference=reference", "prediction=prediction"]
    words += ["protocol.num_classes=4", "mode.workers=1", "hydra.run.dir=run"]
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folders, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((folders / "run/scores.json").read_text())
    assert result["scores"]["mIoU"] == pytest.approx(expected_miou(folders), abs=1e-12)
    assert {"protocol", "scores", "per_class", "per_image", "rules", "n", "ci95"} <= result.keys()
    assert result["protocol"] == "semantic" and result["n"] == 6 and len(result["per_image"]) == 6
    assert {"absent_class", "resolution", "ignore", "version"} <= result["rules"].keys()
    low, high = result["ci95"]["mIoU"]
    assert low < result["scores"]["mIoU"] < high
    assert "mIoU" in done.stdout and "95 % interval" in done.stdout and "scores.json" in done.stdout


def test_each_interval_shows_its_number_of_units(folders, run):
    result, done, _ = run()
    row = next(line for line in done.out.splitlines() if line.startswith("mIoU "))
    assert row.split()[-1] == "6" and " .. " in row and "over images" in done.out
    assert result["n"] == 6 and result["interval"] == "Student's t, jackknife over units"
    warning = "95 % intervals are over 6 images: with fewer than 10"
    assert done.err.count(warning) == 1
    masks(folders, np.random.default_rng(1), count=10)
    _, done, _ = run(prediction="[prediction,prediction]")
    assert "with fewer than" not in done.err
    row = [line for line in done.out.splitlines() if line.startswith("mIoU ")][-1]
    assert row.split()[-1] == "10" and "over shared images" in done.out


def test_typed_groups_are_the_units_of_intervals(better, run):
    result, done, _ = run("data.group='^./'", prediction=BETTER)
    gap = result["difference"]["mIoU"]
    assert (result["n"], result["unit"], gap["n"]) == (2, "group", 2)
    assert gap["value"] == pytest.approx(result["second"]["scores"]["mIoU"] - result["scores"]["mIoU"])
    assert gap["value"] > 0 and "second - first" in done.out
    assert [row["group"] for row in result["per_image"]] == ["0/"] * 3 + ["1/"] * 3
    assert "over groups" in done.out and "over shared groups" in done.out and "over 2 groups: with fewer" in done.err
    result, done, _ = run("data.group='^'", prediction=BETTER)  # one group, as the frames of one drive
    assert result["n"] == 1 and {*result["ci95"].values()} == {None} and "needs two groups" in done.out
    assert {row["ci95"] for row in result["difference"].values()} == {None}
    _, done, _ = run("data.group=drive", status=1)
    assert "data.group=drive does not match the name 0/0" in done.err


def test_typed_keys_of_data_without_effect_are_named(folders, run):
    unread = [f"data.reader.layout.{key}={key}" for key in ("images", "masks", "image_suffix", "mask_suffix")]
    unread += ["data.fold=0", "data.reader.partition.val_fraction=0.9"]
    _, done, _ = run("data.on_error=skip", "data.reader.masks.format=ids", "data.group=null", *unread)
    (line,) = [line for line in done.err.splitlines() if "No effect here" in line]
    named, read = line.split("reads only")
    assert all(word.split("=")[0] in named for word in unread) and "data.reader.masks." not in named
    assert all(key in read for key in ("data.group", "data.on_error", "data.ignore_index", "data.reader.masks"))
    _, done, _ = run("protocol.classes=[a,b,c,d]", "protocol.num_classes=null", "data.reader.masks.format=ids")
    assert "No effect here: data.reader.masks.format. " in done.err


def test_groups_of_a_named_dataset_are_the_units(tmp_path, run):
    for name, ids in (("0016E5_1", 0), ("0016E5_2", 1)):
        write_png(tmp_path / f"reference/{name}.png", np.full((8, 12), ids, np.uint8))
        write_png(tmp_path / f"prediction/{name}.png", np.eye(8, 12, dtype=np.uint8))
    words = ("protocol.num_classes=null", "data=camvid")
    result, done, _ = run(*words, prediction="[prediction,reference]")
    assert result["n"] == 1 and result["ci95"]["mIoU"] is result["difference"]["mIoU"]["ci95"] is None
    assert run(*words, "data.group=null")[0]["n"] == 2
    write_png(tmp_path / "reference/_3.png", np.zeros((8, 12), np.uint8))  # without a drive, and no group was typed
    write_png(tmp_path / "prediction/_3.png", np.zeros((8, 12), np.uint8))
    result, done, _ = run(*words)
    assert result["n"] == 3 and "data.group=^([^_]+) does not match the name _3" in done.err


def test_more_processes_give_the_same(folders, run):
    masks(folders, np.random.default_rng(1), count=20)
    one, _, _ = run()
    two, _, _ = run("mode.workers=2")
    assert two["per_image"] == one["per_image"] and two["ci95"] == one["ci95"] and one["n"] == 20


def test_every_bad_file_is_named_then_skipped_on_request(folders, run):
    write_png(folders / "prediction/0/2.png", np.zeros((3, 3), np.uint8))
    (folders / "prediction/1/3.png").write_bytes(b"no picture")
    (folders / "prediction/1/5.png").unlink()
    _, done, folder = run(status=1)
    assert "3 files of reference=reference and prediction=prediction cannot be scored" in done.err
    assert all(name in done.err for name in ("2.png", "3.png", "5.png", "data.on_error=skip"))
    problems = json.loads((folder / "problems.json").read_text())["problems"]
    assert len(problems) == 3 and all(row["reason"] for row in problems)
    result, done, folder = run("data.on_error=skip")
    assert result["n"] == 3 and len(result["problems"]) == 3
    assert f"3 files could not be scored and are left out; see `problems` in {folder}/scores.json" in done.err


def test_both_prediction_folders_are_checked_before_stopping(folders, better, run):
    (folders / "prediction/1/5.png").unlink()
    (folders / "better/prediction/0/2.png").write_bytes(b"no picture")
    _, done, folder = run(prediction=BETTER, status=1)
    assert "5.png" in done.err and "2.png" in done.err
    rows = json.loads((folder / "problems.json").read_text())["problems"]
    found = [(row["prediction"], Path(row["file"]).name) for row in rows]
    assert found == [("prediction", "5.png"), ("better/prediction", "2.png")]
    (folders / "empty").mkdir()
    _, done, folder = run(prediction="[empty,prediction]", status=1)
    assert "prediction=empty does not hold" in done.err and "5.png" in done.err
    assert len(json.loads((folder / "problems.json").read_text())["problems"]) == 1
    result, done, _ = run("data.on_error=skip", prediction=BETTER)
    assert result["difference"]["mIoU"]["n"] == 4 and result["difference"]["mIoU"]["left_out"] == 2
    assert "Left out of this difference: 2 files" in done.out


def test_disjoint_predictions_have_no_difference(folders, run):
    shutil.copytree(folders / "prediction", folders / "other")
    for side, lost in (("prediction", (0, 1, 2)), ("other", (3, 4, 5))):
        for number in lost:
            (folders / f"{side}/{number % 2}/{number}.png").unlink()
    result, done, _ = run("data.on_error=skip", "data.group='^./'", prediction="[prediction,other]")
    assert result["difference"]["mIoU"] == {"value": None, "ci95": None, "p": None, "n": 0, "left_out": 6}
    assert "No image could be scored in both folders" in done.out and "RuntimeWarning" not in done.err


def test_predictions_that_are_the_references_are_noted(folders, run):
    (folders / "link").symlink_to(folders / "reference")
    result, done, _ = run(prediction="link")
    assert result["scores"]["mIoU"] == 1 and "prediction=link is the reference itself" in result["notes"][0]
    assert "is the reference itself" in done.err + done.out


def test_predicted_ids_outside_the_classes_are_reported(folders, run):
    for path in (folders / "prediction/0/2.png", folders / "prediction/1/5.png"):
        ids = np.array(Image.open(path))
        ids[:4, :7] = 77  # on two rows that count and two that are ignored
        write_png(path, ids)
    result, done, _ = run()
    (note,) = result["notes"]
    assert "2 of 6 predictions hold ids that are not classes, in 28 pixels, such as prediction/0/2.png" in note
    assert note in done.err and result["per_image"][1]["unknown_pixels_prediction"] == 14
    assert result["scores"]["mIoU"] == pytest.approx(expected_miou(folders), abs=1e-12)


def test_root_instead_of_a_split_is_refused_with_a_suggestion(tmp_path, run):
    for split, drives in (("test", "9"), ("train", "123"), ("val", "45")):
        for drive, frame in product(drives, "abc"):
            ids = np.random.default_rng(ord(drive)).integers(0, 7, (8, 12)).astype(np.uint8)
            for folder in (f"reference/gtFine/{split}", *["prediction"] * (split == "val")):
                write_png(tmp_path / f"{folder}/{drive}/{frame}_label.png", ids)
    lite = "protocol=idd_lite"
    _, done, _ = run(lite, status=1)
    assert "Try reference=reference/gtFine/val." in done.err
    result, _, _ = run(lite, reference="reference/gtFine/val")
    assert result["scores"]["mIoU"] == 1 and result["n"] == 2
    for words in ((lite,), (lite, "data.on_error=skip")):
        _, done, _ = run(*words, reference="reference/gtFine/train", status=1)
        nothing = "holds 9 files, but prediction=prediction has no prediction for any"
        assert f"reference=reference/gtFine/train {nothing}" in done.err
        assert "Check that split and names match" in done.err and done.err.count("_label.png") == 2


def test_overlays_are_not_scored_as_predictions(tmp_path, run):
    for path in ("reference/1/a_label", "run/predictions/1/a_pred", "run/predictions/1/a_vis"):
        write_png(tmp_path / f"{path}.png", np.eye(6, dtype=np.uint8))
    for message in ("Files *_pred.png are overlays of mode=eval", "use its official/, prediction=run/official."):
        for words in (("protocol=idd_lite",), ()):
            _, done, _ = run(*words, prediction="run/predictions", status=1)
            assert message in done.err
        (tmp_path / "run/official").mkdir(exist_ok=True)


def test_many_notes_are_counted(folders, run):
    for number in range(14):
        write_png(folders / f"prediction/more{number}/0.png", np.zeros((2, 2), np.uint8))
    result, done, _ = run()
    assert len(result["notes"]) == 14 and "4 more notes in" in done.err + done.out
    assert "1 prediction in prediction/more0 has no reference" in result["notes"][0]
    assert (done.err + done.out).count("has no reference and is not scored") == 10
