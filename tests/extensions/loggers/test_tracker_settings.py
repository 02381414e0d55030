"""What loggers of experiment trackers accept, send at the end and print, with stand-ins for the trackers' clients."""

import logging
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mistakes import assert_refused, refusals

from dinoseg.extensions.loggers.mlflow import MlflowLogger, _name
from dinoseg.extensions.loggers.wandb import WandbLogger
from dinoseg.report.log import RunLog


class StubClient:
    """Stand-in for the clients of both trackers: records each call, and answers with a new run."""

    new = SimpleNamespace(info=SimpleNamespace(run_id="new", experiment_id="1"), experiment_id="1")

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **named: self.calls.append((name, args, named)) or self.new


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
    logger = MlflowLogger(tmp_path, tracking_uri="http://127.0.0.1:1")
    logger._client, logger.run_id = StubClient(), "run1"
    return logger


@pytest.fixture
def wandb_logger(tmp_path):
    logger = WandbLogger(tmp_path, mode="offline")
    logger._run = StubClient()
    return logger


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("killed", 1)])
def test_trackers_show_how_the_training_ended(mlflow_logger, wandb_logger, status, code):
    mlflow_logger.close(status=status)
    assert mlflow_logger._client.calls == [("set_terminated", ("run1",), {"status": status.upper()})]
    wandb_logger.close(status=status)
    assert wandb_logger._run.calls == [("finish", (), {"exit_code": code})]


def test_tags_of_mlflow_have_names_that_it_accepts(mlflow_logger):
    mlflow_logger._tags, mlflow_logger.group = {"a:b": 1, "plain": "x"}, "sweep"
    assert mlflow_logger.open_run(None, {}) == "new"
    sent = [named["tags"] for name, _, named in mlflow_logger._client.calls if name == "create_run"]
    assert sent == [{_name("a:b"): "1", "plain": "x", "group": "sweep"}]


@pytest.mark.parametrize(("stage", "run_id"), [("active", "run1"), ("deleted", "new")])
def test_mlflow_continues_a_run_unless_it_is_deleted(mlflow_logger, stage, run_id):
    found = SimpleNamespace(run_id="run1", experiment_id="1", lifecycle_stage=stage)
    mlflow_logger._client.get_run = lambda _: SimpleNamespace(info=found)
    mlflow_logger._uri = "sqlite:///runs.db"  # which has no page: the view is a command
    assert mlflow_logger.open_run("run1", {"seed": 0}) == run_id
    continued = ("update_run", ("run1",), {"status": "RUNNING"})
    assert (continued in mlflow_logger._client.calls) == (stage == "active")
    assert "mlflow ui --backend-store-uri sqlite:///runs.db" in mlflow_logger.view and run_id in mlflow_logger.view


def test_trackers_receive_the_images_of_a_validation(mlflow_logger, wandb_logger):
    rgb = np.full((2, 3, 3), 7, np.uint8)
    mlflow_logger.send_images(4, {"validation/a": rgb})
    named = {"key": "validation/a", "step": 4, "synchronous": True}
    assert mlflow_logger._client.calls == [("log_image", ("run1", rgb), named)]
    wandb_logger.send_images(4, {"validation/a": rgb})
    ((_, (row,), _),) = wandb_logger._run.calls
    assert row["step"] == 4 and (np.asarray(row["validation/a"].image) == rgb).all()


def init_options(monkeypatch, logger):
    """Return what a logger passes to wandb.init."""
    import wandb

    passed = {}
    config = SimpleNamespace(update=lambda *args, **named: None)
    run = SimpleNamespace(id="run1", url="http://host/run1", config=config, define_metric=lambda *args, **named: None)
    monkeypatch.setattr(wandb, "init", lambda **options: passed.update(options) or run)
    logger.config({})
    return passed


@pytest.mark.parametrize(
    ("folder", "variables", "found"),
    [
        ("run", {}, ("dinoseg", "run", None)),
        ("run", {"WANDB_PROJECT": "leaves", "WANDB_NAME": "first"}, ("leaves", "first", None)),
        ("swept/0", {"WANDB_NAME": "first"}, ("dinoseg", "first/0", "swept")),
        ("swept/a/1", {"WANDB_NAME": "first"}, ("dinoseg", "first/a/1", "swept")),
    ],
)
def test_wandb_reads_project_tags_and_name_from_the_environment(tmp_path, monkeypatch, folder, variables, found):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept/multirun.yaml").touch()
    passed = init_options(monkeypatch, WandbLogger(tmp_path / folder, mode="offline"))
    assert (passed["project"], passed["name"], passed["group"]) == found
    assert passed["tags"] is None  # so that WANDB_TAGS counts
    passed = init_options(monkeypatch, WandbLogger(tmp_path / folder, mode="offline", project="mine", tags=["a", 1]))
    assert (passed["project"], passed["tags"]) == ("mine", ["a", "1"])


def open_wandb(**options):
    return partial(WandbLogger, Path(), **{"mode": "offline", **options})


test_wandb_names_settings_that_it_refuses = refusals(
    {
        **{f"{each} in a name": (open_wandb(project=f"a{each}b"), "not a name of a W&B project") for each in "/\\#?%:"},
        "long name": (open_wandb(project="a" * 129), "at most 128 characters"),
        "long tag": (open_wandb(tags=["a" * 65]), "of 65 characters: use 1 to 64"),
        "empty tag": (open_wandb(tags=[""]), "of 0 characters"),
        "unknown mode": (open_wandb(mode="of"), "must be online, offline or disabled"),
    }
)


def test_wandb_names_a_variable_that_it_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    assert_refused(lambda: WandbLogger(tmp_path, mode="offline"), "WANDB_ variable", "a/b")


def test_disabled_wandb_is_one_log_line_and_logs_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with caplog.at_level(logging.INFO, "dinoseg"), RunLog(tmp_path, {"wandb": WandbLogger}) as log:
        log.config({})
        log.scalars(1, {"a": 1.0})
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dinoseg")] == [
        "logger=wandb logs nothing: logger.wandb.mode or WANDB_MODE is disabled."
    ]
    assert not log.views and not (tmp_path / "wandb").exists() and not (tmp_path / "wandb.json").exists()
