"""Passwords in URLs are neither stored nor printed."""

import pytest
from command_line import SMALL, call, write_data
from mistakes import assert_refused

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.loggers import logger_factories
from dinoseg.report.log import RunLog
from dinoseg.utils.wording import has_credentials, without_credentials


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("at https://me:secret@host:80/a failed", "at https://host:80/a failed"),
        ("https://token@host", "https://host"),
        ("postgresql+psycopg://me:p%40w@db/x and http://a:b@c", "postgresql+psycopg://db/x and http://c"),
        ("https://me:pa/ss@host/a failed", "https://host/a failed"),
        ("https://me:pa?ss@host", "https://host"),
        ("https://me:pa#ss@host", "https://host"),
        ("https://me:12ab/c@host", "https://host"),
        ("https://me:p@ss/word@host", "https://host"),
        ("https://:pa/ss@host", "https://host"),
        ("http://host/path?mail=me@host", None),
        ("http://host:80/path?mail=me@host", None),
        ("http://host:80?mail=me@host", None),
        ("http://[::1]:80/me@host", None),
        ("s3://bucket/a:b@c", None),
        ("me@host", None),
        ("http://127.0.0.1:5000", None),
    ],
)
def test_users_and_passwords_are_removed_from_urls(text, clean):
    assert without_credentials(text) == (clean or text) and has_credentials(text) == (clean is not None)


@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")])
def test_a_password_is_refused_before_anything_is_written(tmp_path, sweep):
    write_data(tmp_path / "data")
    words = ("logger=[tensorboard,mlflow]", "logger.mlflow.tracking_uri=https://me:secret@host", "hydra.run.dir=run")
    done = call(tmp_path, *sweep, "mode=train", *SMALL, *words, "hydra.sweep.dir=swept")
    assert done.status == 1 and "logger.mlflow.tracking_uri is a URL with a user or a password" in done.err
    assert "MLFLOW_TRACKING_PASSWORD" in done.err and "secret" not in done.err + done.out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_password_in_a_variable_is_read_and_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVER", "http://me:secret@127.0.0.1:1")
    write_data(tmp_path / "data")
    words = ("logger=mlflow", "logger.mlflow.tracking_uri=${oc.env:MY_SERVER}", "hydra.run.dir=run")
    done = call(tmp_path, "mode=train", *SMALL, *words, "mode.metrics_only=true", "logger.mlflow.timeout=3")
    assert done.status == 0 and done.err.count("logger.mlflow failed and is dropped") == 1, done.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "secret" not in done.err + done.out and not [path for path in files if b"secret" in path.read_bytes()]


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("logger=mlflow", "logger=mlflow needs a server"),
        ("logger=wandb", "needs an API key"),
        ("logger=wandb logger.wandb.mode=of", "must be online, offline or disabled"),
        ("logger=wandb logger.wandb.mode=offline logger.wandb.timeout=0", "logger.wandb.timeout=0"),
    ],
)
def test_wrong_loggers_are_refused(no_account, compose, tmp_path, line, message):
    cfg = compose("mode=train", *SMALL, *line.split())
    assert_refused(lambda: RunLog(tmp_path, logger_factories(Builder(cfg))), message)
