"""Limits for plain values in a checkpoint's config: no paths to write to, and no sizes beyond ours."""

import math
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.plain import KeyPath, dotted_name, resolve_node, walk
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import LEARNING_RATES
from dinoseg.utils.wording import format_value

REMEDY = "Do not use this file unless you know who made it"
_MOST_STEPS = 2**40  # optimizer steps: they are compared with, and size nothing
LARGEST: Mapping[KeyPath, float] = {  # maximum of a number at or below a key; the longest matching key counts
    **{("seed",): 2**63 - 1, ("resolution",): 2**14, ("resolution", "scale"): 16},
    **{("head", "iterations"): 2**8, ("head", "first_iterations"): 2**8, ("resolution", "longest"): 2**20},
    **dict.fromkeys([("backbone",), ("adapter",), ("head",)], 2**16),
    **{("data",): 2**20, ("data", "workers"): 2**8, ("data", "batch_size"): 2**16, ("loss",): 2**20},
    **dict.fromkeys([("trainer",), ("optim",), ("head", "anneal")], _MOST_STEPS),
    **{("inference",): 2**14, ("inference", "scales"): 16, ("inference", "batch_size"): 2**10},
    **dict.fromkeys([("head", "lr"), ("adapter", "lr"), ("optim", "optimizer", "lr")], LEARNING_RATES.most),
}
_LARGEST_ELSEWHERE = 2**20
_MAX_PIXELS = 2**30  # of all images of a training batch
_LONGEST_TEXT = 4096
_TRACKED = ("data", "tracking", "folder")  # folder for masks of tracked videos, below the run folder


def check_text(text: str, what: str) -> None:
    """Refuse a text of the file that is too long, or that is not plain.

    Args:
        text: content of the file.
        what: file, key and value, for the message.
    """
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{what} has {len(text)} characters, above the limit of {_LONGEST_TEXT}. {REMEDY}.")
    if "${" in text:
        raise UserError(f"{what}: this interpolation is refused. A checkpoint stores plain values only.")


def check_value(value: Any, key_path: KeyPath, what: str) -> None:
    """Refuse a value that writes elsewhere or requests too much."""
    if key_path == _TRACKED and isinstance(value, str):
        if not re.fullmatch(r"\w+(/\w+)*", value):
            raise UserError(
                f"{what} is refused. A config from a checkpoint may only name folders below its run folder."
            )
    elif key_path == _TRACKED:
        raise UserError(f"{what} is refused: it is not a folder name. {REMEDY}.")
    if value is None or isinstance(value, bool | str | list | Mapping):
        return
    if not isinstance(value, int | float):
        raise UserError(
            f"{what} is of type {type(value).__name__}; a config from a checkpoint holds plain values only."
        )
    most = _largest(key_path)
    if not abs(value) <= most:
        raise UserError(f"{what} is refused: a checkpoint may set at most {most}. {REMEDY}.")


def check_numbers(values: Mapping[str, Any]) -> None:
    """Refuse numbers of a run's config that `check_value` refuses in its checkpoint: it could not be resumed."""
    for key_path, value in walk(values):
        if isinstance(value, int | float) and not abs(value) <= (most := _largest(key_path)):
            raise UserError(
                f"{dotted_name(key_path)}={format_value(str(value))} is out of range: a run with it could not be "
                f"resumed. Give {f'{most} at most' if abs(value) < math.inf else 'a finite number'}."
            )


def _largest(key_path: KeyPath) -> float:
    above = (LARGEST[key_path[:end]] for end in range(len(key_path), 0, -1) if key_path[:end] in LARGEST)
    return next(above, _LARGEST_ELSEWHERE)


def check_batch(whole: DictConfig, where: str) -> None:
    """Refuse training batches with more pixels than any machine can hold, even if each factor is small enough."""
    crop, batch = (resolve_node(whole, key_path) for key_path in (("resolution", "crop"), ("data", "batch_size")))
    frames = resolve_node(whole, ("data", "clips", "cut", "length"))
    sizes = [*(crop if isinstance(crop, list) else [crop]), batch, frames]
    pixels = math.prod(abs(size) for size in sizes if isinstance(size, int | float))
    if pixels > _MAX_PIXELS:
        raise UserError(
            f"{where}: resolution.crop={crop} with data.batch_size={batch} is refused: a checkpoint may set batches of "
            f"at most {_MAX_PIXELS} pixels. {REMEDY}."
        )
