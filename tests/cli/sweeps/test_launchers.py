"""Sweeps whose jobs run in other processes: all are in the table, and a failed one is told by the exit status."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL, write_data

PLUGINS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher"}
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
    words += [
        "engine.workers=1",
        "mode.metrics_only=true",
        "mode.report=false",
        "hydra.sweep.dir=sweep",
        f"hydra/launcher={launcher}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dinoseg", "-m", "mode=train", *words, "data.root=data,nowhere", *SEARCH * searches],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "ConfigStore" not in done.stderr, done.stderr
    if launcher == "joblib":  # both write here
        assert re.search(r"^job \d: checkpoint: ", done.stdout, re.MULTILINE)
        assert re.search(r"^job \d: \S+ INFO data: +4 training", done.stderr, re.MULTILINE)
    with open(tmp_path / "sweep/sweep.csv", encoding="utf-8", newline="") as file:
        rows = {row["data.root"]: row for row in csv.DictReader(file)}
    assert float(rows["data"]["mIoU %"]) > 0 and rows["nowhere"]["note"].startswith("data.root=nowhere is not a folder")
    assert (tmp_path / "sweep" / rows["data"]["job"] / "checkpoints/best.safetensors").is_file()
