"""mode=score from the command line: its files, its messages, and that it needs no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from PIL import Image

from dinoseg.images import write_png

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from dinoseg.__main__ import main; main()"


def masks(folder, rng, wrong=0.3, count=6, size=(20, 30)):
    """Write references and, wrong on a share of the pixels, predictions."""
    for number in range(count):
        truth = rng.integers(0, 4, size).astype(np.uint8)
        other = rng.integers(0, 4, size).astype(np.uint8)
        prediction = np.where(rng.random(size) < wrong, other, truth)
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

    def score(*words, reference="reference", prediction="prediction"):
        folder = Path(f"run_{len(list(tmp_path.glob('run_*')))}")
        words = ("mode=score", f"reference={reference}", f"prediction={prediction}", "num_classes=4", *words)
        done = call(tmp_path, *words, "mode.workers=1", f"hydra.run.dir={folder}")
        written = tmp_path / folder / "scores.json"
        return json.loads(written.read_text()) if written.exists() else None, done, tmp_path / folder

    return score


def expected_miou(folder, count=6):
    hits, reference, predicted = np.zeros(4), np.zeros(4), np.zeros(4)
    for number in range(count):
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
    words = ["mode=score", "protocol=semantic", "reference=reference", "prediction=prediction", "num_classes=4"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words, "mode.workers=1", "hydra.run.dir=run"],
        cwd=folders,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folders / "run/scores.json").read_text())
    assert result["scores"]["mIoU"] == pytest.approx(expected_miou(folders), abs=1e-12)
    assert {"protocol", "scores", "per_class", "per_image", "rules", "n", "ci95"} <= result.keys()
    assert result["protocol"] == "semantic" and result["n"] == 6 and len(result["per_image"]) == 6
    assert {"absent_class", "resolution", "ignore", "version"} <= result["rules"].keys()
    low, high = result["ci95"]["mIoU"]
    assert low < result["scores"]["mIoU"] < high
    assert "mIoU" in done.stdout and "95 % interval over 6 images" in done.stdout and "scores.json" in done.stdout


def test_more_processes_give_the_same(folders, run):
    masks(folders, np.random.default_rng(1), count=20)
    one, _, _ = run()
    two, _, _ = run("mode.workers=2")
    assert two["per_image"] == one["per_image"] and two["ci95"] == one["ci95"] and one["n"] == 20


def test_two_folders_give_their_paired_difference(folders, run):
    masks(folders / "better", np.random.default_rng(0), wrong=0.1)
    result, done, _ = run(prediction="[prediction,better/prediction]")
    row = result["difference"]["mIoU"]
    assert row["value"] == pytest.approx(result["second"]["scores"]["mIoU"] - result["scores"]["mIoU"])
    assert 0 < row["ci95"][0] < row["value"] < row["ci95"][1]
    assert "second - first" in done.out


def test_every_bad_file_is_named_then_skipped_on_request(folders, run):
    write_png(folders / "prediction/0/2.png", np.zeros((3, 3), np.uint8))
    (folders / "prediction/1/3.png").write_bytes(b"no picture")
    (folders / "prediction/1/5.png").unlink()
    nothing, done, folder = run()
    assert done.status == 1 and nothing is None and "3 file" in done.err
    assert all(name in done.err for name in ("2.png", "3.png", "5.png", "data.on_error=skip"))
    problems = json.loads((folder / "problems.json").read_text())["problems"]
    assert len(problems) == 3 and all(row["reason"] for row in problems)
    result, _, _ = run("data.on_error=skip")
    assert result["n"] == 3 and len(result["problems"]) == 3


@pytest.mark.parametrize(
    ("folders_given", "words", "message"),
    [
        ({"reference": "nowhere"}, (), "reference=nowhere is no folder"),
        ({"prediction": "nowhere"}, (), "prediction=nowhere is no folder"),
        ({"prediction": "[a,b,c]"}, (), "give reference=DIR and prediction=DIR, or prediction=[DIR,DIR]"),
        ({"prediction": "null"}, (), "prediction=None: give reference=DIR"),
        ({}, ("num_classes=null",), "num_classes"),
    ],
)
def test_what_must_be_given(folders, run, folders_given, words, message):
    nothing, done, _ = run(*words, **folders_given)
    assert done.status == 1 and nothing is None and message in done.err
