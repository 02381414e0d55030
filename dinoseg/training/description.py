"""What a checkpoint says of itself, checked where it is read: each thing of its type, nothing deep, nothing huge."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dinoseg.data.classes.labels import LONGEST_NAME
from dinoseg.errors import UserError
from dinoseg.wording import shown

FORMAT = 1
MODEL = ("backbone", "adapter", "head", "loss", "optim", "trainer")  # groups that a checkpoint fixes
GROUPS = ("resolution", "data", *MODEL)
CHOSEN = ("hparam", "data", *MODEL)
_LARGEST = 2**20  # letters of a description
_DEEPEST = 32
IDLE = "idle"  # of `last`: how many parameters had no optimizer state; older ones do not say
_COUNTS = ("step", "best_step", "stale")


def read_description(text: str | None, path: Path) -> dict[str, Any]:
    """Return the description in a safetensors file's header.

    Raises:
        UserError: there is none, it is of a newer format, or something in it is not what dinoseg writes.
    """
    where = f"resume={path}"
    if text is not None and len(text) > _LARGEST:
        raise UserError(f"{where}: its description has {len(text)} letters, above the most, {_LARGEST}. {_OTHER}")
    try:
        info = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its description cannot be read ({type(error).__name__}). {_OTHER}") from error
    if not isinstance(info, dict):
        raise UserError(f"{where}: a safetensors file, but not a checkpoint of dinoseg. {_OTHER}")
    absent = [key for key in RULES if key not in info]
    if absent:
        raise UserError(f"{where}: its description lacks {', '.join(absent)}. {_OTHER}")
    if not _is_shallow(info):
        raise UserError(f"{where}: its description is nested deeper than {_DEEPEST} levels. {_OTHER}")
    for key, (fits, rule) in RULES.items():
        if key == "format" and _is_count(info[key]) and info[key] > FORMAT:
            raise UserError(
                f"{where}: written in format {info[key]}, and this dinoseg reads up to {FORMAT}. Update dinoseg."
            )
        if not fits(info[key]):
            raise UserError(f"{where}: its {key} is {shown(info[key])}, and must be {rule}. {_OTHER}")
    if not _is_count(info.get(IDLE, 0)):
        raise UserError(f"{where}: its {IDLE} is {shown(info[IDLE])}, and must be a whole number. {_OTHER}")
    if len(info["palette"]) != len(info["classes"]):
        raise UserError(
            f"{where}: it has {len(info['palette'])} colours for {len(info['classes'])} classes, and must have one for "
            f"each. {_OTHER}"
        )
    return info


def _is_shallow(node: Any) -> bool:
    """Return whether nothing lies deeper than `_DEEPEST`, without going deeper."""
    level = [node]
    for _ in range(_DEEPEST):
        level = [
            value
            for each in level
            if isinstance(each, dict | list)
            for value in (each.values() if isinstance(each, dict) else each)
        ]
    return not level


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_config(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("seed"))
        and all(isinstance(value.get(group), dict) for group in GROUPS)
    )


def _is_progress(value: Any) -> bool:
    best = value.get("best") if isinstance(value, dict) else ""
    return (
        isinstance(value, dict)
        and value.keys() <= {*_COUNTS, "best", "owed"}
        and all(_is_count(value[key]) for key in _COUNTS if key in value)
        and isinstance(value.get("owed", False), bool)
        and (best is None or (isinstance(best, int | float) and not isinstance(best, bool) and abs(best) < math.inf))
    )


def _is_choices(value: Any) -> bool:
    """Return whether each group has an option, which is no interpolation: it goes into the config as it is."""
    chosen = _maps_texts(value) and all(group in value for group in CHOSEN)
    return chosen and not any("${" in option or option == "???" for option in value.values())


def _maps_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and _is_text(option) for key, option in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 255 and all(map(_is_text, value))


def _are_colours(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(colour, list) and len(colour) == 3 and all(_is_count(part) and part <= 255 for part in colour)
        for colour in value
    )


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_count, "a whole number"),
    "progress": (
        _is_progress,
        f"finite numbers of {', '.join(_COUNTS)} and best, and nothing unknown",
    ),
    "frozen": (_maps_texts, "a hash for backbone and for head"),
    "config": (_is_config, f"a seed and the groups {', '.join(GROUPS)}, each with its keys"),
    "choices": (_is_choices, f"an option of each of {', '.join(CHOSEN)}"),
    "folder": (lambda value: isinstance(value, str) and 0 < len(value) <= 4096 and "\0" not in value, "a folder"),
    "classes": (_are_classes, f"1 to 255 names of at most {LONGEST_NAME} letters that can be printed"),
    "palette": (_are_colours, "colours, each of three whole numbers from 0 to 255"),
    "ignore_index": (lambda value: _is_count(value) and value <= 255, "a whole number from 0 to 255"),
}
_OTHER = "Choose another checkpoint."
