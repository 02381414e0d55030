"""Limits for plain values in a checkpoint's config: no paths to write to, and no sizes beyond ours."""

import math
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.plain import BUILDS, KeyPath, dotted_name, resolve_node, walk
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import LEARNING_RATES
from dinoseg.utils.wording import format_override, format_text

REMEDY = "Do not use this file unless you know who made it"
_MOST_STEPS = 2**40  # optimizer steps: they are compared with, and size nothing
LARGEST: Mapping[KeyPath, float] = {  # maximum of a number at or below a key; the longest matching key counts
    **{("seed",): 2**63 - 1, ("resolution",): 2**14, ("resolution", "scale"): 16},
    **{("head", "iterations"): 2**8, ("head", "first_iterations"): 2**8, ("resolution", "longest"): 2**20},
    **dict.fromkeys([("backbone",), ("adapter",), ("head",)], 2**16),
    **{("data",): 2**20, ("data", "workers"): 2**8, ("data", "batch_size"): 2**16, ("loss",): 2**20},
    **dict.fromkeys([("trainer",), ("optim",), ("head", "anneal")], _MOST_STEPS),
    **{("inference",): 2**14, ("inference", "scales"): 16, ("inference", "batch_size"): 2**10},
    ("inference", "min_region"): 2**31,
    **dict.fromkeys([("head", "lr"), ("adapter", "lr"), ("optim", "optimizer", "lr")], LEARNING_RATES.most),
}
_LARGEST_ELSEWHERE = 2**20
_MAX_PIXELS = 2**30  # of all images of a training batch
_LONGEST_TEXT = 4096
_MAX_VALUES = 5_000  # OmegaConf takes half a minute for 15,000; our largest config holds a thousand values
_CLASS_WEIGHTS = ("loss", "weights")  # its keys are class names, with any letters and signs
_TRACKED = ("data", "tracking", "folder")  # folder for masks of tracked videos, below the run folder


def check_values(values: Mapping[str, Any], where: str, remedy: str) -> None:
    """Refuse what no checkpoint may set: keys that build something, interpolations, and values out of bounds.

    Args:
        values: plain, by root key.
        where: name of the file or config in errors.
        remedy: last sentence of errors.

    Raises:
        UserError: naming the key and its value.
    """
    for count, (key_path, value) in enumerate(walk(values)):
        if count > _MAX_VALUES or not (_is_key(key_path) and _is_allowed(value, key_path)):
            what = f"{format_text(dotted_name(key_path))}={format_text(format_override(value))}"
            raise UserError(
                f"{where}: {what} is refused: saved configs set no key that builds something, at most {_MAX_VALUES} "
                f"values, numbers up to {_largest_number(key_path)}, short text without ${{, and folders below the run "
                f"folder. {remedy}."
            )


def _is_key(key_path: KeyPath) -> bool:
    """Return whether a checkpoint may hold a key: text that builds nothing; in names of classes, `_` may be first."""
    key = key_path[-1] if key_path else "config"
    if not isinstance(key, str):
        return True  # a position in a list
    hidden = key in BUILDS if key_path[:-1] == _CLASS_WEIGHTS else key.startswith("_")
    return key.isprintable() and key != "" and not hidden


def _is_allowed(value: Any, key_path: KeyPath) -> bool:
    """Return whether a value is within the bounds; those of lists and mappings are checked one by one."""
    if key_path == _TRACKED:
        return isinstance(value, str) and re.fullmatch(r"\w+(/\w+)*", value) is not None
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT and "${" not in value
    return not isinstance(value, int | float) or abs(value) <= _largest_number(key_path)


def _largest_number(key_path: KeyPath) -> float:
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
