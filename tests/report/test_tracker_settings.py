"""What loggers of experiment trackers accept, send at the end and print, with stand-ins for the trackers' clients."""

from types import SimpleNamespace

import pytest

from dinoseg.report.loggers.mlflow import MlflowLogger, _name
from dinoseg.report.loggers.wandb import WandbLogger


class StubClient:
    """Stand-in for the clients of both trackers: records each call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **named: self.calls.append((name, args, named)) or SimpleNamespace()


@pytest.fixture
def mlflow_logger(tmp_path):
    logger = MlflowLogger(tmp_path, tracking_uri="http://127.0.0.1:1")
    logger._client, logger.run_id = StubClient(), "run1"
    return logger


@pytest.mark.parametrize(("failed", "status"), [(False, "FINISHED"), (True, "FAILED")])
def test_mlflow_shows_whether_the_training_failed(mlflow_logger, failed, status):
    mlflow_logger.close(failed=failed)
    assert mlflow_logger._client.calls == [("set_terminated", ("run1",), {"status": status})]


def test_tags_of_mlflow_have_names_that_it_accepts(mlflow_logger):
    mlflow_logger._tags, mlflow_logger.group = {"a:b": 1, "plain": "x"}, "sweep"
    info = SimpleNamespace(run_id="new", experiment_id="1")
    mlflow_logger._client.create_run = lambda *args, tags, **named: tags_sent.append(tags) or SimpleNamespace(info=info)
    mlflow_logger._client.get_experiment_by_name = lambda name: info
    tags_sent = []
    assert mlflow_logger.open_run(None, {}) == "new"
    assert tags_sent == [{_name("a:b"): "1", "plain": "x", "group": "sweep"}]


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_shows_whether_the_training_failed(tmp_path, failed):
    logger = WandbLogger(tmp_path, mode="offline")
    logger._run = StubClient()
    logger.close(failed=failed)
    assert logger._run.calls == [("finish", (), {"exit_code": int(failed)})]
