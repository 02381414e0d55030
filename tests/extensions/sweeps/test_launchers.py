"""Sweeps whose jobs run in other processes: all are in the table, and a failed one is told by the exit status."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from command_line import SMALL, write_data
from daemons import wait_until

PLUGINS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher"}
SWEEP = (sys.executable, "-m", "dinoseg", "-m", "mode=train")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
SEARCH = ("hydra/sweeper=optuna", "hydra.sweeper.trials=2", "hydra.sweeper.at_once=2")


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", PLUGINS)
def test_jobs_in_other_processes_are_in_the_table(tmp_path, launcher):
    pytest.importorskip(PLUGINS[launcher])
    searches = launcher == "joblib"
    if searches:
        pytest.importorskip("optuna")
    write_data(tmp_path / "data")
    words = [word for word in SMALL if not word.startswith(("data.root", "engine.workers"))]
    words += [f"engine.workers={int(searches)}", "mode.metrics_only=true", "mode.report=false", "hydra.sweep.dir=sweep"]
    words += [f"hydra/launcher={launcher}", "data.root=data,nowhere", *SEARCH * searches]
    done = subprocess.run([*SWEEP, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "ConfigStore" not in done.stderr, done.stderr
    if launcher == "joblib":  # both write here
        assert re.search(r"^job \d: checkpoint: ", done.stdout, re.MULTILINE)
        assert re.search(r"^job \d: \S+ INFO data: +4 training", done.stderr, re.MULTILINE)
    with open(tmp_path / "sweep/sweep.csv", encoding="utf-8", newline="") as file:
        rows = {row["data.root"]: row for row in csv.DictReader(file)}
    assert float(rows["data"]["mIoU %"]) > 0 and rows["nowhere"]["note"].startswith("data.root=nowhere: file or folder")
    assert (tmp_path / "sweep" / rows["data"]["job"] / "checkpoints/best.safetensors").is_file()


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGKILL")
@pytest.mark.parametrize(
    ("launcher", "number", "at_once"),
    [("joblib", "SIGKILL", 2), ("joblib", "SIGTERM", 2), ("submitit_local", "SIGKILL", 3)],
)
def test_jobs_save_and_end_when_their_sweep_is_killed(tmp_path, launcher, number, at_once):
    pytest.importorskip(PLUGINS[launcher])
    write_data(tmp_path / "data")
    words = [word for word in SMALL if not word.startswith("trainer.steps")]
    words += ["trainer.steps=1000000", "trainer.save_every=1000000", "trainer.val_every=1000000"]
    words += ["trainer.log_every=1", "seed=0,1,2", "hydra.sweep.dir=sweep", f"hydra/launcher={launcher}"]
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as log:
        sweep = subprocess.Popen([*SWEEP, *words], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        wait_until(lambda: len(started_runs(tmp_path)) == at_once)
        children = psutil.Process(sweep.pid).children(recursive=True)
        jobs = [job for job in children if "tracker" not in str(job.cmdline())]
    finally:
        sweep.send_signal(signal.Signals[number])
    sweep.wait()
    try:
        wait_until(lambda: not any(map(_is_alive, jobs)), seconds=60)
    finally:
        for job in filter(_is_alive, jobs):
            job.kill()
    runs = [path.parent for path in tmp_path.glob("sweep/?/run.log")]
    assert sorted(runs) == sorted(started_runs(tmp_path))  # no further job has started
    assert all((run / "checkpoints/last.safetensors").is_file() for run in runs)


def started_runs(folder):
    """Return the runs that have logged a step."""
    return [path.parent for path in folder.glob("sweep/?/metrics.jsonl") if path.stat().st_size]


def _is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
