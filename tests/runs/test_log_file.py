"""What a run logs, on a terminal that other jobs share and on a full disk, and the list of its images."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import call, write_data
from hydra.types import RunMode

from dinoseg.extensions.sweeps.table import SweepTable
from dinoseg.report.log import RunLog
from dinoseg.report.loggers.logger import Logger
from dinoseg.runs.log_file import LABEL, LabelledStream, LogFile, announce, configure_log
from dinoseg.runs.split_file import write_split
from dinoseg.utils.errors import UserError, file_errors_as_user_errors


def test_each_line_begins_with_its_label():
    stream = io.StringIO()
    labelled = LabelledStream(stream, "job 3: ")
    assert labelled.write("") == 0
    print("one", 1, file=labelled)
    print("two\nthree", end="", file=labelled, flush=True)
    print(" and four\n", file=labelled)
    assert stream.getvalue() == "job 3: one 1\njob 3: two\njob 3: three and four\njob 3: \n"


@pytest.fixture
def root_log():
    root = logging.getLogger()
    streams = (sys.stdout, sys.stderr)
    kept = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        handler.close()
    (root.handlers[:], level), (sys.stdout, sys.stderr) = kept, streams
    root.setLevel(level)


@pytest.mark.parametrize(
    ("launcher", "labels"),
    [
        ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", ["", ""]),
        ("some.Launcher", ["job 3: ", "job 12: "]),
    ],
)
def test_log_lines_of_concurrent_jobs_are_labelled(tmp_path, monkeypatch, root_log, launcher, labels):
    monkeypatch.setenv(LABEL, "")
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for number in (3, 12):  # of one process, as joblib's are
        parts = {"job": SimpleNamespace(num=number), "launcher": SimpleNamespace(_target_=launcher)}
        hydra = SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir=tmp_path), **parts)
        SweepTable().on_job_start(SimpleNamespace(hydra=hydra))
        configure_log(tmp_path)
        logging.getLogger("dinoseg").warning("said")
        print("printed")
    assert out.getvalue() == "".join(f"{label}printed\n" for label in labels)
    assert [line.partition(" WARNING ")[2] for line in err.getvalue().splitlines()] == ["said", "said"]
    assert all(line.startswith(label) for line, label in zip(err.getvalue().splitlines(), labels, strict=True))
    assert (tmp_path / "run.log").read_text().count("job") == 0


def test_started_step_is_shown_only_on_the_terminal(tmp_path, monkeypatch, root_log):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    configure_log(tmp_path)
    announce("Reading weights")
    assert err.getvalue().endswith("INFO Reading weights ...\n") and not (tmp_path / "run.log").read_text()
    logging.getLogger("dinoseg").info("done")
    assert "done" in (tmp_path / "run.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_log_on_a_full_disk_reports_once_and_stops(capsys, caplog):
    handler = LogFile("/dev/full")
    root = logging.getLogger()
    root.addHandler(handler)
    for _ in range(3):
        logging.getLogger("dinoseg").warning("going on")
    assert handler not in root.handlers and "Traceback" not in capsys.readouterr().err
    ends = [message for message in caplog.messages if "ends here" in message]
    assert ends == ["/dev/full ends here (No space left on device)."]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_rows_on_a_full_disk_are_an_error_and_close_the_rest(tmp_path):
    closed = []
    with pytest.raises(UserError, match="No space left"), file_errors_as_user_errors(tmp_path):
        board = type("Board", (Logger,), {"close": lambda self, *, status: closed.append(True)})
        log = RunLog(tmp_path, {"board": board})
        log._file.close()
        log._file = Path("/dev/full").open("w", encoding="utf-8")
        with log:
            log.scalars(1, {"train/loss": 1.0})
    assert closed


def test_undecodable_names_can_be_printed_and_logged(tmp_path):
    code = (
        "import logging, os, pathlib; from dinoseg.runs.log_file import configure_log;"
        "configure_log(pathlib.Path('.'));"
        r"name = os.fsdecode(b'caf\xe9'); print(name); logging.warning(name)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "caf\\xe9\n" and "Logging error" not in done.stderr, done.stderr
    assert (tmp_path / "run.log").read_text().endswith("caf\\xe9\n")


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
    write_split(tmp_path, {"train": ["a"], "val": ["v"], "unlabelled": ["u"]})
    assert "val: 1 removed (v); unlabelled: 1 removed (u))" in write("a", "")


@pytest.mark.parametrize("spoilt", ["", "[]", "{"])
def test_damaged_split_record_is_written_again(write, tmp_path, spoilt):
    (tmp_path / "split.json").write_text(spoilt)
    assert "is damaged (" in write("ab")


def test_resumed_run_records_a_removed_image(trained_once, tmp_path, experiments):
    shutil.copytree(trained_once / "segmenter", tmp_path / "run")
    write_data(tmp_path / "data")
    for kind in ("images", "masks"):
        (tmp_path / f"data/train/{kind}/3.png").unlink()
    call(tmp_path, "mode=train", "resume=run", "data.root=data", "trainer.steps=9", "engine=cpu", "engine.workers=0")
    assert len(experiments) == 1
    assert json.loads((tmp_path / "run/split_1.json").read_text())["train"] == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "run/split.json").read_text())["train"] == ["0", "1", "2"]
    assert "train: 1 removed (3); val: the same" in (tmp_path / "run/run.log").read_text()
