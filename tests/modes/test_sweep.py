"""Several jobs of one command: each has its own folder, and a table of all ends the sweep."""

import csv
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_line import SMALL, call, write_data
from omegaconf import OmegaConf

from dinoseg.modes.sweep import SweepTable


def sweep(where, *arguments):
    write_data(where / "data")
    return subprocess.run(
        [sys.executable, "-m", "dinoseg", "-m", "mode=train", *SMALL, "mode.metrics_only=true", *arguments],
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_real_sweep_has_a_folder_per_job_and_a_table(tmp_path):
    done = sweep(tmp_path, "head=linear,mlp")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs/base").glob("train_*")
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "multirun.yaml", "sweep.csv"]
    rows = rows_of(folder / "sweep.csv")
    assert sorted(row["overrides"].split()[-1] for row in rows) == ["head=linear", "head=mlp"]
    assert [float(row["miou"]) for row in rows] == sorted((float(row["miou"]) for row in rows), reverse=True)
    for row in rows:
        run = folder / row["job"]
        assert (tmp_path / row["run"]).resolve() == run.resolve() and row["note"] == ""
        assert (run / "checkpoints/best.safetensors").is_file() and (run / "evaluation/scores.json").is_file()
        assert OmegaConf.load(run / "config/config.yaml").choices.head == row["overrides"].rpartition("=")[2]
    by_head = {row["overrides"].rpartition("=")[2]: row for row in rows}
    assert 0 < int(by_head["linear"]["trainable"]) < int(by_head["mlp"]["trainable"])
    assert all(int(row["trainable"]) < int(row["parameters"]) for row in rows)  # the mask token is not trained
    assert all(float(row["images_per_s"]) > 0 and 0.1 < float(row["memory_gib"]) < 20 for row in rows)
    table = done.stdout.rpartition("\n job")[2] or done.stdout
    assert "miou" in done.stdout and f"written to {folder.relative_to(tmp_path)}/sweep.csv" in done.stdout
    assert all(f"{float(row['miou']):.4f}" in table for row in rows)


def test_a_failed_job_is_named_and_the_others_go_on(tmp_path):
    done = sweep(tmp_path, "adapter=lora", "adapter.rank=0,2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: adapter.rank=0: LoRA needs a rank of at least 1") == 1
    (folder,) = (tmp_path / "outputs/base").glob("train_*")
    good, bad = rows_of(folder / "sweep.csv")
    assert good["job"] == "1" and float(good["miou"]) >= 0 and good["note"] == ""
    assert bad["job"] == "0" and bad["miou"] == "" and bad["note"].startswith("adapter.rank=0")
    assert "adapter.rank=0: LoRA needs" in " ".join(done.stdout.split())
    assert (folder / "1/checkpoints/best.safetensors").is_file() and not (folder / "0/checkpoints").exists()


def test_a_crash_costs_one_job_and_not_the_table(tmp_path):
    write_data(tmp_path / "data")
    done = call(tmp_path, "-m", "mode=train", *SMALL, "mode.metrics_only=true", "head.num_classes=1,2")
    assert done.status == 1 and done.err.count("Traceback") == 1
    (path,) = tmp_path.glob("outputs/base/train_*/sweep.csv")
    good, bad = rows_of(path)
    assert good["job"] == "1" and good["note"] == "" and bad["note"].startswith("RuntimeError: ")
    with pytest.raises(RuntimeError, match="weight tensor"):  # a single run shows where it broke
        call(tmp_path, "mode=train", *SMALL, "head.num_classes=1")


@pytest.fixture
def table(tmp_path):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    callback = SweepTable()

    def end(*values):
        for number, value in enumerate(values):
            job = SimpleNamespace(_return_value=value, overrides=["mode=train", f"seed={number}"])
            callback.on_job_end(config, job)
        callback.on_multirun_end(config)
        return tmp_path / "sweep.csv"

    return end


def test_the_best_job_comes_first_and_failures_last(table, capsys):
    scores = [
        {"miou": 0.25},
        {"error": "no"},
        {"miou": 0.75, "accuracy": 0.5, "run": "r"},
        {"error": "ValueError: broken"},
        {"miou": 0},
    ]
    rows = rows_of(table(*scores))
    assert [row["job"] for row in rows] == ["2", "0", "4", "1", "3"]
    assert [row["note"] for row in rows] == ["", "", "", "no", "ValueError: broken"]
    assert rows[0]["overrides"] == "seed=2" and rows[0]["run"] == "r" and rows[0]["accuracy"] == "0.5"
    shown = capsys.readouterr().out
    assert shown.index("0.7500") < shown.index("0.2500") < shown.index("ValueError: broken")


@pytest.mark.parametrize("values", [[], [None, None], [{"frames": 3}]])
def test_jobs_without_scores_make_no_table(table, values, capsys):
    assert not table(*values).exists() and capsys.readouterr().out == ""
