"""Loading of a checkpoint's tensors into a model, its optimizer and its moving average: all of them, or none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import AdamW, Optimizer

from dinoseg.models.model import SegmentationModel, fingerprint, non_persistent_buffers, quantised_names, trained_names
from dinoseg.training.description import IDLE
from dinoseg.training.optim import MovingAverage
from dinoseg.training.sharding import full_tensor, shard_like
from dinoseg.utils.cores import machine_memory
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import copy_values
from dinoseg.utils.wording import format_text

_MAX_PARTS = 50_000  # modules, parameters and buffers; DINOv3's ViT-7B with LoRA has about 5,000
CONSTANTS = "constants"  # prefix of buffers that a state dict leaves out
CASTS = (torch.float16, torch.bfloat16, torch.float32)  # each can be loaded into any other


@dataclass
class Checkpoint:
    """Tensors and description of a checkpoint file."""

    path: Path
    tensors: dict[str, Tensor]
    info: dict[str, Any]
    key: str = "resume"  # of the config, which names the file in messages

    @property
    def where(self) -> str:
        """The file as it starts a message."""
        return f"{self.key}={self.path}"

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors below `name/`, without that prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@contextmanager
def limit_model_size(where: str) -> Iterator[None]:
    """Abort within the block once the modules created there are too many, or too large for this machine's memory.

    Raises:
        UserError: they are; `where` starts the message.
    """
    memory = machine_memory()
    parts = 0

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal parts
        parts += 1
        size = part.numel() * part.element_size() if isinstance(part, Tensor) else 0
        if parts > _MAX_PARTS or size > memory:
            raise UserError(
                f"{where}: its config describes a model of more than {_MAX_PARTS} parts, or one that does not fit "
                f"into memory ({name}: {size / 2**30:.0f} GiB, of {memory / 2**30:.0f}). Choose another checkpoint."
            )

    hooks = [
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_size(model: nn.Module, where: str) -> None:
    """Refuse a model on the meta device that is larger than this machine's memory.

    Raises:
        UserError: it is; `where` starts the message.
    """
    tensors = {id(part): part for part in (*model.parameters(), *model.buffers())}.values()
    size = sum(part.numel() * part.element_size() for part in tensors)
    if size > machine_memory():
        raise UserError(
            f"{where}: its config describes a model of {size / 2**30:.0f} GiB, and this machine has "
            f"{machine_memory() / 2**30:.0f}. Choose another checkpoint, or a larger machine."
        )


def load_weights(model: SegmentationModel, checkpoint: Checkpoint) -> None:
    """Load the trained tensors; none may be missing or left over.

    Raises:
        UserError: the checkpoint has another architecture, or was trained on other frozen weights.
    """
    check_fits(model, checkpoint)
    now, then = frozen_fingerprint(model), checkpoint.info["frozen"]
    other = [part for part in now if now[part] != then.get(part)]
    if other:
        raise UserError(
            f"{checkpoint.where}: it was trained on other frozen {other[0]} weights than "
            f"{other[0]}.weights{' (or in another backbone.dtype)' if other[0] == 'backbone' else ''}. Set the weights "
            "of its training."
        )
    copy_trained(model, checkpoint.part("model"))
    constant_buffers = non_persistent_buffers(model)
    for name, value in checkpoint.part(CONSTANTS).items():
        constant_buffers[name].copy_(value)


def copy_trained(model: SegmentationModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors that training changes into a model, by name; each has the shape of the model's."""
    state = model.state_dict()
    for name, value in tensors.items():
        copy_values(state[name], shard_like(value, state[name]))


def check_fits(model: SegmentationModel, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not exactly those that training changes in a model; both may be on meta.

    Raises:
        UserError: with the numbers of tensors that are missing, left over, of another shape or of another type.
    """
    state = model.state_dict()
    parts = misfits({name: state[name] for name in trained_names(model)}, checkpoint.part("model"))
    held, expected = (
        checkpoint.part(CONSTANTS),
        non_persistent_buffers(model),
    )  # only in a file that holds a whole model
    parts = parts or misfits({name: expected[name] for name in expected if held}, held)
    if parts:
        raise UserError(
            f"{checkpoint.where}: it belongs to another model: {parts}. Use the backbone, adapter, head and "
            "classes it was trained with (they are in its config), or start a new run."
        )


def misfits(want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> str:
    """Describe how tensors differ from the expected ones in names, shapes and types; empty if they do not."""
    both = sorted(want.keys() & have.keys())
    wrong = {
        "missing": sorted(want.keys() - have.keys()),
        "unexpected": sorted(have.keys() - want.keys()),
        "of another shape": [name for name in both if have[name].shape != want[name].shape],
        "of another type": [name for name in both if not casts(have[name].dtype, want[name].dtype)],
    }
    return ", ".join(
        f"{len(names)} tensors {what} (such as {format_text(names[0])})" for what, names in wrong.items() if names
    )


def casts(have: torch.dtype, want: torch.dtype) -> bool:
    """Return whether a tensor of type `have` may be loaded into one of type `want`."""
    return have == want or (have in CASTS and want in CASTS)


def frozen_fingerprint(model: SegmentationModel) -> dict[str, str]:
    """Return, for backbone and head, a hash of names, shapes and sampled values that a checkpoint does not hold.

    Quantised weights are excluded: they differ in the last place between devices.
    """
    skipped = trained_names(model) | quantised_names(model)
    frozen = [(name, value) for name, value in model.state_dict().items() if name not in skipped]
    return {
        part: fingerprint((name, full_tensor(value)) for name, value in frozen if name.partition(".")[0] == part)
        for part in ("backbone", "head")
    }


def check_resumable(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without an optimizer state, as `best` is: training could not continue exactly."""
    if not checkpoint.part("optimizer"):
        raise UserError(
            f"{checkpoint.where}: this checkpoint holds no optimizer state, so training cannot resume from it "
            "exactly. Resume from last.safetensors in the same folder; or start a new run from its weights: init=FILE "
            "instead of resume=FILE."
        )


def load_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Load the optimizer's state by parameter name.

    Raises:
        UserError: the checkpoint lacks state that it had when it was saved, or has that of other parameters.
    """
    saved = checkpoint.part("optimizer")
    absent = parameters_without_state(optimizer, saved)
    if len(absent) > checkpoint.info.get(IDLE, 0):
        raise UserError(
            f"{checkpoint.where}: its optimizer state lacks parameters that it had when this run was saved, such "
            f"as {format_text(absent[0])}. Resume from another checkpoint."
        )
    _check_state(optimizer, saved, checkpoint.where)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key.rpartition("/")[2]: saved[key] for key in saved if key.rpartition("/")[0] == name}
            stays = set() if group.get("fused") else {"step"}  # fused optimizers have it on the device
            optimizer.state[parameter] = {
                key: value.clone() if key in stays else shard_like(value.to(parameter.device), parameter)
                for key, value in state.items()
            }


def parameters_without_state(optimizer: Optimizer, saved: Mapping[str, Tensor]) -> list[str]:
    """Return the names of parameters without optimizer state, such as those that no gradient has reached."""
    held = {key.rpartition("/")[0] for key in saved}
    return [name for group in optimizer.param_groups for name in group["names"] if name not in held]


def _check_state(optimizer: Optimizer, saved: Mapping[str, Tensor], where: str) -> None:
    """Refuse state of an unknown parameter, or not of its shape and type: fused kernels read it without a check."""
    named = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for key, value in saved.items():
        name, _, kind = key.rpartition("/")
        parameter = named.get(name)
        is_scalar = kind == "step" or (value.shape == () and not isinstance(optimizer, AdamW))
        fits = value.dtype in CASTS and value.shape == ()
        if parameter is not None and not is_scalar:
            is_read_unchecked = isinstance(optimizer, AdamW)
            has_type = value.dtype == parameter.dtype if is_read_unchecked else value.dtype in CASTS
            fits = has_type and value.shape == parameter.shape
        if parameter is None or not fits:
            raise UserError(
                f"{where}: its optimizer state {format_text(key)} ({list(value.shape)}, {value.dtype}) fits no "
                "parameter of this model. Resume from another checkpoint."
            )


def load_average(ema: MovingAverage | None, checkpoint: Checkpoint) -> None:
    """Load the moving average, if there is one.

    Raises:
        UserError: `trainer.ema` was switched on or off, or the average is of other tensors.
    """
    average, saved = {} if ema is None else ema.average, checkpoint.part("ema")
    if parts := misfits(average, saved):
        raise UserError(
            f"{checkpoint.where}: of its moving average {parts}. Set trainer.ema as in that run, or resume from "
            "another checkpoint."
        )
    for name, value in average.items():
        value.copy_(shard_like(saved[name], value))
