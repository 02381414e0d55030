"""mode=score from the command line: its files, its messages, and that it needs no torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinoseg.errors import UserError
from dinoseg.images import write_png
from dinoseg.launch import launch

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
def run(compose, tmp_path):
    def call(*words, reference="reference", prediction="prediction", protocol="semantic"):
        words = [
            "mode=score",
            f"protocol={protocol}",
            f"reference={tmp_path / reference}",
            f"prediction={prediction if prediction.startswith('[') else tmp_path / prediction}",
            "num_classes=4",
            "mode.workers=1",
            *words,
        ]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        launch(compose(*words), tmp_path / "run", words)
        return json.loads((tmp_path / "run/scores.json").read_text())

    return call


def expected_miou(folder, count=6):
    hits, reference, predicted = np.zeros(4), np.zeros(4), np.zeros(4)
    from PIL import Image

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
    one = run()
    two = run("mode.workers=2")
    assert two["per_image"] == one["per_image"] and two["ci95"] == one["ci95"] and one["n"] == 20


def test_two_folders_give_their_paired_difference(folders, run, capsys):
    masks(folders / "better", np.random.default_rng(0), wrong=0.1)
    result = run(prediction=f"[{folders / 'prediction'},{folders / 'better/prediction'}]")
    row = result["difference"]["mIoU"]
    assert row["value"] == pytest.approx(result["second"]["scores"]["mIoU"] - result["scores"]["mIoU"])
    assert 0 < row["ci95"][0] < row["value"] < row["ci95"][1]
    assert "second - first" in capsys.readouterr().out


def test_every_bad_file_is_named_then_skipped_on_request(folders, run):
    write_png(folders / "prediction/0/2.png", np.zeros((3, 3), np.uint8))
    (folders / "prediction/1/3.png").write_bytes(b"no picture")
    (folders / "prediction/1/5.png").unlink()
    with pytest.raises(UserError, match="3 file") as caught:
        run()
    message = str(caught.value)
    assert all(name in message for name in ("2.png", "3.png", "5.png", "data.on_error=skip"))
    problems = json.loads((folders / "run/problems.json").read_text())["problems"]
    assert len(problems) == 3 and all(row["reason"] for row in problems)
    result = run("data.on_error=skip")
    assert result["n"] == 3 and len(result["problems"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"reference": "nowhere"}, "reference=.*nowhere is no folder"),
        ({"prediction": "nowhere"}, "prediction=.*nowhere is no folder"),
        ({"prediction": "[a,b,c]"}, "give reference=DIR and prediction=DIR, or prediction=\\[DIR,DIR\\]"),
    ],
)
def test_bad_folders(folders, run, words, message):
    with pytest.raises(UserError, match=message):
        run(**words)


def test_number_of_classes_is_asked_for(folders, run):
    with pytest.raises(UserError, match="num_classes"):
        run("num_classes=null")
