"""Trainings logged to an MLflow server of the test: its REST API returns the values of metrics.jsonl."""

import signal
import subprocess
import sys
import time
from functools import partial
from urllib.error import HTTPError

import pytest
from command_line import SMALL, call, write_data
from tracker_servers import MlflowServer, check_same, crash_and_resume, json_lines, silent_server

from dinoseg.extensions.loggers.mlflow import MlflowLogger
from dinoseg.report.log import RunLog

pytestmark = pytest.mark.heavy
TRAIN = ("mode=train", *SMALL, "trainer.log_every=1", "trainer.val_every=2", "mode.metrics_only=true")


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield running
    running.kill()


def train(folder, server, experiment, *words):
    names = (f"logger.mlflow.tracking_uri={server.url}", f"logger.mlflow.experiment={experiment}")
    done = call(folder, *TRAIN, "logger=mlflow", *names, *words)
    assert done.status == 0 and "failed and is dropped" not in done.err, done.err
    return done


def values_of(server, run):
    """Return all metrics of a run but final scores as {(key, step): value}, each of which is there once."""
    keys = [each["key"] for each in run["data"]["metrics"] if not each["key"].startswith("final/")]
    found = [((key, step), value) for key in keys for step, value in server.history(run, key)]
    assert len(found) == len(dict(found))
    return dict(found)


def test_mlflow_run_equals_metrics_jsonl_and_is_resumed(folder, server):
    words = ("logger.mlflow.tags={who: me}", "logger.mlflow.artifacts=true", "trainer.steps=2", "hydra.run.dir=run")
    done = train(folder, server, "trial", *words)
    (run,) = server.runs("trial")
    assert f"MLflow:       {server.url}/#/experiments/" in done.out and run["info"]["run_id"] in done.out
    assert values_of(server, run) == json_lines(folder / "run") and len(json_lines(folder / "run")) > 15
    tags = {each["key"]: each["value"] for each in run["data"]["tags"]}
    params = {each["key"]: each["value"] for each in run["data"]["params"]}
    final = {each["key"]: each["value"] for each in run["data"]["metrics"] if each["key"].startswith("final/")}
    assert tags["who"] == "me" and "group" not in tags and run["info"]["run_name"] == "run"
    assert run["info"]["status"] == "FINISHED" and params["choices.head"] == "linear" and final["final/miou"] > 0
    images = server.ask(f"artifacts/list?run_id={run['info']['run_id']}&path=images")["files"]
    assert len([each for each in images if each["path"].endswith(".png")]) == 2
    (file,) = server.ask(f"artifacts/list?run_id={run['info']['run_id']}&path=checkpoints")["files"]
    uploaded = folder / "run" / file["path"]
    assert uploaded.name == "best.safetensors" and int(file["file_size"]) == uploaded.stat().st_size

    names = (f"logger.mlflow.tracking_uri={server.url}", "logger.mlflow.experiment=trial")
    crash_and_resume(folder, *TRAIN, "logger=mlflow", *names)
    (run,) = server.runs("trial")
    check_same(values_of(server, run), json_lines(folder / "run"))
    assert run["info"]["status"] == "FINISHED"


def test_interrupted_run_is_killed_and_finished_after_resuming(folder, server):
    names = (f"logger.mlflow.tracking_uri={server.url}", "logger.mlflow.experiment=stopped")
    words = [*TRAIN, "logger=mlflow", *names, "trainer.steps=4000", "trainer.val_every=4000", "hydra.run.dir=run"]
    training = subprocess.Popen([sys.executable, "-m", "dinoseg", *words], cwd=folder)
    log = folder / "run/metrics.jsonl"
    while training.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.05)
    training.send_signal(signal.SIGTERM)
    assert training.wait(600) == 128 + signal.SIGTERM
    assert [run["info"]["status"] for run in server.runs("stopped")] == ["KILLED"]
    steps = max(step for _, step in json_lines(folder / "run")) + 1
    train(folder, server, "stopped", "resume=run", f"trainer.steps={steps}")
    assert [run["info"]["status"] for run in server.runs("stopped")] == ["FINISHED"]


def received_values(server):
    """Return the values of the only run that the server has received so far."""
    try:
        return [value for run in server.runs() for value in server.history(run, "train/loss")]
    except HTTPError:  # it has no value yet
        return []


def test_a_server_that_is_killed_in_mid_run_costs_one_warning(tmp_path, caplog):
    server = MlflowServer(tmp_path)
    loggers = {"mlflow": partial(MlflowLogger, tracking_uri=server.url, timeout=120.0)}
    try:
        with RunLog(tmp_path / "run", loggers) as log:
            log.config({"seed": 0})
            for step in range(1, 51):
                log.scalars(step, {"train/loss": 1 / step})
                time.sleep(0.1)
                if step == 20:
                    deadline = time.monotonic() + 600
                    while len(found := received_values(server)) < 5 and time.monotonic() < deadline:
                        time.sleep(0.1)
                    assert found[:5] == [(step, 1 / step) for step in range(1, 6)]
                    server.kill()
    finally:
        server.kill()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "logger.mlflow failed and is dropped" in warnings[0], warnings
    assert len(json_lines(tmp_path / "run")) == 50


def test_a_server_that_never_answers_does_not_hold_up_a_training(folder):
    with silent_server() as url:
        words = ("logger=mlflow", f"logger.mlflow.tracking_uri={url}", "logger.mlflow.timeout=2")
        done = call(folder, *TRAIN, *words, "hydra.run.dir=run")
    assert done.status == 0 and done.err.count("logger.mlflow failed and is dropped") == 1, done.err
    assert "Retrying" not in done.err
