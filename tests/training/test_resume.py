"""A run that was killed goes on as if nothing had happened: the same bytes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call

from dinoseg.training import checkpoint
from dinoseg.training.optim import schedule
from dinoseg.utils.images import write_png

SMALL = [
    "backbone=tiny",
    "backbone.patch_size=8",
    "backbone.arch.hidden_size=24",
    "backbone.arch.num_hidden_layers=2",
    "backbone.arch.num_attention_heads=3",
    "backbone.arch.intermediate_size=48",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 7), ("val", 3)):
        for number in range(count):
            for kind, pixels in (
                ("images", draw.integers(0, 256, (30, 44, 3))),
                ("masks", draw.integers(0, 3, (30, 44))),
            ):
                write_png(folder / split / kind / f"{number}.png", pixels.astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return the run folder of a training of 20 steps."""
    where = tmp_path_factory.mktemp("whole")
    run_checked(where, *train(data))
    return newest(where)


@pytest.fixture
def copy(whole, tmp_path):
    """Return a copy of that run folder."""
    return Path(shutil.copytree(whole, tmp_path / "outputs/base/train_copy"))


def train(data, *overrides, workers=0):
    return [
        *("mode=train", "data=folder", f"data.root={data}", "adapter=lora", "adapter.rank=2"),
        *("data.classes=[a,b,c]", "data.batch_size=3", "resolution.crop=[24,32]", "engine=cpu"),
        *("head=mlp", "loss.weights=inverse", f"engine.workers={workers}"),
        *("trainer.steps=20", "trainer.val_every=8", "trainer.save_every=7", "trainer.log_every=1", "trainer.ema=0.9"),
        *("trainer.accumulate=2", "mode.metrics_only=true", *SMALL, *overrides),
    ]


def evaluate(run):
    return ["mode=eval", f"resume={run}", "engine=cpu", "engine.workers=0"]


def run_checked(where, *arguments):
    done = call(where, *arguments)
    assert done.status == 0, done.err


def newest(where: Path, kind="train") -> Path:
    return max((where / "outputs/base").glob(f"{kind}_*"), key=lambda path: path.stat().st_mtime)


def without_timings(path: Path) -> list[dict]:
    """Return the rows without what tells of the machine."""
    timed = {"train/images_per_s", "train/data_wait", "train/memory_gib"}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def scores(folder: Path) -> str:
    return (folder / "evaluation/scores.json").read_text()


def kill_at(where: Path, step: int, *arguments) -> Path:
    """Start a run, and kill it with SIGKILL once `last` stands at `step`; return its folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dinoseg", *arguments],
        cwd=where,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        found = list((where / "outputs/base").glob("train_*/checkpoints/last.safetensors"))
        if found and checkpoint.read(found[0]).info["progress"]["step"] >= step:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    return newest(where)


@pytest.mark.heavy
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(data, whole, tmp_path):
    """Kill a run with two loading processes, and resume it without any."""
    folder = kill_at(tmp_path, 7, *train(data, workers=2))
    stood_at = checkpoint.read(folder / "checkpoints/last.safetensors").info["progress"]["step"]
    assert 7 <= stood_at < 20
    run_checked(tmp_path, *train(data, "resume=auto"))
    assert len(list((tmp_path / "outputs/base").glob("train_*"))) == 1, "it goes on in its own folder"
    first, second = (without_timings(path / "metrics.jsonl") for path in (whole, folder))
    odd = next((pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]), None)
    assert odd is None and sum("train/miou" in row for row in first) == 20
    for name in ("last", "best"):
        one, other = (checkpoint.read(path / f"checkpoints/{name}.safetensors") for path in (whole, folder))
        assert one.tensors.keys() == other.tensors.keys()
        assert not [key for key in one.tensors if not torch.equal(one.tensors[key], other.tensors[key])]
        assert one.info["progress"] == other.info["progress"]
    assert scores(whole) == scores(folder)


def test_evaluation_after_training_equals_mode_eval(whole, tmp_path):
    run_checked(tmp_path, *evaluate(whole))
    assert (newest(tmp_path, "eval") / "scores.json").read_text() == scores(whole)
    pictures = sorted(path.name for path in newest(tmp_path, "eval").glob("predictions/**/*.png"))
    assert pictures == sorted(f"{n}_{kind}.png" for n in range(3) for kind in ("pred", "vis"))


@pytest.mark.heavy
def test_torchrun_ranks_resume_a_single_run_and_score_the_same(data, tmp_path):
    arguments = ("data.batch_size=4", "trainer.save_every=2", "optim.schedule.warmup=0")
    run_checked(tmp_path, *train(data, *arguments, "trainer.steps=2"))
    run = newest(tmp_path)
    first = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [*launcher, "-m", "dinoseg", *train(data, *arguments, "trainer.steps=6", f"resume={run}")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "outputs/base").glob("train_*")) == [run]
    assert checkpoint.read(run / "checkpoints/last.safetensors").info["progress"]["step"] == 6
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[: len(first)]] == first
    rates = [row["train/lr"] for row in map(json.loads, lines[len(first) :]) if "train/lr" in row]
    expected = [1e-3 * schedule(warmup=0)(step, 6) for step in range(2, 6)]
    assert rates == pytest.approx(expected), "two ranks, one schedule"
    done = subprocess.run([*launcher, "-m", "dinoseg", *evaluate(run)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = list((tmp_path / "outputs/base").glob("eval_*/scores.json"))
    assert len(written) == 1 and written[0].read_text() == scores(run)
    run_checked(tmp_path, *evaluate(run), "mode.metrics_only=true")
    assert (newest(tmp_path, "eval") / "scores.json").read_text() == scores(run)


@contextmanager
def files_of_at_most(size):
    """Let writing fail beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_old_checkpoint(data, copy, tmp_path):
    last = copy / "checkpoints/last.safetensors"
    before = last.read_bytes()
    longer = train(data, "trainer.steps=23", "trainer.save_every=1", f"resume={copy}")
    with files_of_at_most(len(before) // 2):
        failed = call(tmp_path, *longer)
    assert failed.status == 1
    assert "could not be written" in failed.err and "MiB are free" in failed.err
    assert "Traceback" not in failed.err
    assert last.read_bytes() == before
    assert not list(copy.glob("checkpoints/.*"))
    run_checked(tmp_path, *longer)
    assert checkpoint.describe(last)["progress"]["step"] == 23


def test_a_non_finite_loss_stops_and_names_step_and_samples(data, tmp_path):
    words = ("optim.optimizer.lr=100", "optim.optimizer.weight_decay=1e12", "optim.schedule.kind=constant")
    broken = call(tmp_path, *train(data, *words))
    assert broken.status == 1
    assert "Step " in broken.err and "The samples were " in broken.err and "Traceback" not in broken.err


def test_resume_refuses_another_model(data, copy, tmp_path):
    for override, message in (
        ("head=linear", "was trained with head=mlp"),
        ("backbone.arch.hidden_size=48", "belongs to another model"),
        ("trainer.ema=null", "Set it to the saved value"),
    ):
        refused = call(tmp_path, *train(data, override, "trainer.steps=23", f"resume={copy}"))
        assert refused.status == 1 and message in refused.err, (override, refused.err)
        assert "Traceback" not in refused.err
    assert len(list(copy.glob("checkpoints/*"))) == 2
