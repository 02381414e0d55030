"""mode=plan foretells a training step and prints a command line that can be used as it is."""

import json
import math
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
from command_line import SMALL, call, write_data

from dinoseg.autotune import fitting
from dinoseg.autotune.step_bytes import StepBytes
from dinoseg.experiment.builder import Builder
from dinoseg.modes import plan as planning
from dinoseg.utils.errors import UserError

WORDS = [*SMALL[:2], *SMALL[3:], "data.root=my data", "engine.precision=fp32"]


def run_plan(where, *words):
    done = call(where, "mode=plan", *WORDS, "hydra.run.dir=run", *words)
    assert done.status == 0, done.err
    return json.loads((where / "run/plan.json").read_text()), done.out


@pytest.mark.heavy
def test_fitting_config_is_planned_unchanged(tmp_path):
    found, out = run_plan(tmp_path)
    step = found["planned"]["step"]
    assert found["changes"] == [] and found["device"] == "cpu"
    assert found["as_it_is"]["need"] == found["planned"]["need"] >= step["peak"] > step["weights"] > 10_000
    assert "It fits into" in out
    assert [*shlex.split(found["command"])[:4], *WORDS] == shlex.split(found["command"])
    assert found["command"] in out and not (tmp_path / "my data").exists()
    assert "incl. fragmentation and code loaded in the first step" in out and "CUDA" not in out and "MiB" not in out


def test_hours_follow_from_operations_and_steps(tmp_path):
    words = ("mode.tflops=0.002", "trainer.steps=900")
    found, out = run_plan(tmp_path, *words)
    flops, hours = found["duration"]["flops"], found["duration"]["hours"]
    assert hours == pytest.approx(900 * flops / 2e9 / 3600) and flops > 1e6
    assert f"{hours:.3g} h for 900 steps" in out and "0.002 TFLOP/s" in out
    words = ("mode.tflops=0.002", "trainer.accumulate=3")
    assert call(tmp_path, "mode=plan", *WORDS, "hydra.run.dir=thrice", *words).status == 0
    assert json.loads((tmp_path / "thrice/plan.json").read_text())["duration"]["flops"] == 3 * flops
    by_epochs = ["trainer.epochs=2" if word.startswith("trainer.steps") else word for word in WORDS]
    done = call(tmp_path, "mode=plan", *by_epochs, "hydra.run.dir=epochs", words[0])
    assert done.status == 0 and "set trainer.steps for the hours" in done.out
    assert json.loads((tmp_path / "epochs/plan.json").read_text())["duration"] == {"flops": flops, "hours": None}
    assert call(tmp_path, "mode=plan", *WORDS, "hydra.run.dir=memory").status == 0
    assert json.loads((tmp_path / "memory/plan.json").read_text())["duration"] is None
    for value in ("0", "1e-300", "1e+300", "nan"):
        refused = call(tmp_path, "mode=plan", *WORDS, f"mode.tflops={value}")
        message = f"mode.tflops={value} is out of range. Give a number from 0.001 to 10000000, or null."
        assert refused.status == 1 and message in refused.err


def test_plan_prints_a_training_command_that_fits_in_memory(tmp_path):
    words = ("data.batch_size=8", "resolution.crop=[320,320]", "mode.device=cuda", "mode.memory=1.03GiB")
    words = (*words, "backbone.checkpointing=true")
    found, out = run_plan(tmp_path, *words)
    (change,) = found["changes"]
    size, times = change["words"]["data.batch_size"], change["words"]["trainer.accumulate"]
    assert size * times == 8 and size < 8
    assert found["planned"]["need"] <= found["memory"] < found["as_it_is"]["need"]
    typed = shlex.split(found["command"])[4:]
    assert typed[-2:] == [f"data.batch_size={size}", f"trainer.accumulate={times}"]
    assert not [word for word in typed if word.startswith(("mode.", "hydra."))] and typed.count("mode=train") == 0
    assert f"micro-batches of {size} sample" in out and "the effective batch size stays 8" in out
    assert "BatchNorm computes its statistics per micro-batch" in out


def losses(where, *words):
    done = call(where, *words, "hydra.run.dir=trained")
    assert done.status == 0, done.err
    rows = list(map(json.loads, (where / "trained/metrics.jsonl").read_text().splitlines()))
    shutil.rmtree(where / "trained")
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.heavy
def test_the_printed_command_trains_as_the_recipe_would(tmp_path, monkeypatch):
    """A recipe of the user's own, as it is and with fewer samples at once; each takes 1.75 MiB."""
    monkeypatch.setattr(fitting, "step_bytes", lambda *_, samples, **__: StepBytes(*[0] * 7, peak=samples * 2**20))
    monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)
    write_data(tmp_path / "my data", train=8)
    (tmp_path / "own/hparam").mkdir(parents=True)
    recipe = "# @package _global_\ntrainer: {accumulate: 4, log_every: 1}\n"
    (tmp_path / "own/hparam/mine.yaml").write_text(recipe)
    words = ("--config-dir", str(tmp_path / "own"), "hparam=mine", "head=mlp")
    own = losses(tmp_path, "mode=train", *WORDS, *words)
    assert len(own) == 2
    for memory, sizes in (("64GiB", None), ("386MiB", (1, 8))):
        done = call(tmp_path, "mode=plan", *WORDS, *words, f"mode.memory={memory}", f"hydra.run.dir={memory}")
        assert done.status == 0, done.err
        (command,) = (line for line in done.out.splitlines() if line.startswith("  python"))
        if sizes:
            assert "data.batch_size={} trainer.accumulate={}".format(*sizes) in command
        else:
            assert "It fits into" in done.out
        assert losses(tmp_path, *shlex.split(command)[3:]) == pytest.approx(own, rel=1e-5)
        assert ("Random numbers (dropout, mask points) are sampled per micro-batch" in done.out) == bool(sizes)


def test_absent_device_is_planned_with_the_configured_precision(compose, monkeypatch):
    target = planning._target(Builder(compose(*WORDS, "engine.precision=bf16")), "24GB", "cuda")
    assert (target.kind, target.memory, target.bf16) == ("cuda", 24 * 10**9, True)
    monkeypatch.setattr(planning, "free_bytes", lambda device: math.inf)
    with pytest.raises(UserError, match="This system does not report its free memory. Set it, such as mode.memory"):
        planning._target(Builder(compose(*WORDS)), None, None)


def test_cpu_ranks_share_free_memory_but_not_a_given_amount(compose, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 6000)
    cfg = compose(*WORDS, "engine.devices=3", "data.batch_size=6")
    assert [planning._target(Builder(cfg), said, None).memory for said in (None, "1MiB")] == [2000, 2**20]


def test_planned_command_preserves_unchanged_overrides(monkeypatch, tmp_path):
    typed = ["mode=plan", "+mode.memory=1GiB", "adapter=full", "++adapter.rank=2", "adapters=x", "data.root=a b"]
    monkeypatch.setattr(planning, "last_command_line", lambda folder: [*typed, "hydra.run.dir=run"])
    sources = [SimpleNamespace(provider=name, path=name) for name in ("main", "command-line")]
    hydra = SimpleNamespace(runtime=SimpleNamespace(config_sources=sources))
    monkeypatch.setattr(planning, "HydraConfig", SimpleNamespace(get=lambda: hydra))
    command = planning._command(tmp_path, {"adapter": "lora", "data.batch_size": 2})
    kept = ["mode=train", "adapters=x", "data.root=a b", "adapter=lora", "data.batch_size=2"]
    assert shlex.split(command) == ["python", "-m", "dinoseg", *kept, "--config-dir", "command-line"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode.memory=24"], "mode.memory=24: give an amount with its unit, such as 24GiB"),
        (
            ["mode.memory=1MiB", "data.batch_size=1", "head=mlp"],
            r"fits into 0\.001 GiB: the smallest, .*needs about .* GiB",
        ),
        (["mode.device=tpu"], "mode.device=tpu is unknown. Choose cpu or cuda"),
        (["mode.device=cuda"], "mode.device=cuda is not the device here. Set its memory, such as mode.memory"),
        (["data.batch_size=0"], "data.batch_size=0"),
        (["data.batch_size=3", "engine.devices=2"], "data.batch_size=3 cannot be shared by 2 devices"),
        (["engine.sharding=fsdp", "engine.devices=2"], "engine.sharding=fsdp: mode=plan counts all weights"),
        (["mode.memory=0"], "mode.memory=0: give an amount"),
        (["mode.memory=-1GiB"], "mode.memory=-1GiB: give an amount"),
        (["resolution.crop=[0,8]"], "resolution.crop"),
        (["trainer.accumulate=0"], "trainer.accumulate=0"),
        (["data.batch_size=some"], "data.batch_size=some is of type str"),
        (["resolution.crop=[x,y]"], r"resolution.crop=\['x', 'y'\] is of type list of str"),
        (["trainer.accumulate=~"], "trainer.accumulate=~"),
        (["loss.weights={nobody: 3}"], "loss.weights: nobody is not a class. The classes are dark, bright"),
        (["loss.weights=invers"], "loss.weights=invers is unknown. Choose one of none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_plan_options_are_refused(tmp_path, words, message):
    done = call(tmp_path, "mode=plan", *WORDS, "hydra.run.dir=run", *words)
    assert done.status == 1 and re.search(message, done.err), done.err
    assert "Traceback" not in done.err
