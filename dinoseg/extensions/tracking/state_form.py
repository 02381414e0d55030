"""Validation of tracker states read from disk: tensor names, dtypes, shapes and value ranges."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class TensorForm(NamedTuple):
    """Expected dtype, shape and value range of a tensor; values must be finite.

    Args:
        dtype: expected dtype; None: any floating-point dtype.
        shape: axes, such as `2 H W`; an axis letter has the same length in all tensors of a state.
        least: minimum value.
        most: maximum value.
    """

    dtype: torch.dtype | None
    shape: str
    least: float = -math.inf
    most: float = math.inf


def check_state(state: Mapping[str, Tensor], forms: Mapping[str, TensorForm]) -> None:
    """Check that a state has the expected tensors.

    Raises:
        ValueError: a tensor is missing, unknown or of another form.
    """
    if state.keys() != forms.keys():
        raise ValueError(f"it holds {', '.join(sorted(state)) or 'nothing'} instead of {', '.join(sorted(forms))}")
    lengths: dict[str, int] = {}
    for name, form in forms.items():
        value, axes = state[name], form.shape.split()
        has_shape = len(axes) == value.ndim and all(
            length == (int(axis) if axis.isdecimal() else lengths.setdefault(axis, length)) and length > 0
            for axis, length in zip(axes, value.shape, strict=True)
        )
        right = value.is_floating_point() if form.dtype is None else value.dtype == form.dtype
        if not (right and has_shape):
            wanted = f"{form.dtype or 'of floating point'} [{form.shape}]"
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)} instead of {wanted}")
        low, high = (float(bound) for bound in torch.aminmax(value))
        if not (form.least <= low <= high <= form.most and math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} holds numbers from {low} to {high}; allowed are {form.least} to {form.most}")
