"""A run that goes on with other images says so, and keeps the list that it had."""

import json
import logging
import os
import subprocess
import sys

import pytest
from command_line import SMALL, call
from PIL import Image

from dinoseg.modes.training_run import write_split


@pytest.fixture
def write(tmp_path, caplog):
    """Write a split, and return what is warned of."""

    def run(train, val=("v",)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            write_split(tmp_path, {"train": list(train), "val": list(val)})
        assert json.loads((tmp_path / "split.json").read_text()) == {"train": list(train), "val": list(val)}
        return caplog.text

    return run


def test_split_changes_are_counted_and_each_list_is_stored(write, tmp_path):
    assert write("abc") == write("abc") == "" and not list(tmp_path.glob("split_*"))
    text = write("acde")
    assert "train: 2 added (d, e), 1 removed (b); val: the same)" in text and "split_1.json" in text
    text = write("acde", "vw")
    assert "train: the same; val: 1 added (w))" in text and "split_2.json" in text
    assert "train: the same in another order; " in write("caed", "vw")
    kept = [json.loads((tmp_path / f"split_{number}.json").read_text()) for number in (1, 2, 3)]
    assert [each["train"] for each in kept] == [list("abc"), list("acde"), list("acde")]
    assert write("caed", "vw") == "" and not (tmp_path / "split_4.json").exists()


@pytest.mark.parametrize("spoilt", ["", "[]", "{"])
def test_damaged_split_record_is_written_again(write, tmp_path, spoilt):
    (tmp_path / "split.json").write_text(spoilt)
    assert "is damaged (" in write("ab")


def test_resumed_run_records_a_removed_image(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            for kind, color in (("images", (90, 30, 9 * number)), ("masks", number % 2)):
                path = tmp_path / f"data/{split}/{kind}/{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB" if kind == "images" else "L", (48, 32), color).save(path)
    options = (*SMALL, "mode.metrics_only=true", "trainer.val_every=2")
    assert call(tmp_path, "mode=train", *options, "hydra.run.dir=run").status == 0
    for kind in ("images", "masks"):
        (tmp_path / f"data/train/{kind}/3.png").unlink()
    done = call(tmp_path, "mode=train", "resume=run", "trainer.steps=3", "engine=cpu", "engine.workers=0")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "run/split_1.json").read_text())["train"] == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "run/split.json").read_text())["train"] == ["0", "1", "2"]
    assert "train: 1 removed (3); val: the same" in (tmp_path / "run/run.log").read_text()


def test_undecodable_names_can_be_printed_and_logged(tmp_path):
    code = (
        "import logging, os, pathlib; from dinoseg.experiment.log_file import configure_log;"
        "configure_log(pathlib.Path('.'));"
        r"name = os.fsdecode(b'caf\xe9'); print(name); logging.warning(name)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "caf\\xe9\n" and "Logging error" not in done.stderr, done.stderr
    assert (tmp_path / "run.log").read_text().endswith("caf\\xe9\n")
