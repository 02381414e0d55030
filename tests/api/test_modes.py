"""The modes as functions: they do what the command line does, and leave the caller's process as it was."""

import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from caller_settings import foreign_settings
from command_line import SMALL, TINY_KEYS, call, write_data
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from mistakes import assert_refused
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from torch import nn

import dinoseg
from dinoseg.api import modes
from dinoseg.api.results import Comparison, Results, Scores
from dinoseg.modes import train as train_mode
from dinoseg.training import checkpoint
from dinoseg.utils.images import read_image, write_png

KEYS = {  # SMALL in the forms of Python
    "data": {"classes": ["dark", "bright"], "root": "data", "batch_size": np.int64(2)},
    **{"resolution": {"crop": (32, 48)}, "backbone": "tiny", **TINY_KEYS, "adapter": "full"},
    **{"engine": "cpu", "engine.workers": 0, "trainer": {"steps": 2, "val_every": 1}},
}
SHORT = {"report": False, "metrics_only": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write a dataset, and train by the command line and from Python into folders next to it."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    done = call(folder, "mode=train", *SMALL, "trainer.val_every=1", "hydra.run.dir=typed")
    assert done.status == 0, done.err
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(ConfigStore.instance().repo, "optim", {"adamw.yaml": "of a program of Hydra's"})
        OmegaConf.register_new_resolver("len", lambda value: "mine", replace=True)
        torch.manual_seed(7)
        before = snapshot()
        with foreign_settings():
            dinoseg.train(None, "data=folder", **KEYS, out_dir="called")
        assert snapshot() == before
    OmegaConf.clear_resolver("len")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def snapshot():
    """Return what a call may not change in the process."""
    log = logging.getLogger().handlers[:], logging.getLogger().level, logging.getLogger("PIL").level
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    process = dict(os.environ), os.getcwd(), sys.argv[:], sys.stdout, sys.stderr, threading.excepthook
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hydra = GlobalHydra.instance().hydra, dict(ConfigStore.instance().repo), dict(BaseContainer._resolvers)
    return log, states, settings, process, handlers, warnings.filters[:], hydra


def tensors(run, name):
    return checkpoint.read(run / f"checkpoints/{name}.safetensors").tensors


def files(folder):
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"tfevents.*", "tfevents", name) for name in names}


def test_a_training_equals_that_of_the_command_line(place):
    typed, called = place / "typed", place / "called"
    for name in ("last", "best"):
        ours, theirs = tensors(called, name), tensors(typed, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert files(called) == files(typed) and len(files(called)) > 20
    assert (called / "config/config.yaml").read_text() == (typed / "config/config.yaml").read_text()
    words = [(folder / "config/overrides.txt").read_text().splitlines() for folder in (called, typed)]
    assert sorted(words[0]) == sorted(words[1])
    assert (called / "evaluation/scores.json").read_text() == (typed / "evaluation/scores.json").read_text()
    assert "step 2 of 2" in (called / "run.log").read_text()


def test_a_run_shows_its_files(place, tmp_path):
    run = dinoseg.Run(place / "called")
    assert run.step == 2 and run.best_checkpoint.is_file() and run.last_checkpoint.name == "last.safetensors"
    assert run.config["data"]["batch_size"] == 2 and "trainer.steps=2" in run.overrides
    assert run.metrics["step"].tolist()[-1] == 2 and np.isfinite(run.metrics["val/miou"]).sum() == 2
    assert {each.shape for each in run.metrics.values()} == {run.metrics["step"].shape}
    assert run.scores["miou"] == json.loads((run.folder / "evaluation/scores.json").read_text())["miou"]
    assert len(run.plot().axes) == 3 and "step 2, mIoU" in repr(run) and len(repr(run)) < 300
    assert os.fspath(run) == str(run.folder)
    (tmp_path / "<script>&'").symlink_to(place / "called")
    html = dinoseg.Run(tmp_path / "<script>&'")._repr_html_()
    assert "&lt;script&gt;&amp;" in html and "<script>" not in html and "data:image/png;base64," in html
    assert "mIoU" in html and "best.safetensors" in html


def test_a_model_is_loaded_and_evaluated(here):
    run = dinoseg.Run("called")
    model = run.load_model(device="cpu")
    assert model.predict("data/val/images/0.png").mask.shape == (32, 48)
    of_model, of_file = (dinoseg.evaluate(each, mode=SHORT) for each in (model, run.best_checkpoint))
    assert of_model.to_dict() == of_file.to_dict() == run.scores.to_dict()
    assert of_model.folder.parent == here / "outputs/base" and of_model["miou"] == run.scores["miou"]
    assert dict(of_model)["pixels"] == 2 * 32 * 48 and of_model.confusion.sum() == of_model["pixels"]
    assert [row["class"] for row in of_model.per_class] == ["dark", "bright"] and of_model.official is None
    assert repr(of_model).startswith("Scores(mIoU") and "<td>bright</td>" in of_model._repr_html_()
    on_train = dinoseg.evaluate("called", split="train", data={"root": "data"}, out_dir="on train, 1", mode=SHORT)
    assert on_train["pixels"] == 4 * 32 * 48 and on_train.folder == here / "on train, 1"
    assert_refused(lambda: run.load_model("newest"), "Choose best or last")


def test_runs_are_compared(here):
    compared = dinoseg.compare(["typed", dinoseg.Run("called")], out_dir="compared")
    assert isinstance(compared, Comparison) and compared.first == "typed" and [*compared] == ["called"]
    assert compared["called"]["miou"]["value"] == 0 and compared.intervals["called"]["miou"] == (0, 0)
    assert compared.scores["called"]["miou"] == dinoseg.Run("called").scores["miou"]
    assert "called 0.0 (0.0 .. 0.0)" in repr(compared) and "no significant difference" in compared._repr_html_()
    assert (compared.folder / "report.html").is_file() and compared.to_dict()["units"] == 2


def test_images_are_predicted_and_scored(here):
    found = dinoseg.predict("called", "val", out_dir="predicted")
    assert isinstance(found, Results) and found["images"] == 2 and len([*(found.folder / "masks").glob("*.png")]) == 2
    scores = dinoseg.score("predicted/references", found.folder, protocol="semantic", mode={"workers": 1})
    assert isinstance(scores, Scores) and scores["mIoU"] == pytest.approx(dinoseg.Run("called").scores["miou"])
    assert scores.intervals.keys() == {*scores} and scores.per_class


def test_objects_are_tracked(here):
    for number in range(3):
        write_png(here / f"frames/{number}.png", np.full((32, 48, 3), 60 * number, np.uint8))
    write_png(here / "first.png", np.eye(32, 48, dtype=np.uint8))
    keys = TINY_KEYS | {"engine": "cpu", "tracker": {"short_side": 32}, "out_dir": "tracked"}
    found = dinoseg.track("tiny", "frames", labels=here / "first.png", **keys)
    assert found["frames"] == 3 and len([*(found.folder / "masks").glob("*.png")]) == 3
    assert "backbone=tiny" in (found.folder / "config/overrides.txt").read_text()


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (["demoo"], {}, "Did you mean hparam=demo"),
        ([], {"trainer": {"steps": "many"}}, "trainer.steps=many is of type str"),
        ([], {"head": "linear,mlp"}, "head=linear,mlp"),
        ([], {"resume": "missing"}, "resume=missing"),
        ([None, "trainer.clip=${nowhere}"], KEYS, "refers to a key that does not exist"),
        ([None, "~trainer.clip"], KEYS, "~trainer.clip removes a key that is read. Leave it out"),
        ([], {"head": ["linear", "mlp"]}, "head=[linear,mlp] is a list, and head takes one option"),
        ([], {"mode": "eval"}, "mode is set to 'train' by this function and its arguments. Call the function of"),
        ([], {"mode": {"name": "eval"}}, "mode is set to 'train'"),
        (["demo", "mode=eval"], {}, "mode is set to 'train'"),
        ([{"head": "mlp"}], {}, "recipe={'head': 'mlp'} is of type dict of str. Give text or None"),
        ([], {"out_dir": 3}, "out_dir=3 is of type int. Give text or a path or None"),
        ([], {"data": "data"}, "For a path, set data.root=data"),
        ([], {"backbone": nn.Linear}, "backbone is an object, which the checkpoints of a run could not name"),
    ],
)
def test_mistakes_are_user_errors(here, capsys, words, overrides, message):
    before = snapshot()
    left = {*here.iterdir()}
    with pytest.raises(dinoseg.UserError) as raised:
        dinoseg.train(*words, **overrides)
    assert message in str(raised.value) and raised.value.__cause__ is None and raised.value.__context__ is None
    assert "error:" not in capsys.readouterr().err
    assert snapshot() == before and {*here.iterdir()} - left <= {here / "outputs"}


def test_export_gets_all_given_images_and_the_weights_in_memory(monkeypatch):
    given_to_mode = {}

    def record(*_, given):
        given_to_mode.update(given)
        levels = [read_image(path).mean() for path in sorted(Path(given["export.images"]).iterdir())]
        assert sorted(levels) == [*range(17)]
        assert torch.equal(dinoseg.load(given["resume"], device="cpu").head.classify.weight, model.head.classify.weight)
        return {"run": "RUN"}

    model = dinoseg.create_model("rgb", num_classes=2)
    nn.init.normal_(model.head.classify.weight)
    monkeypatch.setattr(modes, "run_mode", record)
    greys = torch.arange(17, dtype=torch.uint8)[:, None, None, None].expand(17, 3, 8, 8)
    dinoseg.export_onnx(model, greys, export={"precision": "int8"})
    assert given_to_mode["export.count"] == 17 and given_to_mode["export"] == "onnx" and model.training


@pytest.mark.parametrize(
    ("call_mode", "message"),
    [
        (lambda: dinoseg.evaluate("model.onnx"), "is an ONNX file"),
        (lambda: dinoseg.predict("called", "missing.png"), "missing.png"),
        (lambda: dinoseg.Run("data"), "is not a run folder"),
        (lambda: dinoseg.Run(3), "folder=3 is of type int. Give text or a path"),
        (lambda: dinoseg.Run("called").load_model(["best"]), "which=['best'] is of type list of str"),
        (lambda: dinoseg.Run("called").resume(resume="typed"), "resume is set to"),
        (lambda: dinoseg.load(["called"]), "path: an ensemble needs two or more different models"),
        (lambda: dinoseg.load("called", trust="id"), "trust=id is of type str. Give a list of texts"),
        (lambda: dinoseg.evaluate("called", trainer={"steps": 3}), "mode=eval does not read the group trainer"),
        (lambda: dinoseg.track("tiny1", "data"), "backbone=tiny1 is unknown. Did you mean backbone=tiny"),
        (lambda: dinoseg.score(None, "data"), "reference=None is of type NoneType. Give text or a path"),
        (lambda: dinoseg.compare(["called"]), "several seeds or folds of each as "),
        (lambda: dinoseg.compare(["called", "data"]), "python -m dinoseg mode=eval resume=RUN"),
        (lambda: dinoseg.export_onnx("called", []), "images holds no image"),
        (lambda: dinoseg.open_dataset(root="data", classes="ab"), "classes=ab is of type str"),
        (lambda: dinoseg.list_heads(["m*"]), "filter=['m*'] is of type list of str"),
    ],
)
def test_mistakes_of_other_modes_are_user_errors(here, call_mode, message):
    assert_refused(call_mode, message)


def test_an_interrupted_training_is_saved_and_resumed(here):
    def interrupt():
        while not (here / "stopped/checkpoints/last.safetensors").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = snapshot()
    thread = threading.Thread(target=interrupt)
    thread.start()
    keys = KEYS | {"trainer": {"steps": 100_000, "val_every": 100_000, "save_every": 1}, "mode": SHORT}
    with pytest.raises(KeyboardInterrupt, match=r"last.safetensors holds step \d+") as stop:
        dinoseg.train(None, "data=folder", **keys, out_dir="stopped")
    thread.join()
    assert snapshot() == before and f"resume={here / 'stopped'} to the same" in str(stop.value)
    assert type(stop.value) is KeyboardInterrupt and stop.value.__context__ is None
    run = dinoseg.Run("stopped")
    done = run.step
    resumed = run.resume(trainer={"steps": done + 1, "val_every": done + 1})
    assert done >= 1 and resumed.step == done + 1 and resumed.folder == run.folder and resumed.scores["pixels"] > 0


def test_errors_pass_restore_and_hold_no_model(here, monkeypatch):
    models = []

    def fail(experiment):
        models.append(weakref.ref(experiment.model))
        raise dinoseg.UserError("of the loop")

    monkeypatch.setattr(train_mode, "fit", fail)
    before = snapshot()
    with pytest.raises(dinoseg.UserError, match="^of the loop$"):
        dinoseg.train(None, "data=folder", **KEYS | {"mode": SHORT})
    assert snapshot() == before and len(models) == 1 and models[0]() is None


@pytest.mark.heavy
def test_threads_take_turns_and_give_the_same_weights(here):
    def train(name):
        return dinoseg.train(None, "data=folder", **KEYS | {"mode": SHORT}, out_dir=name)

    before = snapshot()
    with ThreadPoolExecutor(2) as pool:
        runs = [*pool.map(train, ("thread_1", "thread_2"))]
    assert snapshot() == before
    for run in runs:
        ours, theirs = tensors(run.folder, "last"), tensors(here / "typed", "last")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
