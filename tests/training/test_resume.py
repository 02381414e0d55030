"""A run that was killed goes on as if nothing had happened: the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoseg.training import checkpoint
from dinoseg.training.optim import schedule

SMALL = [
    "backbone=tiny",
    "backbone.patch_size=8",
    "backbone.arch.hidden_size=24",
    "backbone.arch.num_hidden_layers=2",
    "backbone.arch.num_attention_heads=3",
    "backbone.arch.intermediate_size=48",
]


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for number in range(count):
            for kind, pixels in (
                ("images", draw.integers(0, 256, (30, 44, 3))),
                ("masks", draw.integers(0, 3, (30, 44))),
            ):
                folder = tmp_path / "data" / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


def command(data, *overrides, workers=0, lora=True):
    adapter = ("adapter=lora", "adapter.rank=2") if lora else ()
    return [
        *(sys.executable, "-m", "dinoseg", "mode=train", "data=folder", f"data.root={data}"),
        *("data.classes=[a,b,c]", "data.batch_size=3", "resolution.crop=[24,32]", "engine=cpu"),
        *adapter,
        *("head=mlp", "loss.weights=inverse", f"engine.workers={workers}"),
        *("trainer.steps=20", "trainer.val_every=8", "trainer.save_every=7", "trainer.log_every=1", "trainer.ema=0.9"),
        *("trainer.accumulate=2", "mode.metrics_only=true", *SMALL, *overrides),
    ]


def run(where: Path, *arguments, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments, **kwargs), cwd=where, env=environment, capture_output=True, text=True)


def newest(where: Path, kind="train") -> Path:
    return max((where / "outputs/base").glob(f"{kind}_*"), key=lambda path: path.stat().st_mtime)


def untimed(path: Path) -> list[dict]:
    """Return the rows without what tells of the machine."""
    timed = {"train/images_per_s", "train/data_wait", "train/memory_gib"}
    rows = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def scores(folder: Path) -> str:
    return (folder / "evaluation/scores.json").read_text()


def kill_at(where: Path, step: int, *arguments, **kwargs) -> Path:
    """Start a run, and kill it with SIGKILL once `last` stands at `step`; return its folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*arguments, **kwargs),
        cwd=where,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list((where / "outputs/base").glob("train_*/checkpoints/last.safetensors"))
        if found and checkpoint.read(found[0]).info["progress"]["step"] >= step:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    return newest(where)


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    done = run(whole, data)
    assert done.returncode == 0, done.stderr
    folder = kill_at(cut, 7, data, workers=2)
    stood_at = checkpoint.read(folder / "checkpoints/last.safetensors").info["progress"]["step"]
    assert 7 <= stood_at < 20
    resumed = run(cut, data, "resume=auto", workers=1)
    assert resumed.returncode == 0, resumed.stderr
    assert len(list((cut / "outputs/base").glob("train_*"))) == 1, "it goes on in its own folder"
    for name in ("last", "best"):
        first, second = (checkpoint.read(path / f"checkpoints/{name}.safetensors") for path in (newest(whole), folder))
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
        assert first.info["progress"] == second.info["progress"]
    assert scores(newest(whole)) == scores(folder)
    first, second = (untimed(path) for path in (newest(whole) / "metrics.jsonl", folder / "metrics.jsonl"))
    assert first == second and sum("train/miou" in row for row in first) == 20


def test_evaluation_after_training_is_mode_eval_on_its_checkpoint(data, tmp_path):
    assert run(tmp_path, data, "trainer.steps=4", "trainer.ema=null").returncode == 0
    folder = newest(tmp_path)
    evaluated = subprocess.run(
        [sys.executable, "-m", "dinoseg", "mode=eval", f"resume={folder}", "engine=cpu", "engine.workers=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert (newest(tmp_path, "eval") / "scores.json").read_text() == scores(folder)
    pictures = sorted(path.name for path in newest(tmp_path, "eval").glob("predictions/**/*.png"))
    assert pictures == sorted(f"{n}_{kind}.png" for n in range(3) for kind in ("pred", "vis"))


def test_two_ranks_score_as_one_in_one_folder(data, tmp_path):
    assert run(tmp_path, data, "trainer.steps=2", "trainer.ema=null").returncode == 0
    folder = newest(tmp_path)
    both = [
        *(sys.executable, "-m", "dinoseg", "mode=eval", f"resume={folder}", "engine=cpu", "engine.workers=0"),
        *("engine.devices=2", "mode.metrics_only=true"),
    ]
    evaluated = subprocess.run(both, cwd=tmp_path, capture_output=True, text=True)
    assert evaluated.returncode == 0, evaluated.stderr
    runs = list((tmp_path / "outputs/base").glob("eval_*"))
    assert len(runs) == 1 and (runs[0] / "scores.json").read_text() == scores(folder)


def test_ranks_of_torchrun_are_joined(data, tmp_path):
    assert run(tmp_path, data, "trainer.steps=2", "trainer.ema=null").returncode == 0
    folder = newest(tmp_path)
    joined = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"),
        *("-m", "dinoseg", "mode=eval", f"resume={folder}", "engine=cpu", "engine.workers=0", "mode.metrics_only=true"),
    ]
    evaluated = subprocess.run(joined, cwd=tmp_path, capture_output=True, text=True)
    assert evaluated.returncode == 0, evaluated.stderr
    written = list((tmp_path / "outputs/base").glob("eval_*/scores.json"))
    assert len(written) == 1 and written[0].read_text() == scores(folder)


def test_two_ranks_train_in_one_folder_and_resume(data, tmp_path):
    arguments = (data, "engine.devices=2", "data.batch_size=4", "trainer.save_every=2", "trainer.steps=4")
    trained = run(tmp_path, *arguments)
    assert trained.returncode == 0, trained.stderr
    runs = list((tmp_path / "outputs/base").glob("train_*"))
    assert len(runs) == 1 and (runs[0] / "checkpoints/best.safetensors").is_file()
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    rates = [row["train/lr"] for row in map(json.loads, lines) if "train/lr" in row]
    assert rates == pytest.approx([1e-3 * schedule()(step, 4) for step in range(4)]), "two ranks, one schedule"
    longer = run(tmp_path, *arguments, "trainer.steps=6", f"resume={runs[0]}")
    assert longer.returncode == 0, longer.stderr
    assert checkpoint.read(runs[0] / "checkpoints/last.safetensors").info["progress"]["step"] == 6


def test_two_ranks_train_as_one(data, tmp_path):
    """With ignored pixels and class weights, and with batches that differ in both."""
    mask = data / "train/masks/0.png"
    Image.fromarray(np.where(np.indices((30, 44))[1] < 30, 255, 1).astype(np.uint8)).save(mask)
    losses = []
    for devices in (1, 2):
        options = ("adapter=full", "data.batch_size=4", "trainer.steps=6", "trainer.ema=null", "engine.precision=fp32")
        where = tmp_path / str(devices)
        where.mkdir()
        trained = run(where, data, *options, f"engine.devices={devices}", lora=False)
        assert trained.returncode == 0, trained.stderr
        rows = map(json.loads, (newest(where) / "metrics.jsonl").read_text().splitlines())
        losses.append([value for row in rows for key, value in row.items() if key in ("train/loss", "val/loss")])
    assert len(losses[0]) == 7 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_full_disk_keeps_the_old_checkpoint(data, tmp_path):
    assert run(tmp_path, data, "trainer.steps=3", "trainer.save_every=1").returncode == 0
    folder = newest(tmp_path)
    last = folder / "checkpoints/last.safetensors"
    before = last.read_bytes()
    limited = (
        "import resource, sys; from dinoseg.__main__ import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, {len(before) // 2})); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); main()"
    )
    arguments = command(data, "trainer.steps=6", "trainer.save_every=1", f"resume={folder}")[3:]
    failed = subprocess.run([sys.executable, "-c", limited, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "could not be written" in failed.stderr and "MiB are free" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert last.read_bytes() == before
    assert not list(folder.glob("checkpoints/.*"))
    assert run(tmp_path, data, "trainer.steps=6", f"resume={folder}").returncode == 0


def test_a_non_finite_loss_stops_and_names_step_and_samples(data, tmp_path):
    broken = run(tmp_path, data, "optim.optimizer.lr=1e30", "trainer.clip=null", "optim.schedule.kind=constant")
    assert broken.returncode == 1
    assert "Step " in broken.stderr and "The samples were " in broken.stderr and "Traceback" not in broken.stderr


def test_resume_refuses_another_model(data, tmp_path):
    assert run(tmp_path, data, "trainer.steps=2").returncode == 0
    folder = newest(tmp_path)
    for override, message in (
        ("head=linear", "was trained with head=mlp"),
        ("backbone.arch.hidden_size=48", "made for another model"),
        ("data.classes=[a,b,c,d]", "in the same order"),
        ("trainer.ema=null", "Set it as it was"),
    ):
        refused = run(tmp_path, data, override, "trainer.steps=3", f"resume={folder}")
        assert refused.returncode == 1 and message in refused.stderr, (override, refused.stderr)
        assert "Traceback" not in refused.stderr
    assert len(list(folder.glob("checkpoints/*"))) == 2
