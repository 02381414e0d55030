"""mode=plan: memory estimate of a recipe's training, and the changes that make it fit."""

import dataclasses
import math
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.config.job import folder_words
from dinoseg.config.plain import is_below
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto.fitting import Fit, FitSearch, Words, list_changes
from dinoseg.extensions.auto.step_bytes import step_flops
from dinoseg.extensions.auto.target import KINDS, Target, memory_of
from dinoseg.extensions.auto.training_parts import check_trainer, training_parts
from dinoseg.inference.memory import free_bytes
from dinoseg.runs.folder import last_command_line
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range
from dinoseg.utils.wording import count_of, format_override

# from a processor of a microcomputer to the largest cluster
Tflops = Annotated[float, Range("a number from 0.001 to 10000000", 1e-3, 1e7)]
_GIB = 2**30


def plan(
    cfg: DictConfig,
    *,
    out_dir: Path,
    memory: str | int | float | None = None,
    device: str | None = None,
    tflops: Tflops | None = None,
) -> dict[str, Any]:
    """Estimate the memory of a recipe's training step, find the changes that make it fit, and print the command.

    With `tflops`, it also estimates the hours of the training.

    Args:
        cfg: the whole config.
        out_dir: the run folder.
        memory: available memory, such as 24GiB; None: the free memory of this device.
        device: target of the plan, cuda or cpu; None: the engine's.
        tflops: 10^12 floating-point operations that all devices sustain per second in training, 0.001 to 10^7; None:
            no hours.

    Raises:
        UserError: no known change makes the step fit, or a value is invalid.
    """
    builder = Builder(cfg)
    check_trainer(builder)
    target = _target(builder, memory, device)
    builder.loop_settings(samples=1)  # refuses invalid numbers of steps and batches, as training would
    builder.make_training().check_parts(builder.outline(), target.world_size)
    if cfg.data.batch_size % target.world_size:
        raise UserError(
            f"data.batch_size={cfg.data.batch_size} cannot be shared by {target.world_size} devices: use a multiple of "
            f"{target.world_size}."
        )
    recipe = partial(training_parts, builder)
    search = FitSearch(recipe, target)
    whole = search.as_it_is
    _print_step(whole, target)
    found = _require_fit(search)
    command = _command(cfg, out_dir, found.words)
    _print_changes(found, target, command)
    duration = None if tflops is None else _duration(builder, found, target, tflops)
    result = {
        "device": target.kind,
        "memory": target.memory,
        "as_it_is": {"step": dataclasses.asdict(whole.step), "need": whole.need},
        "planned": {"step": dataclasses.asdict(found.step), "need": found.need},
        "changes": [{"words": dict(change.words), "reason": change.reason} for change in found.changes],
        "command": command,
        "duration": duration,
    }
    write_json(out_dir / "plan.json", result)
    return result


def _target(builder: Builder, memory: str | float | None, device: str | None) -> Target:
    """Return the target of the plan."""
    if device not in (None, *KINDS):
        raise UserError(f"mode.device={device} is unknown. Choose {' or '.join(KINDS)}, or leave it out.")
    amount = None if memory is None else memory_of(memory)
    world_size = builder.value("engine.devices")
    if (sharding := builder.value("engine.sharding")) != "none":
        raise UserError(
            f"engine.sharding={sharding}: mode=plan counts all weights on each device and does not support sharding. "
            "Leave it out: with a large backbone, a sharded training needs less memory than the estimate."
        )
    engine = builder.engine(devices=1)
    kind = device or engine.device.type
    if kind not in KINDS:
        raise UserError(
            f"mode=plan supports {' and '.join(KINDS)}, not {kind}. Set mode.device=cpu, or engine.device=cpu."
        )
    if kind != engine.device.type:
        if amount is None:
            raise UserError(f"mode.device={kind} is not the device here. Set its memory, such as mode.memory=24GiB.")
        return Target(kind, amount, bf16=builder.value("engine.precision") != "fp32", world_size=world_size)
    sharing = world_size if kind == "cpu" else 1  # ranks on a CPU share its memory
    free = free_bytes(engine.device) / sharing if amount is None else amount
    if math.isinf(free):
        raise UserError("This system does not report its free memory. Set it, such as mode.memory=24GiB.")
    return Target(kind, round(free), bf16=engine.half, world_size=world_size)


def _require_fit(search: FitSearch) -> Fit:
    fit = search.find_fit()
    if fit is None:
        least, target = search.smallest, search.target
        with_all = list_changes(least.changes) or "without changes"
        raise UserError(
            f"No setting that was tried fits into {_as_gib(target.memory)}: the smallest, {with_all}, needs about "
            f"{_as_gib(least.need)}. Choose a smaller resolution.crop or resolution.scale, a smaller backbone, or an "
            "adapter that trains less: lora, qlora or frozen."
        )
    return fit


def _print_step(fit: Fit, target: Target) -> None:
    step = fit.step
    outside = "CUDA context" if target.kind == "cuda" else "code loaded in the first step"
    amounts = {name.replace("_", " "): value for name, value in dataclasses.asdict(step).items() if value}
    del amounts["peak"]
    amounts |= {"peak of these": step.peak, f"incl. fragmentation and {outside}": fit.need}
    rows = [(name, _as_gib(value)) for name, value in amounts.items()]
    each = count_of(fit.parts.batch_size // target.world_size, "sample")
    print(
        f"A training step of {each} of {' x '.join(map(str, fit.parts.crop))} on a {target.kind} device "
        f"({'half precision' if target.bf16 else 'float32'}), estimated:\n"
    )
    print(tabulate(rows, tablefmt="plain", colalign=("left", "right")), end="\n\n")


def _print_changes(found: Fit, target: Target, command: str) -> None:
    memory = _as_gib(target.memory)
    if not found.changes:
        print(f"It fits into {memory} without changes:\n\n  {command}")
        return
    print(f"To fit into {memory} (then about {_as_gib(found.need)}):\n")
    for change in found.changes:
        print(f"- {change}: {change.reason}.")
    print(f"\n  {command}")


def _duration(builder: Builder, found: Fit, target: Target, tflops: float) -> dict[str, float | None]:
    """Print and return the floating-point operations of a step, and the hours if the number of steps is known."""
    parts = found.parts
    flops = step_flops(parts, parts.batch_size, bf16=target.bf16) * parts.accumulate
    steps = builder.value("trainer.steps") if builder.value("trainer.epochs") is None else None
    hours = None if steps is None else steps * flops / (tflops * 1e12 * 3600)
    length = "set trainer.steps for the hours" if hours is None else f"{hours:.3g} h for {steps} steps"
    print(
        f"\nA step takes {flops / 1e12:.3g} TFLOP. At a sustained {tflops:g} TFLOP/s, that is "
        f"{flops / (tflops * 1e12):.3g} s: {length}, without feature cache, loading and validation."
    )
    return {"flops": flops, "hours": hours}


def _command(cfg: DictConfig, out_dir: Path, words: Words) -> str:
    """Return the command that trains with the typed words, of which `words` replaces those that change."""
    gone = ("mode", "hydra.run.dir", *words)
    remaining = [word for word in last_command_line(out_dir) if not is_below(word.lstrip("+~").partition("=")[0], gone)]
    new = [f"{key}={format_override(value)}" for key, value in words.items()]
    return shlex.join(["python", "-m", "dinoseg", "mode=train", *remaining, *new, *folder_words(cfg.config_dirs)])


def _as_gib(amount: float) -> str:
    return f"{amount / _GIB:.3f} GiB"
