"""What a logger of an experiment tracker sends, and what its record in the run folder says."""

import json
import math
from functools import partial

import numpy as np
import pytest
from mistakes import assert_refused

from dinoseg.extensions.loggers import remote
from dinoseg.extensions.loggers.mlflow import MlflowLogger, _image_name, _name
from dinoseg.extensions.loggers.remote import RemoteLogger
from dinoseg.extensions.loggers.wandb import WandbLogger
from dinoseg.modes.help import help_for
from dinoseg.report.log import RunLog


class ListLogger(RemoteLogger):
    """Stand-in for a tracker: appends what is sent to a list."""

    package = "list"
    sent: list

    def __init__(self, out_dir, *, start_step=0, sent, known=True, artifacts=False, group=None, timeout=600.0):
        super().__init__(out_dir, group=group, artifacts=artifacts, timeout=timeout)
        self.sent, self.known = sent, known

    def open_run(self, run_id, settings):
        self.sent.append(("open", run_id, settings))
        return run_id if run_id and self.known else "run2" if run_id else "run1"

    def send_scalars(self, step, values):
        self.sent.append((step, values))

    def send_images(self, step, named):
        self.sent.append((step, [*named]))

    def send_scores(self, values):
        self.sent.append(values)

    def send_checkpoint(self, path):
        self.sent.append(path)


def log(folder, sent, steps, **options):
    loggers = {"list": partial(ListLogger, sent=sent, **options)}
    with RunLog(folder, loggers, start_step=steps[0] - 1) as run:
        run.config({"seed": 0})
        for step in steps:
            run.scalars(step, {"train/loss": step / 10})
        run.images(steps[-1], {"a": np.zeros((1, 1, 3), np.uint8)})
        run.scores({"miou": 0.5, "matrix": [[1]], "count": 3})
        run.checkpoint(folder / "best")


def test_resumed_run_sends_each_value_once(tmp_path):
    sent = []
    log(tmp_path, sent, [1, 2, 3])
    assert sent == [
        ("open", None, {"seed": 0}),
        *((step, {"train/loss": step / 10}) for step in (1, 2, 3)),
        (3, ["validation/a"]),
        {"final/miou": 0.5},
    ]
    again = []
    log(tmp_path, again, [2, 3, 4], artifacts=True)
    assert again == [
        ("open", "run1", {"seed": 0}),
        (4, {"train/loss": 0.4}),
        (4, ["validation/a"]),
        {"final/miou": 0.5},
        tmp_path / "best",
    ]
    record = json.loads((tmp_path / "list.json").read_text())
    assert record == {"id": "run1", "logged": {"train/loss": 4, "validation/a": 4}}

    logger = ListLogger(tmp_path, sent=again)
    logger.config({})
    logger.scalars(4, {"train/loss": 0.4, "val/miou": 0.5})  # a validation after the last row
    assert again[-1] == (4, {"val/miou": 0.5})


def test_a_run_that_the_tracker_does_not_know_gets_all_values(tmp_path):
    log(tmp_path, [], [1, 2])
    sent = []
    log(tmp_path, sent, [2, 3], known=False)
    assert [step for step, *_ in sent[1:4]] == [2, 3, 3] and sent[0][:2] == ("open", "run1")


@pytest.mark.parametrize("run_id", [3, "", "../a", "a" * 65, "é", "a\n"])
def test_a_damaged_record_drops_the_logger(tmp_path, caplog, run_id):
    (tmp_path / "list.json").write_text(json.dumps({"id": run_id, "logged": {}}))
    log(tmp_path, [], [1])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "list.json" in warning and "Remove it to start a new tracked run" in warning


@pytest.mark.parametrize(
    ("folder", "name", "group"),
    [("outputs/base/train_1", "train_1", None), ("swept/3", "swept/3", "swept"), ("swept/a/b", "swept/a/b", "swept")],
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
    words = (f"logger={logger.package} needs {logger.package}, ", " in your clone of dinoseg")
    assert_refused(logger.check_installed, *words)


def test_a_folder_that_wandb_writes_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "nothing_but_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(WandbLogger, "package", "nothing_but_runs")
    assert_refused(WandbLogger.check_installed, "is not installed")


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("train/loss", "train/loss"),
        ("val/iou/a+b (c)", "val/iou/a_b _c__"),
        ("a//b/..", "a/_/b/_.._"),
        ("/a", "_/a_"),
        ("..a", "_..a_"),
        ("é", "é"),
        ("a" * 250, "a" * 250),
        ("a" * 251, "a" * 241 + "_"),
        ("a/" * 125, "a/" * 120 + "a_"),
    ],
)
def test_names_are_such_that_mlflow_accepts_them(name, accepted):
    from mlflow.utils.validation import _validate_metric_name

    given = _name(name)
    assert given == accepted if given == name else given[:-8] == accepted and len(given) <= 250
    _validate_metric_name(given)


def test_different_names_stay_different_in_mlflow():
    names = ["w.a:b", "w.a_b", "w.a+b", "a" * 300, "a" * 301, "a//b", "a/_/b", "\udc80"]
    assert len({*map(_name, names)}) == len({*map(_image_name, names)}) == len(names)
    assert _image_name("validation/é").isascii() and len(_image_name("a" * 300)) == 120


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_a_timeout_is_positive_and_finite(tmp_path, timeout):
    words = ("logger.list.timeout=", ": give seconds above 0")
    assert_refused(lambda: ListLogger(tmp_path, sent=[], timeout=timeout), *words)


@pytest.mark.parametrize("word", ["logger=wandb", "logger=[tensorboard,mlflow,wandb]"])
def test_the_keys_of_several_loggers_are_listed(word):
    listed = help_for([word, "--help"])
    assert "logger.wandb.project=null" in listed and ("logger.mlflow.artifacts=false" in listed) == ("mlflow" in word)
