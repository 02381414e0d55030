"""Where a run's lines go: what several jobs write on one terminal begins with the job's name."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from dinoseg.cli.sweeps.table import SweepTable
from dinoseg.experiment.log_file import LABEL, LabelledStream, announce, configure_log


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
    root, streams = logging.getLogger(), (sys.stdout, sys.stderr)
    kept = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        handler.close()
    (root.handlers[:], level), (sys.stdout, sys.stderr) = kept, streams
    root.setLevel(level)


@pytest.mark.parametrize("launcher", ["hydra._internal.core_plugins.basic_launcher.BasicLauncher", "some.Launcher"])
def test_log_lines_of_concurrent_jobs_are_labelled(tmp_path, monkeypatch, root_log, launcher):
    monkeypatch.setenv(LABEL, "")
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for number in (3, 12):  # of one process, as joblib's are
        hydra = SimpleNamespace(
            mode=RunMode.MULTIRUN,
            job=SimpleNamespace(num=number),
            launcher=SimpleNamespace(_target_=launcher),
            sweep=SimpleNamespace(dir=tmp_path),
        )
        SweepTable().on_job_start(SimpleNamespace(hydra=hydra))
        configure_log(tmp_path)
        logging.getLogger("dinoseg").warning("said")
        print("printed")
    labels = ["", ""] if "Basic" in launcher else ["job 3: ", "job 12: "]
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
