"""Strict loading and export of weights under timm's names."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import check_weights, read_tensor_file

_WRAPPERS = ("state_dict", "model")  # keys under which training scripts store the tensors
_CALLED = 3  # names per kind in an error message


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or PyTorch checkpoint, without running pickled code.

    Raises:
        UserError: the file does not exist, is not readable, or holds anything but tensors.
    """
    content = read_tensor_file(path, "backbone.weights")
    inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    state = inner[0] if inner else content
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"backbone.weights={path}: it holds objects other than tensors. Save only the model's state dict."
        )
    return dict(state)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], *, spare: set[str], source: str) -> None:
    """Load tensors into a model; every tensor must be present, fit and be used.

    Args:
        model: changed in place.
        state: its tensors by name.
        spare: names of tensors, or of the modules that own them, that may be unexpected.
        source: origin of the weights, for the error message.

    Raises:
        UserError: tensors are missing, unexpected, of another shape or not finite; the message names the first ones.
    """
    expected = model.state_dict()
    left = [key for key in state if key not in expected and not any(f"{key}.".startswith(f"{name}.") for name in spare)]
    wrong = {
        "missing": [key for key in expected if key not in state],
        "unexpected": left,
        "of another shape": [key for key in expected if key in state and expected[key].shape != state[key].shape],
    }
    if any(wrong.values()):
        problems = [
            f"{len(keys)} {kind} ({', '.join(keys[:_CALLED])}{', ...' if len(keys) > _CALLED else ''})"
            for kind, keys in wrong.items()
            if keys
        ]
        raise UserError(
            f"backbone.weights={source}: tensors are {'; '.join(problems)}. Choose the backbone.name of these weights."
        )
    check_weights(state, f"backbone.weights={source}", expected)
    model.load_state_dict({key: state[key] for key in expected})


def exported_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights under timm's names.

    Raises:
        UserError: the model holds LoRA updates.
    """
    state = model.state_dict()
    if any(".lora_" in name for name in state):
        raise UserError("This backbone holds LoRA updates, which cannot be exported separately: set export.merge=true.")
    return {name: value.contiguous() for name, value in state.items()}
