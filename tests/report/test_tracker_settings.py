"""What loggers of experiment trackers accept, send at the end and print, with stand-ins for the trackers' clients."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from dinoseg.report.log import RunLog
from dinoseg.report.loggers.mlflow import MlflowLogger, _clean_name
from dinoseg.report.loggers.wandb import WandbLogger
from dinoseg.utils.errors import UserError


class StubClient:
    """Stand-in for the clients of both trackers: records each call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **named: self.calls.append((name, args, named)) or SimpleNamespace()


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Remove variables of W&B, which reads them at its first use."""
    import wandb

    for name in [each for each in os.environ if each.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def mlflow_logger(tmp_path):
    logger = MlflowLogger(tmp_path, tracking_uri="http://127.0.0.1:1", tags={"a:b": 1, "plain": "x"}, group="sweep")
    logger._mlflow = StubClient()
    logger._mlflow.start_run = lambda run_id, **named: (
        logger._mlflow.calls.append(("start_run", (run_id,), named))
        or (SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new", experiment_id="1")))
    )
    return logger


@pytest.mark.parametrize("status", ["finished", "failed", "killed"])
def test_mlflow_shows_how_the_training_ended(mlflow_logger, status):
    mlflow_logger.close(status=status)
    assert not mlflow_logger._mlflow.calls
    mlflow_logger.config({})
    mlflow_logger.close(status=status)
    assert mlflow_logger._mlflow.calls[-1] == ("end_run", (status.upper(),), {})


def test_tags_of_mlflow_have_names_that_it_accepts(mlflow_logger):
    mlflow_logger.config({"seed": 0})
    _, _, start, params = mlflow_logger._mlflow.calls
    assert start[2]["tags"] == {_clean_name("a:b"): "1", "plain": "x", "group": "sweep"}
    assert params == ("log_params", ({"seed": 0},), {}) and mlflow_logger.run_id == "new"


def test_mlflow_continues_the_run_of_the_record(mlflow_logger):
    mlflow_logger.store_run("run1")
    mlflow_logger.config({"seed": 0})
    assert [(name, given) for name, given, _ in mlflow_logger._mlflow.calls[2:]] == [("start_run", ("run1",))]


def test_mlflow_receives_the_images_of_a_validation(mlflow_logger):
    rgb = np.zeros((2, 3, 3), np.uint8)
    mlflow_logger.images(4, {"a": rgb, "é": rgb})
    first, second = mlflow_logger._mlflow.calls
    assert first == ("log_image", (rgb,), {"key": "validation/a", "step": 4, "synchronous": True})
    assert second[2]["key"].isascii()


def test_an_error_of_a_row_is_raised_at_the_next_one(mlflow_logger):
    def fail():
        raise OSError("no connection")

    mlflow_logger._mlflow.log_metrics = lambda *given, **named: SimpleNamespace(wait=fail)
    mlflow_logger.scalars(1, {"a": 1.0})
    with pytest.raises(OSError, match="no connection"):
        mlflow_logger.scalars(2, {"a": 1.0})


def test_wandb_receives_the_images_of_a_validation(tmp_path):
    logger, rgb = WandbLogger(tmp_path, mode="offline"), np.full((2, 3, 3), 7, np.uint8)
    logger._run = StubClient()
    logger.images(4, {"a": rgb})
    ((_, (row,), _),) = logger._run.calls
    assert row["step"] == 4 and (np.asarray(row["validation/a"].image) == rgb).all()


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("killed", 1)])
def test_wandb_shows_whether_the_training_finished(tmp_path, status, code):
    logger = WandbLogger(tmp_path, mode="offline")
    logger._run = StubClient()
    logger.close(status=status)
    assert logger._run.calls == [("finish", (), {"exit_code": code})]


def test_wandb_reads_project_tags_and_name_from_the_environment(tmp_path, monkeypatch):
    for key, value in {"PROJECT": "leaves", "NAME": "first", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    settings = WandbLogger(tmp_path / "run", mode="offline")._settings
    assert (settings.project, settings.run_tags, settings.run_name) == ("leaves", ("a", "b"), "first")
    settings = WandbLogger(tmp_path / "run", mode="offline", project="mine", tags=["a", 1])._settings
    assert (settings.project, settings.run_tags) == ("mine", ("a", "1"))


def test_without_environment_the_project_of_wandb_is_dinoseg(tmp_path):
    settings = WandbLogger(tmp_path / "run", mode="offline")._settings
    assert (settings.project, settings.run_name, settings.run_tags) == ("dinoseg", "run", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"project": f"a{each}b"}, "Invalid project name") for each in "/\\#?%:"),
        ({"project": "a" * 129}, "exceeded 128 characters"),
        ({"tags": ["a" * 65]}, "1 and 64 characters|64"),
        ({"tags": [""]}, "64"),
        ({"mode": "of"}, "'online', 'offline'"),
    ],
)
def test_wandb_names_settings_that_it_refuses(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        WandbLogger(tmp_path, **{"mode": "offline", **options})


def test_wandb_names_a_variable_that_it_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    with pytest.raises(UserError, match="WANDB_ variable.*a/b"):
        WandbLogger(tmp_path, mode="offline")


def test_disabled_wandb_logs_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with RunLog(tmp_path, {"wandb": WandbLogger}) as log:
        log.config({})
        log.scalars(1, {"a": 1.0})
    assert "dropped" not in caplog.text and not log.views and not (tmp_path / "wandb").exists()
