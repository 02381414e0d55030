"""mode=plan foretells a training step and prints a command line that can be used as it is."""

import json
import math
import shlex
import shutil

import pytest
from command_line import SMALL, call, succeed, write_data
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto import fitting
from dinoseg.extensions.auto import plan_mode as planning
from dinoseg.extensions.auto.step_bytes import StepBytes

WORDS = [*SMALL[:2], *SMALL[3:], "data.root=my data", "engine.precision=fp32"]


def run_plan(where, *words, start=WORDS):
    """Plan a training in a folder of its own; return plan.json and what was printed."""
    folder = f"run_{len([*where.glob('run_*')])}"
    done = succeed(where, "mode=plan", *start, f"hydra.run.dir={folder}", *words)
    return json.loads((where / folder / "plan.json").read_text()), done.out


@pytest.fixture
def mebibytes(monkeypatch):
    """Let each sample of a step take 1 MiB."""
    monkeypatch.setattr(fitting, "step_bytes", lambda *_, samples, **__: StepBytes(*[0] * 7, peak=samples * 2**20))
    monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)


@pytest.mark.heavy
def test_fitting_config_is_planned_unchanged(tmp_path):
    found, out = run_plan(tmp_path, "mode.tflops=0.002")
    assert found["duration"]["flops"] > 1e6
    step = found["planned"]["step"]
    assert found["changes"] == [] and found["device"] == "cpu"
    assert found["as_it_is"]["need"] == found["planned"]["need"] >= step["peak"] > step["weights"] > 10_000
    assert "It fits into" in out
    assert [*shlex.split(found["command"])[:4], *WORDS] == shlex.split(found["command"])
    assert found["command"] in out and not (tmp_path / "my data").exists()
    assert "incl. fragmentation and code loaded in the first step" in out and "CUDA" not in out and "MiB" not in out


def test_hours_follow_from_operations_and_steps(tmp_path, mebibytes, monkeypatch):
    flops = 4_000_000
    monkeypatch.setattr(planning, "step_flops", lambda *_, **__: flops)
    found, out = run_plan(tmp_path, "mode.tflops=0.002", "trainer.steps=900")
    hours = found["duration"]["hours"]
    assert hours == pytest.approx(900 * flops / 2e9 / 3600) and found["duration"]["flops"] == flops
    assert f"{hours:.3g} h for 900 steps" in out and "0.002 TFLOP/s" in out
    found, _ = run_plan(tmp_path, "mode.tflops=0.002", "trainer.accumulate=3")
    assert found["duration"]["flops"] == 3 * flops
    by_epochs = ["trainer.epochs=2" if word.startswith("trainer.steps") else word for word in WORDS]
    found, out = run_plan(tmp_path, "mode.tflops=0.002", start=by_epochs)
    assert "set trainer.steps for the hours" in out and found["duration"] == {"flops": flops, "hours": None}
    assert run_plan(tmp_path)[0]["duration"] is None


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        ("mebibytes", ("mode.memory=392MiB",)),
        pytest.param(
            *("tmp_path", ("resolution.crop=[320,320]", "mode.device=cuda", "mode.memory=1.03GiB")),
            marks=pytest.mark.heavy,
        ),
    ],
    ids=["stub", "model"],
)
def test_plan_prints_a_training_command_that_fits_in_memory(tmp_path, request, estimate, words):
    request.getfixturevalue(estimate)
    found, out = run_plan(tmp_path, "data.batch_size=8", *words, "backbone.checkpointing=true")
    (change,) = found["changes"]
    size, times = change["words"]["data.batch_size"], change["words"]["trainer.accumulate"]
    assert size * times == 8 and size < 8
    assert found["planned"]["need"] <= found["memory"] < found["as_it_is"]["need"]
    typed = shlex.split(found["command"])[4:]
    assert typed[-2:] == [f"data.batch_size={size}", f"trainer.accumulate={times}"]
    assert not [word for word in typed if word.startswith(("mode.", "hydra."))] and typed.count("mode=train") == 0
    assert f"micro-batches of {size} sample" in out and "the effective batch size stays 8" in out
    assert "BatchNorm computes its statistics per micro-batch" in out


def test_recipe_larger_than_memory_is_refused(tmp_path, mebibytes):
    done = call(tmp_path, "mode=plan", *WORDS, "mode.memory=1MiB", "data.batch_size=1", "hydra.run.dir=run")
    assert done.status == 1 and "fits into 0.001 GiB: the smallest, " in done.err and not (tmp_path / "run").exists()


def losses(where, *words):
    succeed(where, *words, "hydra.run.dir=trained")
    rows = list(map(json.loads, (where / "trained/metrics.jsonl").read_text().splitlines()))
    shutil.rmtree(where / "trained")
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.heavy
def test_the_printed_command_trains_as_the_recipe_would(tmp_path, mebibytes):
    """A recipe of the user's own, as it is and with fewer samples at once; each takes 1.75 MiB with the overhead."""
    write_data(tmp_path / "my data", train=8)
    (tmp_path / "own/hparam").mkdir(parents=True)
    recipe = "# @package _global_\ntrainer: {accumulate: 4, log_every: 1}\n"
    (tmp_path / "own/hparam/mine.yaml").write_text(recipe)
    words = ("--config-dir", str(tmp_path / "own"), "hparam=mine", "head=mlp")
    own = losses(tmp_path, "mode=train", *WORDS, *words)
    assert len(own) == 2
    for memory, said in (("64GiB", "It fits into"), ("386MiB", "data.batch_size=1 trainer.accumulate=8")):
        _, out = run_plan(tmp_path, *words, f"mode.memory={memory}")
        (command,) = (line for line in out.splitlines() if line.startswith("  python"))
        assert said in out and losses(tmp_path, *shlex.split(command)[3:]) == pytest.approx(own, rel=1e-5)
        assert ("Random numbers (dropout, mask points) are sampled per micro-batch" in out) == (memory == "386MiB")


def test_absent_device_is_planned_with_the_configured_precision(compose, monkeypatch):
    target = planning._target(Builder(compose(*WORDS, "engine.precision=bf16")), "24GB", "cuda")
    assert (target.kind, target.memory, target.bf16) == ("cuda", 24 * 10**9, True)
    monkeypatch.setattr(planning, "free_bytes", lambda device: math.inf)
    message = "This system does not report its free memory. Set it, such as mode.memory"
    assert_refused(lambda: planning._target(Builder(compose(*WORDS)), None, None), message)


def test_cpu_ranks_share_free_memory_but_not_a_given_amount(compose, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 6000)
    cfg = compose(*WORDS, "engine.devices=3", "data.batch_size=6")
    assert [planning._target(Builder(cfg), said, None).memory for said in (None, "1MiB")] == [2000, 2**20]


def test_planned_command_preserves_unchanged_overrides(monkeypatch, tmp_path):
    typed = ["mode=plan", "+mode.memory=1GiB", "adapter=full", "++adapter.rank=2", "adapters=x", "data.root=a b"]
    monkeypatch.setattr(planning, "last_command_line", lambda folder: [*typed, "hydra.run.dir=run"])
    cfg = OmegaConf.create({"config_dirs": ["own"]})
    command = planning._command(cfg, tmp_path, {"adapter": "lora", "data.batch_size": 2})
    kept = ["mode=train", "adapters=x", "data.root=a b", "adapter=lora", "data.batch_size=2"]
    assert shlex.split(command) == ["python", "-m", "dinoseg", *kept, "--config-dir", "own"]
