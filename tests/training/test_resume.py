"""A run that was killed goes on as if nothing had happened: the same bytes, also on ranks that others start."""

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
from command_line import SMALL, call
from small_trainings import values_of, without_timings

from dinoseg.training import checkpoint
from dinoseg.training.optim import schedule
from dinoseg.utils.images import write_png

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 7), ("val", 3)):
        for number in range(count):
            pixels = {"images": draw.integers(0, 256, (30, 44, 3)), "masks": draw.integers(0, 3, (30, 44))}
            for kind, values in pixels.items():
                write_png(folder / split / kind / f"{number}.png", values.astype(np.uint8))
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
        *("mode=train", *SMALL, f"data.root={data}", "adapter=lora", "adapter.rank=2", "data.classes=[a,b,c]"),
        *("data.batch_size=3", "resolution.crop=[24,32]", "head=mlp", "loss.weights=inverse"),
        *("trainer.steps=20", "trainer.val_every=8", "trainer.save_every=7", "trainer.log_every=1", "trainer.ema=0.9"),
        *("trainer.accumulate=2", "mode.metrics_only=true", f"engine.workers={workers}", *overrides),
    ]


def evaluate(run):
    return ["mode=eval", f"resume={run}", "engine=cpu", "engine.workers=0"]


def run_checked(where, *arguments):
    done = call(where, *arguments)
    assert done.status == 0, done.err


def newest(where: Path, kind="train") -> Path:
    return max((where / "outputs/base").glob(f"{kind}_*"), key=lambda path: path.stat().st_mtime)


def rows_of(folder: Path) -> list[dict]:
    return without_timings(map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))


def scores(folder: Path) -> str:
    return (folder / "evaluation/scores.json").read_text()


def kill_at(where: Path, step: int, *arguments) -> Path:
    """Start a run, and kill it with SIGKILL once `last` stands at `step`; return its folder."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-m", "dinoseg", *arguments], cwd=where, **silent)
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
@pytest.mark.parametrize("words", [(), ("hydra.run.dir=outputs/base/train_mine",)])
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(data, whole, tmp_path, words):
    """Kill a run with two loading processes, and resume it without any."""
    folder = kill_at(tmp_path, 7, *train(data, *words, workers=2))
    stood_at = checkpoint.read(folder / "checkpoints/last.safetensors").info["progress"]["step"]
    assert 7 <= stood_at < 20
    run_checked(tmp_path, *train(data, *words, "resume=auto"))
    assert len(list((tmp_path / "outputs/base").glob("train_*"))) == 1, "it goes on in its own folder"
    first, second = rows_of(whole), rows_of(folder)
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


@contextmanager
def files_of_at_most(size):
    """Let writing fail beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.heavy
def test_a_full_disk_keeps_the_old_checkpoint(data, copy, tmp_path):
    last = copy / "checkpoints/last.safetensors"
    before = last.read_bytes()
    longer = train(data, "trainer.steps=23", "trainer.save_every=1", f"resume={copy}")
    with files_of_at_most(len(before) // 2):
        failed = call(tmp_path, *longer)
    assert failed.status == 1 and "Traceback" not in failed.err
    assert "could not be written" in failed.err and "MiB are free" in failed.err
    assert last.read_bytes() == before
    assert not list(copy.glob("checkpoints/.*"))
    run_checked(tmp_path, *longer)
    assert checkpoint.describe(last)["progress"]["step"] == 23


def test_a_non_finite_loss_stops_and_names_step_and_samples(data, tmp_path):
    words = ("optim.optimizer.lr=100", "optim.optimizer.weight_decay=1e12", "optim.schedule.kind=constant")
    broken = call(tmp_path, *train(data, *words))
    assert broken.status == 1 and "Traceback" not in broken.err
    assert "Step " in broken.err and "The samples were " in broken.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("head=linear", "was trained with head=mlp", marks=pytest.mark.heavy),
        ("backbone.arch.hidden_size=48", "belongs to another model"),
        pytest.param("trainer.ema=null", "Set trainer.ema as in that run", marks=pytest.mark.heavy),
    ],
)
def test_resume_refuses_another_model(data, copy, tmp_path, override, message):
    refused = call(tmp_path, *train(data, override, "trainer.steps=23", f"resume={copy}"))
    assert refused.status == 1 and message in refused.err and "Traceback" not in refused.err, refused.err
    assert len(list(copy.glob("checkpoints/*"))) == 2


def light(words):
    """Return the words of a training without what takes each process long to import, and without accumulation."""
    return [*(word for word in words if not word.startswith("adapter")), "adapter=full", "trainer.accumulate=1"]


@pytest.mark.heavy
def test_tasks_of_slurm_train_together(data, tmp_path):
    """As srun starts them, each with a name of its own for the folder; weights shared out, 3 images to validate."""
    words = ("data.batch_size=4", "trainer.steps=2", "engine.sharding=fsdp", "hydra.run.dir=run_${oc.env:SLURM_PROCID}")
    command = [sys.executable, "-m", "dinoseg", *light(train(data, *words))]
    step = {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    step["SLURM_JOB_ID"] = str(os.getpid())
    tasks = []
    for rank in ("0", "1"):
        env = os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        tasks.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
    errors = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert [path.name for path in tmp_path.iterdir() if path.name != "outputs"] == ["run_0"]
    assert checkpoint.describe(tmp_path / "run_0/checkpoints/last.safetensors")["progress"]["step"] == 2


def rank_processes(parent: int, number: int) -> list[int]:
    """Return the processes below `parent` that are rank `number`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            names = (path / "environ").read_text().split("\0")
            below = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except (OSError, IndexError):
            continue
        found += [int(path.name)] * (below and f"RANK={number}" in names)
    return found


def kill_rank(agent, last: Path, step: int):
    """Kill rank 1 of torchrun with SIGKILL once `last` stands at `step`."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and checkpoint.describe(last)["progress"]["step"] < step:
        time.sleep(0.01)
    for process in rank_processes(agent.pid, 1):
        os.kill(process, signal.SIGKILL)


@pytest.mark.heavy
def test_torchrun_restarts_killed_ranks_which_resume_a_run(data, tmp_path):
    words = ("data.batch_size=4", "trainer.save_every=1", "trainer.val_every=60", "optim.schedule.warmup=0")
    words = light(train(data, *words, "resume=auto", "hydra.run.dir=run"))
    run_checked(tmp_path, *words, "trainer.steps=2")
    run = tmp_path / "run"
    pipes = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    first = rows_of(run)
    last = run / "checkpoints/last.safetensors"
    command = [*TORCHRUN, "--max-restarts=1", "-m", "dinoseg", *words, "trainer.steps=40"]
    with subprocess.Popen(command, **pipes, text=True) as agent:
        kill_rank(agent, last, 4)
        errors = agent.communicate(timeout=600)[1]
    assert agent.returncode == 0 and errors.count("resuming") >= 2, errors
    assert checkpoint.describe(last)["progress"]["step"] == 40
    rows = rows_of(run)
    assert rows[: len(first)] == first
    expected = [1e-3 * schedule(warmup=0)(step, 40) for step in range(2, 40)]
    assert values_of(rows[len(first) :], "train/lr") == pytest.approx(expected), "two ranks, one schedule"
    done = subprocess.run([*TORCHRUN, "-m", "dinoseg", *evaluate(run)], **pipes, text=True)
    assert done.returncode == 0, done.stderr
    written = list((tmp_path / "outputs/base").glob("eval_*/scores.json"))
    assert len(written) == 1 and written[0].read_text() == scores(run), "ranks score the same"
    run_checked(tmp_path, *evaluate(run), "mode.metrics_only=true")
    assert (newest(tmp_path, "eval") / "scores.json").read_text() == scores(run)
