"""Checkpoints that describe themselves: one safetensors file each, read without unpickling anything.

A file holds tensors under `model/`, and in `last` also `optimizer/` and `ema/`; its header holds one JSON
object with the step, the scores, the unresolved config, classes, palette and versions. `last` is what a run goes on
from, `best` what it is remembered by.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.errors import UserError, free_space
from dinoseg.model import fingerprint, quantised_names, trained_names
from dinoseg.training.optim import MovingAverage

FORMAT = 1
FOLDER = "checkpoints"
INFO = ("format", "progress", "frozen", "config", "choices", "folder", "classes", "palette", "ignore_index")


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best: float | None = None  # best validation score so far
    best_step: int = 0
    stale: int = 0  # validations since then
    owed: bool = False  # the validation due at this step has not come to its end: a run that goes on begins with it


@dataclass
class Checkpoint:
    """A checkpoint file's tensors and description."""

    path: Path
    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors below `name/`, without that prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def write(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        UserError: it cannot be written; an older file of that name stays as it was.
    """
    write_tensors(path, tensors, {"dinoseg": json.dumps({"format": FORMAT, **info})})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to the disk, then rename it.

    Raises:
        UserError: it cannot be written (a full disk, no permission); an older file of that name stays as it was.
    """
    folder = path.with_name(f".{path.name}.part")  # of its own: safetensors gives its file a name by chance
    part = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, header)
        part.chmod(0o644)  # safetensors leaves it to the owner alone: a run folder is for the group to read
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({error}); {free_space(path)} there. Make room and run it again, with "
            f"resume= for a training run: what was saved before is untouched."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint file; nothing in it is executed.

    Raises:
        UserError: no such file, not a checkpoint of dinoseg, truncated, or of a newer format.
    """
    info = describe(path)
    try:
        with safe_open(path, framework="pt") as file:
            return Checkpoint(path, {key: file.get_tensor(key) for key in file.keys()}, info)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"resume={path}: not a readable checkpoint ({error}). Choose another one.") from error


def describe(path: Path) -> dict[str, Any]:
    """Read what a checkpoint file says of itself, without its tensors.

    Raises:
        UserError: as `read`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("dinoseg", "null"))
    except FileNotFoundError:
        raise UserError(f"resume={path}: no such file. Give a run folder or a checkpoint in it.") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"resume={path}: not a readable checkpoint ({error}). Choose another one.") from error
    if not isinstance(info, dict):
        raise UserError(f"resume={path}: a safetensors file, but not a checkpoint of dinoseg. Choose another one.")
    absent = [key for key in INFO if key not in info]
    if absent or not isinstance(info["format"], int):
        raise UserError(f"resume={path}: its description lacks {', '.join(absent) or 'a format'}. Choose another one.")
    if info["format"] > FORMAT:
        raise UserError(
            f"resume={path}: written in format {info['format']}, and this dinoseg reads up to {FORMAT}. Update dinoseg."
        )
    return info


def find(target: str | Path, prefer: str) -> Path:
    """Return the checkpoint file that a run folder or a file path names; `prefer` is best or last.

    Raises:
        UserError: there is none.
    """
    path = Path(target).expanduser()
    if path.is_file():
        return path
    other = {"best": "last", "last": "best"}[prefer]
    for name in (prefer, other):
        for folder in (path / FOLDER, path):
            if (folder / f"{name}.safetensors").is_file():
                return folder / f"{name}.safetensors"
    raise UserError(
        f"resume={target}: neither a checkpoint file nor a run folder with {FOLDER}/{prefer}.safetensors. "
        f"Give one of your folders under outputs/."
    )


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the trained tensors; every one must be there, none may be left over.

    Raises:
        UserError: the checkpoint is of another architecture, or its frozen backbone had other weights.
    """
    have, want = checkpoint.part("model"), trained_names(model)
    state = model.state_dict()
    shape = sorted(name for name in want & have.keys() if have[name].shape != state[name].shape)
    missing, extra = sorted(want - have.keys()), sorted(have.keys() - want)
    if missing or extra or shape:
        parts = [
            f"{len(names)} tensors {what} (such as {names[0]})"
            for what, names in (("missing", missing), ("left over", extra), ("of another shape", shape))
            if names
        ]
        raise UserError(
            f"resume={checkpoint.path}: made for another model: {', '.join(parts)}. Use the backbone, adapter, "
            f"head and classes it was trained with (they are in its config), or start a new run."
        )
    now, then = frozen_fingerprint(model), checkpoint.info["frozen"]
    other = [part for part in now if now[part] != then.get(part)]
    if other:
        raise UserError(
            f"resume={checkpoint.path}: trained on other frozen {other[0]} weights than {other[0]}.weights gives now"
            f"{' (or held in another backbone.dtype)' if other[0] == 'backbone' else ''}. Give what it was trained on."
        )
    model.load_state_dict(have, strict=False)


def frozen_fingerprint(model: nn.Module) -> dict[str, str]:
    """Return, for backbone and head, a hash of names, shapes and sampled values that a checkpoint does not hold.

    Quantised weights are left out: they differ in the last place between devices.
    """
    skipped = trained_names(model) | quantised_names(model)
    kept = [(name, value) for name, value in model.state_dict().items() if name not in skipped]
    return {
        part: fingerprint((name, value) for name, value in kept if name.partition(".")[0] == part)
        for part in ("backbone", "head")
    }


@dataclass
class Checkpoints:
    """A run's own checkpoints: saves `last` and `best`, restores `last`.

    Args:
        folder: where the files go.
        info: the part of the description that does not change: config, classes, palette, versions.
        start: the checkpoint to go on from, or None for a new run.
        writes: whether this rank writes files.
    """

    folder: Path
    info: dict[str, Any]
    start: Checkpoint | None = None
    writes: bool = True
    progress: Progress = field(default_factory=Progress)

    def restore(self, model: nn.Module, optimizer: Optimizer, ema: MovingAverage | None) -> Progress:
        """Load everything a run needs to go on, and return where it stands."""
        self.info = {**self.info, "frozen": frozen_fingerprint(model)}
        if self.start is not None:
            load_weights(model, self.start)
            _load_optimizer(optimizer, self.start)
            _load_average(ema, self.start)
            self.progress = Progress(**self.start.info["progress"])
        return self.progress

    def save(self, model: nn.Module, optimizer: Optimizer, ema: MovingAverage | None) -> None:
        """Save `last`: weights and all that is needed to go on exactly."""
        tensors = {f"model/{name}": value for name, value in _held(model).items()}
        tensors |= {f"optimizer/{key}": value for key, value in _optimizer_state(optimizer).items()}
        tensors |= {f"ema/{name}": value for name, value in (ema.average if ema else {}).items()}
        self._write("last", tensors, self.progress)

    def judge(self, model: nn.Module, score: float, *, lowest: bool = False) -> Progress:
        """Save `best` where `score` beats all before; the model must hold the weights that were scored.

        The highest score is the best, or the `lowest`.

        Returns:
            Where the run stands with that; `settle` makes it so, once all else of the validation is kept.
        """
        now = self.progress
        if now.best is not None and (score >= now.best if lowest else score <= now.best):
            return replace(now, stale=now.stale + 1, owed=False)
        found = replace(now, best=score, best_step=now.step, stale=0, owed=False)
        self._write("best", {f"model/{name}": value for name, value in _held(model).items()}, found)
        return found

    def settle(self, found: Progress) -> None:
        """Take over what `judge` has returned."""
        vars(self.progress).update(vars(found))

    def _write(self, name: str, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        if self.writes:
            info = {**self.info, "progress": asdict(progress)}
            write(self.folder / f"{name}.safetensors", tensors, info)


def _held(model: nn.Module) -> dict[str, Tensor]:
    names = trained_names(model)
    return {name: value for name, value in model.state_dict().items() if name in names}


def _optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name, so that it does not depend on the groups' order."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def _load_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    saved = checkpoint.part("optimizer")
    if not saved:
        raise UserError(
            f"resume={checkpoint.path}: this checkpoint holds no optimizer state, so training cannot go on from it "
            f"exactly. Resume from last.safetensors in the same folder."
        )
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key.rpartition("/")[2]: saved[key] for key in saved if key.rpartition("/")[0] == name}
            stays = set() if group.get("fused") else {"step"}  # a fused optimizer counts on the device
            optimizer.state[parameter] = {
                key: value.clone() if key in stays else value.to(parameter.device) for key, value in state.items()
            }


def _load_average(ema: MovingAverage | None, checkpoint: Checkpoint) -> None:
    saved = checkpoint.part("ema")
    if (ema is None) == bool(saved):
        raise UserError(
            f"resume={checkpoint.path}: trainer.ema is {'off' if ema is None else 'on'} now and was "
            f"{'on' if saved else 'off'} when this run was saved. Set it as it was."
        )
    if ema is not None:
        for name, value in ema.average.items():
            value.copy_(saved[name])
