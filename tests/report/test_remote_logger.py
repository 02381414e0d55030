"""What a logger of an experiment tracker sends, and what its record in the run folder says."""

import json

import numpy as np
import pytest

from dinoseg.modes.help import help_for
from dinoseg.report.log import RunLog
from dinoseg.report.loggers import remote
from dinoseg.report.loggers.mlflow import MlflowLogger, _clean_name
from dinoseg.report.loggers.remote import RemoteLogger
from dinoseg.report.loggers.wandb import WandbLogger
from dinoseg.utils.errors import UserError


class ListLogger(RemoteLogger):
    """Stand-in for a tracker: appends what is sent to a list."""

    package = "list"
    sent: list

    def __init__(self, out_dir, *, start_step=0, sent, group=None):
        super().__init__(out_dir, group=group)
        self.sent = sent

    def config(self, settings):
        self.sent.append(("open", self.run_id, settings))
        self.store_run(self.run_id or "run1")

    def scalars(self, step, values):
        if self.is_new(step):
            self.sent.append((step, values))

    def images(self, step, named):
        if self.is_new(step):
            self.sent.append((step, [*named]))

    def scores(self, values):
        self.sent.append(values)


def log(folder, sent, steps, **options):
    def make(out_dir, *, start_step):
        return ListLogger(out_dir, start_step=start_step, sent=sent, **options)

    with RunLog(folder, {"list": make}, start_step=steps[0] - 1) as run:
        run.config({"seed": 0})
        for step in steps:
            run.scalars(step, {"train/loss": step / 10})
        run.images(steps[-1], {"a": np.zeros((1, 1, 3), np.uint8)})
        run.scores({"miou": 0.5, "matrix": [[1]], "count": 3})


def test_a_resumed_run_does_not_send_steps_again(tmp_path):
    sent = []
    log(tmp_path, sent, [1, 2, 3])
    assert sent == [
        ("open", None, {"seed": 0}),
        *((step, {"train/loss": step / 10}) for step in (1, 2, 3)),
        (3, ["a"]),
        {"final/miou": 0.5},
    ]
    again = []
    log(tmp_path, again, [2, 3, 4])
    assert again == [
        ("open", "run1", {"seed": 0}),
        (4, {"train/loss": 0.4}),
        (4, ["a"]),
        {"final/miou": 0.5},
    ]
    assert json.loads((tmp_path / "list.json").read_text()) == {"id": "run1", "step": 4}


@pytest.mark.parametrize("text", ["", '{"id": 3, "step": 1}', '{"id": "a", "step": "b"}'])
def test_a_damaged_record_drops_the_logger(tmp_path, caplog, text):
    (tmp_path / "list.json").write_text(text)
    log(tmp_path, [], [1])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "list.json" in warning and "Remove it to start a new tracked run" in warning


@pytest.mark.parametrize(
    ("folder", "name", "group"),
    [
        ("outputs/base/train_1", "train_1", None),
        ("swept/3", "swept/3", "swept"),
        ("swept/a/b", "swept/a/b", "swept"),
    ],
)
def test_runs_of_a_sweep_have_a_group(tmp_path, folder, name, group):
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept/multirun.yaml").touch()
    logger = ListLogger(tmp_path / folder, sent=[])
    assert (logger.run_name, logger.group) == (name, group)
    assert ListLogger(tmp_path / folder, sent=[], group="mine").group == "mine"


@pytest.mark.parametrize("logger", [WandbLogger, MlflowLogger])
def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch, logger):
    logger.check_installed()
    monkeypatch.setattr(remote, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"logger={logger.package} needs {logger.package}, .* in your clone of dinoseg"
    ):
        logger.check_installed()


def test_a_folder_that_wandb_writes_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "nothing_but_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(WandbLogger, "package", "nothing_but_runs")
    with pytest.raises(UserError, match="is not installed"):
        WandbLogger.check_installed()


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("train/loss", "train/loss"),
        ("val/iou/a+b (c)", "val/iou/a_b _c__"),
        ("é", "é"),
        ("a" * 120, "a" * 120),
        ("a" * 121, "a" * 111 + "_"),
    ],
)
def test_names_are_such_that_mlflow_accepts_them(name, accepted):
    from mlflow.utils.validation import _validate_metric_name

    given = _clean_name(name)
    assert given == accepted if given == name else given[:-8] == accepted and len(given) <= 120
    _validate_metric_name(given)


def test_different_names_stay_different_in_mlflow():
    names = ["w.a:b", "w.a_b", "w.a+b", "a" * 300, "a" * 301, "\udc80"]
    assert len({*map(_clean_name, names)}) == len(names)


@pytest.mark.parametrize("word", ["logger=wandb", "logger=[tensorboard,mlflow,wandb]"])
def test_the_keys_of_several_loggers_are_listed(word):
    listed = help_for([word, "--help"])
    assert "logger.wandb.project=null" in listed and ("logger.mlflow.artifacts=false" in listed) == ("mlflow" in word)
