"""Trainings logged to W&B offline: its files hold the values of metrics.jsonl."""

import os
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
from command_line import SMALL, call, write_data
from tracker_servers import (
    WandbServer,
    check_same,
    crash_and_resume,
    json_lines,
    silent_server,
    wandb_records,
    wandb_run,
)

from dinoseg.extensions.loggers.wandb import WandbLogger

pytestmark = pytest.mark.heavy
TRAIN = ("mode=train", *SMALL, "trainer.log_every=1", "trainer.val_every=2", "mode.metrics_only=true")
WANDB = ("logger=[tensorboard,wandb]", "logger.wandb.mode=offline", "logger.wandb.project=trial")
KEY = "0123456789" * 4


@pytest.fixture(scope="module", autouse=True)
def service():
    """Stop W&B's service after the tests."""
    yield
    import wandb

    wandb.teardown()
    assert not [each for each in psutil.Process().children(recursive=True) if "wandb" in each.name()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with data; W&B writes nothing outside it."""
    for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_data(tmp_path / "data")
    return tmp_path


def values_of(rows):
    """Return the numbers of a history as {(key, step): value}, each of which is there once."""
    numbers = [(row, key) for row in rows for key in row if key.startswith(("train/", "val/"))]
    found = [((key, row["step"]), row[key]) for row, key in numbers]
    assert max(Counter(key for key, _ in found).values()) == 1
    return dict(found)


def test_wandb_run_equals_metrics_jsonl_and_is_resumed(folder):
    words = ("logger.wandb.tags=[a,b]", "logger.wandb.artifacts=true", "trainer.steps=2", "hydra.run.dir=run")
    done = call(folder, *TRAIN, *WANDB, *words)
    assert done.status == 0 and "wandb sync " in done.out and "TensorBoard:" in done.out, done.err
    runs, rows, summary = wandb_run(folder / "run")
    assert values_of(rows) == json_lines(folder / "run") and len(json_lines(folder / "run")) > 15
    assert (runs[0].project, runs[0].display_name, list(runs[0].tags)) == ("trial", "run", ["a", "b"])
    assert runs[0].run_group == "" and summary["final/miou"] > 0
    assert [row[key] for row in rows for key in row if key.endswith("._type")] == ["image-file"] * 2
    files = [path.suffix for path in folder.glob("run/wandb/offline-run-*/files/media/images/**/*") if path.is_file()]
    assert files == [".png"] * 2
    (path,) = folder.glob("run/wandb/offline-run-*/run-*.wandb")
    (artifact,) = [each.artifact for each in wandb_records(path) if each.WhichOneof("record_type") == "artifact"]
    assert artifact.type == "model" and artifact.name == f"{runs[0].run_id}-best"
    assert [entry.path for entry in artifact.manifest.contents] == ["best.safetensors"]

    crash_and_resume(folder, *TRAIN, *WANDB)
    (logger := WandbLogger(folder / "run", mode="offline")).config({})
    logger.close()
    made = sorted(map(str, folder.glob("run/wandb/offline-run-*")))
    assert len(made) == 4 and logger.view.split("wandb sync ")[1].split() == made
    runs, rows, _ = wandb_run(folder / "run")
    assert len({run.run_id for run in runs}) == 1
    check_same(values_of(rows), json_lines(folder / "run"))


def train_elsewhere(folder, url, *words):
    """Start a training that logs to a server, in a process of its own, which has to end, too."""
    words = [*TRAIN, "logger=wandb", "logger.wandb.timeout=5", "hydra.run.dir=run", *words]
    env = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
    program = [sys.executable, "-m", "dinoseg", *words]
    return subprocess.Popen(program, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_no_key(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_server_receives_metrics_and_no_key_is_stored(folder):
    server = WandbServer()
    try:
        training = train_elsewhere(folder, server.url, "trainer.steps=4", "logger.wandb.timeout=100")
        out, err = training.communicate(timeout=600)
    finally:
        server.kill()
    assert training.returncode == 0 and "dropped" not in err and f"W&B:          {server.url}/me/dinoseg" in out, err
    assert values_of(server.rows) == json_lines(folder / "run") and len(server.rows) > 5
    check_no_key(folder)


def test_a_server_that_is_killed_in_mid_run_costs_one_warning(folder):
    server = WandbServer()
    try:
        training = train_elsewhere(folder, server.url, "trainer.steps=300", "mode.pictures=0", "trainer.val_every=150")
        log = folder / "run/metrics.jsonl"
        while training.poll() is None and not (log.exists() and log.read_text().count("\n") > 20):
            time.sleep(0.05)
    finally:
        server.kill()
    assert training.poll() is None, "the training ended before the server was killed"
    _, err = training.communicate(timeout=600)
    assert training.returncode == 0 and err.count("logger.wandb failed and is dropped") == 1, err
    assert {step for _, step in json_lines(folder / "run")} == {*range(1, 301)}


def test_a_server_that_never_answers_does_not_hold_up_a_training(folder):
    with silent_server() as url:
        training = train_elsewhere(folder, url, "trainer.steps=20")
        _, err = training.communicate(timeout=600)
    assert training.returncode == 0 and err.count("logger.wandb failed and is dropped") == 1, err
    assert len({step for _, step in json_lines(folder / "run")}) == 20
    check_no_key(folder)
