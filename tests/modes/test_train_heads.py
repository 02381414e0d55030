"""Several heads in one run: one pass and one log, and for each head a best checkpoint as of a run of its own."""

import csv
import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from command_line import SMALL, call, write_data
from failing import fail_after
from mistakes import assert_refused

from dinoseg.api.runs import Run
from dinoseg.evaluation.image_report import _training
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.heads import named_heads
from dinoseg.experiment.models import build_multi_head
from dinoseg.models.heads.cnn import CnnHead
from dinoseg.modes import train_heads
from dinoseg.report.log import read_rows
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.multi_head import MultiHeadDataModule, MultiHeadSegmenter

WORDS = (
    *("mode=train", *(word for word in SMALL if not word.startswith(("adapter=", "trainer.steps="))), "adapter=frozen"),
    *("engine.precision=fp32", "mode.metrics_only=true", "mode.report=false", "mode.pictures=1"),
    *("trainer.steps=7", "trainer.val_every=2", "trainer.save_every=3", "trainer.log_every=1", "trainer.accumulate=2"),
    *("trainer.clip=0.05", "trainer.ema=0.9"),
)
WIDE = "{head: cnn, channels: 16, dropout: 0.0, name: wide, lr: 3e-2}"  # nothing random: it equals its own run
HEADS = f"heads=[linear,{WIDE},{{head: linear, layers: [0], name: early}}]"
MANY = (*WORDS, "trainer=multi_head", HEADS)
REPORTED = [word for word in MANY if not word.startswith(("mode.report", "trainer.steps"))]
NAMES = ("linear", "wide", "early")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("many")
    write_data(where / "data", train=5, val=3)
    return where


@pytest.fixture(scope="module")
def run(folder):
    """Train three heads at once; return the command's end, its folder, and the images of each pass of the backbone."""
    passes, frozen = [], MultiHeadSegmenter.frozen

    def count_images(model, images, **options):
        passes.append(len(images))
        return frozen(model, images, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MultiHeadSegmenter, "frozen", count_images)
        done = call(folder, *MANY, "hydra.run.dir=many")
    assert done.status == 0, done.err
    return SimpleNamespace(done=done, path=folder / "many", passes=passes)


def rows(path):
    """Return the log without what tells of the machine."""
    timed = {"train/images_per_s", "train/data_wait", "train/memory_gib"}
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same(first, second):
    """Compare two run folders of a head: best weights, description and scores."""
    one, other = (checkpoint.read(path / "checkpoints/best.safetensors") for path in (first, second))
    assert one.tensors.keys() == other.tensors.keys()
    assert {**one.info, "progress": None} == {**other.info, "progress": None}
    torch.testing.assert_close(one.tensors, other.tensors, rtol=1e-5, atol=1e-5)
    assert one.info["progress"] == pytest.approx(other.info["progress"], rel=1e-5)
    mine, its = (json.loads((path / "evaluation/scores.json").read_text()) for path in (first, second))
    assert mine["miou"] == pytest.approx(its["miou"], abs=1e-5)


def step_of(path):
    """Return the step of a run's last checkpoint."""
    return checkpoint.describe(path / "checkpoints/last.safetensors")["progress"]["step"]


@pytest.mark.parametrize("name", ["early", *(pytest.param(name, marks=pytest.mark.heavy) for name in NAMES[:2])])
def test_each_head_is_its_own_run(folder, run, name):
    words = (run.path / "heads" / name / "config/overrides.txt").read_text().split("\n")
    assert "engine.cache=off" in words, "cached features are rounded"
    done = call(folder, *filter(None, words), f"hydra.run.dir=alone_{name}")
    assert done.status == 0, done.err
    own, alone = run.path / "heads" / name, folder / f"alone_{name}"
    assert_same(own, alone)
    files = {"checkpoints", "config", "cost.json", "curves.png", "evaluation", "run.log", "split.json"}
    assert {path.name for path in own.iterdir()} == files
    of_head = [row for row in rows(run.path) if f"val/{name}/miou" in row]
    for mine, its in zip(of_head, (row for row in rows(alone) if "val/miou" in row), strict=True):
        for key in ("val/miou", "val/loss", "val/accuracy"):
            assert mine[key.replace("val/", f"val/{name}/")] == pytest.approx(its[key], rel=1e-4, abs=1e-5)


def test_one_pass_of_the_backbone_logs_the_values_of_each_head(run):
    validations = 4
    assert step_of(run.path) == 7 and len(run.passes) == 2 * 7 + 3 * validations
    trained = next(row for row in rows(run.path) if "train/loss" in row)
    scored = next(row for row in rows(run.path) if "val/miou" in row)
    for name in NAMES:
        assert f"train/{name}/loss" in trained and {f"val/{name}/miou", f"val/{name}/loss"} <= scored.keys()
    assert scored["val/miou"] == max(scored[f"val/{name}/miou"] for name in NAMES)
    assert [path.name for path in (run.path / "validation/step_00002").iterdir()]


def test_best_head_is_listed_first(run):
    with open(run.path / "leaderboard.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    best = [float(row["val_miou"]) for row in table]
    assert {row["head"] for row in table} == {*NAMES} and best == sorted(best, reverse=True)
    for row in table:
        scores = json.loads((run.path / "heads" / row["head"] / "evaluation/scores.json").read_text())
        assert float(row["miou"]) == scores["miou"] and int(row["parameters"]) > 0
    assert all(f"\nhead {name}, best checkpoint (step " in run.done.out for name in NAMES)
    rates = {row["head"]: float(row["learning_rate"]) for row in table}
    assert rates == {"linear": 1e-2, "wide": 3e-2, "early": 1e-2}
    assert " adapter=frozen 3 heads\n" in run.done.err and "batch of 2 images, 2 batches per step\n" in run.done.err
    first = table[0]["head"]
    assert f"\n{first} " in run.done.out and f"mode=eval resume={run.path}/heads/{first}" in run.done.out


def test_a_head_is_used_as_any_run_and_the_whole_is_not(folder, run):
    words = ("mode=eval", "engine=cpu", "engine.workers=0", "engine.precision=fp32", "mode.report=false")
    done = call(folder, *words, f"resume={run.path}/heads/wide", "hydra.run.dir=scored")
    assert done.status == 0, done.err
    known = (run.path / "heads/wide/evaluation/scores.json").read_text()
    assert (folder / "scored/scores.json").read_text() == known
    done = call(folder, *words, f"resume={run.path}")
    assert done.status == 1 and f"early, linear, wide). Give one of them: resume={run.path}/heads/early" in done.err


@pytest.mark.heavy
def test_reports_are_those_of_each_head(folder, run):
    where = folder / "reported"
    shutil.copytree(run.path, where)
    done = call(folder, *REPORTED, "resume=auto", "trainer.steps=8", f"hydra.run.dir={where}")
    assert done.status == 0, done.err
    page = (where / "heads/wide/evaluation/report.html").read_text(encoding="utf-8")
    assert "adapter=frozen head=cnn" in page and "dinoseg.models.heads.cnn.CnnHead" in page
    assert "has no metrics.jsonl" not in page and "train/loss" not in page
    assert re.findall(r"python -m dinoseg .*trainer.steps=(\d)", page) == ["7", "8"]
    whole = read_rows(where / "metrics.jsonl")
    for rows in (_training(where / "heads/wide"), Run(where).heads["wide"]._rows):
        assert [row.get("val/miou") for row in rows] == [row.get("val/wide/miou") for row in whole]
        assert [row.get("train/loss") for row in rows] == [row.get("train/wide/loss") for row in whole]


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "number"), [("killed", 1), ("killed", 3), ("fails", 4)])
def test_run_resumes_with_all_heads_at_one_step(folder, run, monkeypatch, kind, number):
    where = f"{kind}_{number}"
    with monkeypatch.context() as patched:
        if kind == "killed":  # by what no handler sees, before a save
            fail_after(patched, Checkpointer, "save", number - 1, SystemExit(9))
        else:
            fail_after(patched, MultiHeadDataModule, "tally", number - 1, OSError("truncated"))
        with pytest.raises(OSError) if kind == "fails" else nullcontext():
            assert call(folder, *MANY, f"hydra.run.dir={where}/base/train_x").status == 9
    path = folder / where / "base/train_x"
    if number == 1:
        assert not (path / "checkpoints/last.safetensors").exists()
        return
    assert step_of(path) == 3
    done = call(folder, *MANY, "resume=auto", f"hydra.run.dir={where}/base/train_x")
    assert done.status == 0, done.err
    resumed, whole = (checkpoint.read(each / "checkpoints/last.safetensors") for each in (path, run.path))
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert resumed.info["heads"] == whole.info["heads"] and resumed.info["progress"] == whole.info["progress"]
    assert rows(path) == rows(run.path)
    assert re.findall(r"resuming (.*)", done.err) == [f"{path}/checkpoints/last.safetensors at step 3 of 7"]
    for name in NAMES:
        assert_same(path / "heads" / name, run.path / "heads" / name)


def test_head_folder_cannot_be_resumed_and_is_unchanged(folder, run):
    files = [path for path in (run.path / "heads/linear").iterdir() if path.is_file() and path.name != "run.log"]
    before = {path.name: path.read_bytes() for path in files}
    done = call(folder, "mode=train", "resume=many/heads/linear", "trainer.steps=9")
    assert done.status == 1 and "holds no optimizer state" in done.err
    assert {name: (run.path / "heads/linear" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_scale": object}, "fp16 scales the loss of one head at a time. Set engine.precision=fp32"),
        ({"sharded": True}, "engine.sharding=fsdp is for one head at a time"),
        ({"cache": "disk"}, "engine.cache=disk is for one head at a time"),
    ],
)
def test_engines_for_one_head_train_no_several(options, message):
    engine = SimpleNamespace(**{"sharded": False, "cache": "off", "loss_scale": lambda: None, **options})
    task = SimpleNamespace(data_module=object.__new__(ImageDataModule))
    assert_refused(lambda: train_heads._check_task(None, task, engine), message)


def test_backbones_of_heads_update_no_statistics(compose):
    words = ("backbone=tiny", "adapter=frozen", "data.root=none", "data.classes=[a,b]")
    _, models = build_multi_head(
        [Builder(compose(*words, f"head={head}")) for head in ("linear", "mlp")], torch.device("cpu")
    )
    assert len(models) == 2 and not any(model.backbone.training for model in models)


def diverge_at_call(head, number):
    """Return a head's forward pass, of which that number of them in training gives no numbers."""
    calls, forward = [], head.forward

    def run(self, features):
        calls.append(1) if self.training else None
        return forward(self, features) * (torch.nan if len(calls) >= number else 1)

    return run


@pytest.mark.heavy
def test_a_head_that_diverges_leaves_alone(folder, run, monkeypatch):
    words = [word for word in MANY if word != HEADS]
    with monkeypatch.context() as patched:
        patched.setattr(CnnHead, "forward", diverge_at_call(CnnHead, 9))
        done = call(folder, *words, f"heads=[linear,{WIDE}]", "hydra.run.dir=left")
    assert done.status == 0, done.err
    note = "left the training at step 5, where its loss or gradient was not finite"
    assert done.err.count(f"wide: {note}. The other heads continue.") == 1
    assert_same(folder / "left/heads/linear", run.path / "heads/linear")
    with open(folder / "left/leaderboard.csv", encoding="utf-8", newline="") as file:
        table = {row["head"]: row for row in csv.DictReader(file)}
    assert table["wide"]["note"] == note and table["wide"]["miou"] and not table["linear"]["note"]
    # once it resumes, a head that had left stays out
    done = call(folder, "mode=train", "resume=left", "trainer.steps=9")
    assert done.status == 0, done.err
    assert step_of(folder / "left") == 9 and note in (folder / "left/leaderboard.csv").read_text()
    assert not [row for row in rows(folder / "left") if row["step"] > 4 and "val/wide/miou" in row]


def test_the_run_fails_once_all_heads_have_left(folder, monkeypatch):
    words = [word for word in MANY if word != HEADS]
    monkeypatch.setattr(CnnHead, "forward", diverge_at_call(CnnHead, 1))
    done = call(folder, *words, f"heads=[{WIDE}]", "hydra.run.dir=all_left")
    assert done.status == 1 and "Step 1: the loss is nan" in done.err


def test_heads_of_equal_names_are_refused_with_a_remedy():
    heads = ["cnn", {"head": "mlp", "name": "cnn"}]
    remedy = "[{head:cnn,name:first},{head:mlp,name:second}]"
    assert_refused(lambda: named_heads(heads, None), "cnn occurs more than once", remedy)


def test_shared_backbone_is_compiled_if_configured(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr("dinoseg.training.engine.compile_blocks", compiled.append)
    words = ("trainer=multi_head", "heads=[linear]", "engine.compile=true", "trainer.steps=1")
    done = call(folder, *WORDS, *words, "trainer.save_every=null", "hydra.run.dir=compiled")
    assert done.status == 0 and len(compiled) == 1, done.err


def test_other_heads_are_a_run_of_their_own(folder, run):
    done = call(folder, "mode=train", f"resume={run.path}", "trainer=multi_head", "heads=[linear]")
    assert done.status == 1 and "Leave both out, or train other heads in a new run" in done.err


@pytest.mark.heavy
def test_sweep_cells_of_many_heads_are_checked_before_training(folder):
    done = call(folder, *WORDS, "trainer=multi_head", "heads=[dpt],[linear]", "hydra.sweep.dir=swept", "-m")
    assert done.status == 1 and "1 of 2 cells of this sweep cannot run" in done.err and "quarters" in done.err
