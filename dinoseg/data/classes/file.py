"""Reader of `classes.yaml`, which describes the classes of a dataset: names, colours, merged and ignored ids.

    classes:
      background: {ids: [0], color: [0, 0, 0]}
      leaf: {ids: [1, 2], color: [0, 255, 0]}    # the numbers 1 and 2 in a mask file are one class
    background: background
    ignore: {ids: [7]}
    masks: ids

- `classes`: a mapping in id order, or a list of names alone.
- `masks: ids` (the default): a mask file holds numbers. `ids` lists those of a class; without it, a class has its
  position. `color` is only for drawing.
- `masks: palette`: a mask file holds colours. A class has a `color`, or several `colors` that are merged.
- `masks: binary`: a mask file holds 0 and 255: two classes, or with `task=multilabel` one class of any number.
- `masks: labels`: masks are labelled shapes of an annotation tool. A class has `labels`; without them, its own name is
  its label.
- `ignore`: the `ids`, `colors` or `labels` that are ignored.
- `background`: the class that is not an object, if any.
- `others`: the class of all numbers or labels that are not listed, such as instance IDs. Without it, `masks: ids`
  requires every number except data.ignore_index to be listed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from dinoseg.data.classes.labels import as_color
from dinoseg.data.classes.mask_advice import HIGHEST_ID
from dinoseg.data.classes.masks import MaskFormat
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import Stamp, check_regular, stamp
from dinoseg.utils.forms import SchemaError
from dinoseg.utils.yaml_text import read_yaml

CLASS_FILE = "classes.yaml"
NOT_DESCRIBED: dict[str, Any] = {
    **{
        "palette": None,
        "background": None,
        "format": "ids",
        "ids": None,
        "others": None,
        "labels": None,
        "colors": None,
        "ignore_colors": [],
    },
    "described": None,
}
LABELS = "labels"  # masks are labelled shapes in a file of an annotation tool
_LARGEST = 65536  # bytes: 255 classes need a quarter of it


def read_class_file(path: Path, ignore_index: int) -> dict[str, Any]:
    """Return `classes` and the other keys of `NOT_DESCRIBED` in the form that the config has.

    Raises:
        UserError: the file cannot be read, is too large, is not YAML, or is inconsistent.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check data.root.") from None
    return _read(path, ignore_index, stamp(path))


@lru_cache(maxsize=16)
def _read(path: Path, ignore_index: int, _stamp: Stamp | None) -> dict[str, Any]:
    """Parse a file once per state, since the config interpolates each key separately."""
    try:
        return _parse_content(read_yaml(path, _LARGEST), ignore_index)
    except (OSError, SchemaError) as error:
        raise UserError(f"Cannot read {path}: {error}. Correct the file.") from None
    except ValueError as error:
        raise UserError(f"{path}: {str(error).rstrip('.')}.") from None


def _parse_content(content: Any, ignore_index: int) -> dict[str, Any]:
    whole = _check_mapping(content, "the file", ("classes", "background", "others", "ignore", "masks"))
    classes = _classes(whole.get("classes"))
    ignored = _check_mapping(whole.get("ignore", {}), "ignore", ("ids", "colors", "labels"))
    masks = whole.get("masks", "ids")
    formats = (*get_args(MaskFormat), LABELS)
    if masks not in formats:
        raise ValueError(f"masks: {masks} is unknown: choose one of {', '.join(formats)}")
    _refuse_idle(classes, ignored, masks)
    colors = [_colors(entry, f"class {name}") for name, entry in classes.items()]
    if any(colors) and not all(colors) or masks == "palette" and not all(colors):
        bare = ", ".join(name for name, class_colors in zip(classes, colors, strict=True) if not class_colors)
        raise ValueError(f"no color for {bare}: give one to every class{' or to none' * (masks != 'palette')}")
    description = {**NOT_DESCRIBED, "classes": list(classes), "format": masks, "background": whole.get("background")}
    if description["background"] not in (None, *classes):
        raise ValueError(
            f"background: {description['background']} is not a class: name one of {', '.join(classes)}, or none"
        )
    description["palette"] = [class_colors[0] for class_colors in colors] if any(colors) else None
    description["others"] = others = whole.get("others")
    if others not in (None, *classes):
        raise ValueError(f"others: {others} is not a class: name one of {', '.join(classes)}")
    if others is not None and masks not in ("ids", LABELS):
        raise ValueError(f"others has no effect with masks: {masks}: remove it, or write `masks: ids`")
    if masks == LABELS:
        description["labels"] = _labels(classes, ignored)
    if masks == "ids":
        unnamed = _whole_numbers(ignored.get("ids", []), "ignore")
        description["ids"] = _ids(classes, unnamed, ignore_index, others) or None
    if masks == "palette":
        unseen = _colors(ignored, "ignore")
        owners = [
            (tuple(color), name) for name, class_colors in zip(classes, colors, strict=True) for color in class_colors
        ]
        _refuse_shared([*owners, *((tuple(color), "ignore") for color in unseen)], "colour")
        description["colors"] = {
            index: class_colors[1:] for index, class_colors in enumerate(colors) if class_colors[1:]
        } or None
        description["ignore_colors"] = unseen
    return {**description, "described": {"ids": description["ids"]}}


def _classes(node: Any) -> dict[str, dict[str, Any]]:
    """Return a mapping from class name to its `ids`, `color`, `colors` and `labels`."""
    example = "list names in id order, such as `classes: [background, leaf]`"
    if isinstance(node, list):
        if twice := [str(name) for name, count in Counter(map(str, node)).items() if count > 1]:
            raise ValueError(f"classes names {', '.join(twice)} more than once: make each name unique")
        node = dict.fromkeys(map(_name, node))
    if not isinstance(node, dict) or not node:
        raise ValueError(f"classes is {node if node else 'not given'}: {example}")
    keys = ("ids", "color", "colors", "labels")
    return {
        _name(name): _check_mapping({} if entry is None else entry, f"class {name}", keys)
        for name, entry in node.items()
    }


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not a class name: YAML reads it as {type(value).__name__}. Write it in quotes")
    if "${" in value or value.strip() == "???":
        raise ValueError(
            f"{value!r} is not a class name: it would be read as a reference or a missing value. Rename it"
        )
    return value


def _check_mapping(node: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise ValueError(f"{where} holds {node!r:.60}; it must be a mapping with the keys {', '.join(keys)}")
    if unknown := [str(key) for key in node if key not in keys]:
        raise ValueError(f"{where} has the unknown keys {', '.join(unknown)}: it takes {', '.join(keys)}")
    return node


def _refuse_idle(classes: Mapping[str, Mapping[str, Any]], ignored: Mapping[str, Any], masks: str) -> None:
    """Raise a ValueError for keys without effect for this kind of mask."""
    idle = {
        "ids": ("colors", "labels"),
        "palette": ("ids", "labels"),
        "binary": ("ids", "colors", "labels"),
        LABELS: ("ids", "colors"),
    }[masks]
    user = {"colors": "palette", "ids": "ids", "labels": LABELS}
    for where, entry in [*((f"class {name}", entry) for name, entry in classes.items()), ("ignore", ignored)]:
        if idle_keys := [key for key in idle if key in entry]:
            remedy = f"remove it, or write `masks: {user[idle_keys[0]]}`"
            raise ValueError(f"{idle_keys[0]} of {where} has no effect with masks: {masks}: {remedy}")


def _colors(entry: Mapping[str, Any], where: str) -> list[list[int]]:
    """Return the colours of a class; the first one is for drawing."""
    if "color" in entry and "colors" in entry:
        raise ValueError(f"{where} has both color and colors: give one of them")
    colors = [entry["color"]] if "color" in entry else entry.get("colors", [])
    if not isinstance(colors, list) or not all(isinstance(color, list) for color in colors):
        raise ValueError(
            f"the colours of {where} are {colors!r:.60}: give color: [r, g, b] or colors: [[r, g, b], ...]"
        )
    return [list(as_color(color)) for color in colors]


def _whole_numbers(numbers: Any, where: str) -> list[int]:
    if not isinstance(numbers, list) or not all(
        type(number) is int and 0 <= number <= HIGHEST_ID for number in numbers
    ):
        raise ValueError(f"the ids of {where} are {numbers!r:.60}: give a list of numbers from 0 to {HIGHEST_ID}")
    return numbers


def _ids(
    classes: Mapping[str, Mapping[str, Any]], ignored: Sequence[int], ignore_index: int, others: str | None
) -> dict[int, int]:
    """Return file id to class id, ignore_index, or -1 for a rejected id.

    The class of all `others` needs no ids.
    """
    named = [name for name, entry in classes.items() if "ids" in entry]
    if named and (bare := [name for name in classes if name not in (*named, others)]):
        raise ValueError(
            f"no ids for {', '.join(bare)}: give ids to every class, or to none to number them by position"
        )
    file_ids = {
        name: _whole_numbers(entry.get("ids", []), f"class {name}") if named else [position]
        for position, (name, entry) in enumerate(classes.items())
    }
    owners = [(number, name) for name, numbers in file_ids.items() for number in numbers]
    _refuse_shared([*owners, *((number, "ignore") for number in ignored)], "id")
    table = dict.fromkeys(ignored, ignore_index)
    if named:
        order = {name: position for position, name in enumerate(classes)}
        table |= {number: order[name] for number, name in owners}
        rest = -1 if others is None else order[others]
        table |= {number: rest for number in range(len(classes)) if number not in table and number != ignore_index}
    return table


def _labels(classes: Mapping[str, Mapping[str, Any]], ignored: Mapping[str, Any]) -> dict[str, str]:
    """Return a mapping from label to class, or to `ignore`."""
    texts = {name: _texts(entry.get("labels", [name]), f"class {name}") for name, entry in classes.items()}
    unseen = _texts(ignored.get("labels", []), "ignore")
    owners = [(label, name) for name, labels in texts.items() for label in labels]
    _refuse_shared([*owners, *((label, "ignore") for label in unseen)], "label")
    return dict(owners) | dict.fromkeys(unseen, "ignore")


def _texts(labels: Any, where: str) -> list[str]:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"the labels of {where} are {labels!r:.60}: give a list of names")
    return labels


def _refuse_shared(owners: Iterable[tuple[Any, str]], what: str) -> None:
    first: dict[Any, str] = {}
    for value, owner in owners:
        if value in first:
            raise ValueError(f"the {what} {value} is given for {first[value]} and for {owner}: keep one of them")
        first[value] = owner
