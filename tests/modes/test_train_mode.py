"""What a training run leaves behind beside its checkpoints, and what these say of its settings."""

import logging
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import SMALL, call, succeed, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinoseg.data.classes.masks import MaskReader
from dinoseg.experiment.builder import Builder
from dinoseg.methods import images
from dinoseg.methods.images import ImageTraining
from dinoseg.methods.training import Training, next_commands
from dinoseg.report.log import RunLog, read_rows
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image


@pytest.fixture
def where(tmp_path):
    write_data(tmp_path / "data", val=6)
    return tmp_path


def train(where, *arguments):
    quiet = ("mode.metrics_only=true", "mode.report=false", f"hydra.run.dir={where}/run")
    return succeed(where, "mode=train", *SMALL, *quiet, *arguments)


@pytest.fixture
def start(where, monkeypatch):
    """Return a function that begins a training, ends it before its first step, and returns what it logged."""

    def stop(experiment):
        raise UserError("enough")

    def begin(*arguments):
        monkeypatch.setattr("dinoseg.modes.train.fit", stop)
        done = call(where, "mode=train", *SMALL, *arguments)
        assert done.status == 1 and "error: enough" in done.err, done.err
        return done.err

    return begin


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a training that writes and scores as little as it can, and what it printed."""
    where = tmp_path_factory.mktemp("finished")
    write_data(where / "data", val=6)
    few = ("trainer.val_images=2", "trainer.max_minutes=9", "mode.pictures=0", "logger=[]")
    return where, train(where, *few, "trainer.accumulate=2", "adapter=frozen", "engine.precision=fp32")


def test_progress_can_be_leafed_through(where):
    train(where, "mode.pictures=3", "trainer.val_every=1", "trainer.log_every=1")
    files = sorted(path.relative_to(where / "run/validation").as_posix() for path in where.rglob("run/validation/*/*"))
    assert files == [f"step_0000{step}/{name}.png" for step in (1, 2) for name in (0, 2, 5)]
    first = read_image(where / "run/validation/step_00001/0.png")
    assert first.shape == read_image(where / "run/validation/step_00002/0.png").shape
    board = EventAccumulator(str(where / "run/tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert tags["images"] == ["val/0", "val/2", "val/5"]
    assert {"train/accuracy", "train/miou", "val/iou/dark", "val/iou/bright", "final/miou"} <= set(tags["scalars"])
    settings = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(key in settings for key in (b"choices.head", b"optim.optimizer.lr", b"trainer.steps"))
    training = [row for row in read_rows(where / "run/metrics.jsonl") if "train/loss" in row]
    assert len(training) == 2 and all(0 <= row["train/miou"] <= 1 for row in training)


@pytest.mark.parametrize(
    "word", ["schedule.kind=unknown", "optimizer.layer_decay_rule=unknown", "optimizer.betas=[0.9]"]
)
def test_wrong_optimizers_are_refused_before_data_are_checked(where, word):
    done = call(where, "mode=train", *SMALL, f"optim.{word}")
    assert done.status == 1 and f"error: optim.{word}" in done.err and "Checking the data" not in done.err, done.err


@pytest.mark.parametrize("adapter", ["frozen", "full"])
def test_warmup_of_a_frozen_backbone_has_no_effect(start, adapter):
    output = start(f"adapter={adapter}", "optim.schedule.backbone_warmup=500")
    line = "optim.schedule.backbone_warmup=500 has no effect: the backbone is not trained. Set it to null, or choose"
    assert output.count("backbone_warmup") == 1 and (line in output) == (adapter == "frozen")
    assert ("The learning rate rises for" in output) == (adapter == "full")


def test_a_run_logs_its_setup_and_prints_next_commands(finished):
    where, done = finished
    lines = [line.partition(" INFO ")[2] for line in done.err.splitlines()]
    start = lines.index("device:      cpu, precision fp32")
    assert re.fullmatch(r"parameters:  [\d,]+ trained, [\d,]+ in total", lines[start + 2])
    del lines[start + 2]
    assert lines[start + 1 : start + 5] == [
        "model:       backbone=tiny adapter=frozen head=linear",
        "training:    2 steps, batch of 2 images, 2 batches per step",
        "data:        4 training and 2 validation images",
        f"run folder:  {where}/run",
    ]
    assert done.out.splitlines()[-5:] == [
        "next:",
        f"  python -m dinoseg mode=eval resume={where}/run",
        f"  python -m dinoseg mode=predict resume={where}/run input=PATH",
        f"  python -m dinoseg mode=export resume={where}/run export=onnx",
        "data advice:  mode=doctor with the same data settings",
    ]
    assert "scored on:    2 of 6 validation images (trainer.val_images); mode=eval scores all" in done.out
    assert not (where / "run/validation").exists() and not (where / "run/tensorboard").exists()
    assert "TensorBoard" not in done.out and (where / "run/metrics.jsonl").exists()


def test_next_commands_after_training_on_clips():
    assert next_commands(Path("runs/a b"), [], on_clips=True) == [
        "next:",
        "  python -m dinoseg mode=eval 'resume=runs/a b'",
        "  python -m dinoseg mode=track 'resume=runs/a b' input=VIDEO",
    ]


def test_next_commands_name_the_folders_of_own_parts(where, tmp_path):
    folders = [tmp_path / name for name in ("my parts", "it's, more")]
    for number, folder in enumerate(folders):
        (folder / "loss").mkdir(parents=True)
        (folder / "loss" / f"mine_{number}.yaml").write_text("defaults: [cross_entropy]\n")
    line = next_commands(where / "run", [*map(str, folders)], on_clips=False)[1]
    words = shlex.split(line)[5:]  # after the mode and the run
    assert words[-2:] == ["--config-dir", str(folders[0])]
    for option in ("mine_0", "mine_1"):
        succeed(where, "mode=train", f"loss={option}", "--cfg", "job", *words)


def test_missing_best_checkpoint_is_not_replaced_by_the_last(finished):
    where, _ = finished
    shutil.copytree(where / "run/checkpoints", where / "without/checkpoints")
    (where / "without/checkpoints/best.safetensors").unlink()
    done = call(where, "mode=train", "resume=without")
    assert done.status == 1 and "best.safetensors: file not found" in done.err


def test_finished_run_stays_with_another_inference(finished):
    where, _ = finished
    best = (where / "run/checkpoints/best.safetensors").read_bytes()
    done = call(where, "mode=train", "resume=run", "inference=windows", "inference.size=16")
    assert done.status == 1 and "without a validation by these settings" in done.err and "mode=eval" in done.err
    assert (where / "run/checkpoints/best.safetensors").read_bytes() == best


@pytest.mark.parametrize(
    ("matrix", "told"),
    [([[90, 0], [10, 0]], True), pytest.param([[89, 1], [1, 9]], False, marks=pytest.mark.heavy)],
)
def test_score_no_better_than_a_constant_is_reported(where, monkeypatch, matrix, told):
    known = {"matrix": matrix, "miou": 0.45 if told else 0.9, "accuracy": 0.9}
    monkeypatch.setattr(images, "evaluate_images", lambda *_, **__: known)
    done = train(where, "trainer.steps=1")
    warned = "mIoU 0.4500 is not better than the 0.4500 of always predicting dark, the most frequent class" in done.err
    assert warned == told and done.err.count("not better than") == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("loss=mask_classification",),
            "needs masks, and head=linear with task=semantic provides class scores alone. Choose head=eomt",
        ),
        (
            ("hparam=instance", "head=linear", "data=folder_instances", "data.background=dark"),
            "LinearHead predicts no masks, which a task of objects needs",
        ),
        (("head=mask2former_meta", "loss=mask_classification"), "head.weights is not set"),
        (("data.root=.", "trainer.steps=0"), "trainer.steps=0 is out of range"),
    ],
    ids=["loss", "task", "head's weights", "length"],
)
def test_head_is_checked_before_weights_are_downloaded(where, words, message):
    done = call(where, "mode=train", *SMALL, "backbone.weights=org/unavailable", *words)
    assert done.status == 1 and message in done.err, done.err


def test_a_start_reads_each_mask_once_and_builds_one_outline(where, start, monkeypatch):
    read, outlined = [], []
    real_read, real_outline = MaskReader.read, Builder.outline
    monkeypatch.setattr(MaskReader, "read", lambda self, source: read.append(source) or real_read(self, source))
    monkeypatch.setattr(Builder, "outline", lambda build: outlined.append(build) or real_outline(build))
    gone = call(where, "mode=train", *SMALL, "backbone.weights=gone.safetensors")
    assert gone.status == 1 and "gone.safetensors" in gone.err and not read
    log = start("loss.weights=median", "data.workers=1", f"cache_dir={where}/c")
    assert list(where.rglob("scan_*")) and re.search(r"loss.weights=median: dark \d\.\d{3}, bright \d\.\d{3}\n", log)
    assert len(outlined) == 1 and sorted(where / path for path in read) == sorted(where.glob("data/*/masks/*.png"))


KEPT = {"engine.cache": "disk", "features.dtype": "float16"}


@pytest.fixture
def note_settings(caplog):
    """Return a function that records the choices of a resumed run, and returns them and the warnings."""

    def note(before, precision="fp32", kept=KEPT):
        checkpoints, engine = SimpleNamespace(info={}), SimpleNamespace(precision=precision)
        training = SimpleNamespace(
            previous_choices=(before or {}).get("engine", {}), engine=engine, checkpoints=checkpoints
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Training.record_choices(training, kept)
        return checkpoints.info, caplog.messages

    return note


def test_changed_settings_are_reported_on_resume(note_settings):
    first, told = note_settings(None)
    assert first == {"engine": {"engine.precision": "fp32", **KEPT}} and not told
    assert note_settings(first)[1] == [] == note_settings({})[1]
    assert note_settings(first, kept={**KEPT, "engine.cache": "memory"})[1] == []  # the same numbers
    (told,) = note_settings(first, "bf16")[1]
    assert "engine.precision was fp32 and is bf16. Set the earlier" in told and "features" not in told
    then, (told,) = note_settings(first, "bf16", kept={})
    assert "; features.dtype was float16 and is null. Set the earlier" in told
    assert then["engine"]["engine.cache"] == "off" and "was null and is float16" in note_settings(then)[1][0]
    whole = {**KEPT, "features.dtype": "float32"}
    assert note_settings({"engine": KEPT | {"features.dtype": None}}, kept=whole)[1] == []
    assert note_settings({"engine": KEPT | {"teacher": "a"}})[1] == []  # no student
    assert "teacher was a and is b" in note_settings({"engine": {"teacher": "a"}}, kept={**KEPT, "teacher": "b"})[1][0]


def test_log_of_a_resumed_run_continues_at_its_step(compose, tmp_path):
    with RunLog(tmp_path) as log:
        for step in (2, 4):
            log.scalars(step, {"train/loss": 1.0})
            log.scalars(step, {"val/miou": 0.5})
    training = ImageTraining(Builder(compose("mode=train", "logger=[]", "data.root=none", "data.classes=[a,b]")))
    training.start = SimpleNamespace(info={"progress": {"step": 2, "validation_pending": True}})
    training.out_dir, training.engine = tmp_path, SimpleNamespace(is_main=True)
    training.open_log().close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 2, "train/loss": 1.0}]


def test_end_of_a_run_is_logged_before_the_log_closes(tmp_path):
    calls = []
    log = SimpleNamespace(scores=calls.append, checkpoint=calls.append, close=lambda: calls.append("close"), views=[])
    checkpoints = SimpleNamespace(best=tmp_path / "best.safetensors")
    training = SimpleNamespace(checkpoints=checkpoints, skipped={}, out_dir=tmp_path)
    Training.finish_log(training, log, {"miou": 0.5})
    assert calls == [{"miou": 0.5}, checkpoints.best, "close"]
