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
- `masks: palette`: a mask file holds colours. The `color` and the `colors` of a class are merged.
- `masks: binary`: a mask file holds 0 and 255: two classes, or with `task=multilabel` one class of any number.
- `masks: labels`: masks are labelled shapes of an annotation tool. A class has `labels`; without them, its own name is
  its label.
- `ignore`: the `ids`, `colors` or `labels` that are ignored.
- `background`: the class that is not an object, if any.
- `things`: the classes that have objects, for data with objects; without it, all but the background.
- `others`: the class of all numbers or labels that are not listed, such as instance IDs. Without it, `masks: ids`
  requires every number except data.ignore_index to be listed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dinoseg.data.classes.labels import as_color
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import Stamp, stamp
from dinoseg.utils.wording import format_value
from dinoseg.utils.yaml_text import read_yaml

CLASS_FILE = "classes.yaml"
NOT_DESCRIBED: dict[str, Any] = {
    **{
        "palette": None,
        "background": None,
        "things": None,
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
_KEYS = {  # of a class, by the kind of masks; `ignore` has the same, without `color`
    "ids": ("ids", "color"),
    "palette": ("color", "colors"),
    "binary": ("color",),
    LABELS: ("labels", "color"),
}


def read_class_file(path: Path, ignore_index: int) -> dict[str, Any]:
    """Return `classes` and the other keys of `NOT_DESCRIBED` in the form that the config has.

    Raises:
        UserError: the file cannot be read, is not YAML, or is inconsistent.
    """
    return _read(path, ignore_index, stamp(path))


@lru_cache(maxsize=16)
def _read(path: Path, ignore_index: int, _stamp: Stamp | None) -> dict[str, Any]:
    """Parse a file once per state, since the config interpolates each key separately."""
    try:
        return _parse_content(read_yaml(path), ignore_index)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {str(error).rstrip('.')}. Correct the file.") from None


def _parse_content(content: Any, ignore_index: int) -> dict[str, Any]:
    _check_mapping(content, "the file", ("classes", "background", "things", "others", "ignore", "masks"))
    masks, ignored = content.get("masks", "ids"), content.get("ignore", {})
    if masks not in _KEYS:
        raise ValueError(f"masks: {format_value(masks)} is unknown: choose one of {', '.join(_KEYS)}")
    classes = _classes(content.get("classes"))
    for name, entry in classes.items():
        _check_entry(entry, f"class {name}", masks, _KEYS[masks])
    _check_entry(ignored, "ignore", masks, [key for key in _KEYS[masks] if key != "color"])
    description = {**NOT_DESCRIBED, "classes": list(classes), "format": masks}
    for key in ("background", "others"):
        description[key] = content.get(key)
        if description[key] not in (None, *classes):
            raise ValueError(
                f"{key}: {format_value(description[key])} is not a class: name one of {', '.join(classes)}"
            )
    things = description["things"] = content.get("things")
    if things is not None and not (isinstance(things, list) and all(name in list(classes) for name in things)):
        raise ValueError(f"things: {format_value(things)} is not a list of classes: name some of {', '.join(classes)}")
    colors = list(map(_colors, classes.values()))
    if any(colors) and not all(colors) or masks == "palette" and not all(colors):
        bare = ", ".join(name for name, class_colors in zip(classes, colors, strict=True) if not class_colors)
        raise ValueError(f"no color for {bare}: give one to every class{' or to none' * (masks != 'palette')}")
    description["palette"] = [class_colors[0] for class_colors in colors] if any(colors) else None
    if masks == LABELS:
        description["labels"] = _labels(classes, ignored.get("labels", []))
    if masks == "ids":
        description["ids"] = _ids(classes, ignored.get("ids", []), ignore_index, description["others"]) or None
    if masks == "palette":
        description["colors"] = {
            index: class_colors[1:] for index, class_colors in enumerate(colors) if class_colors[1:]
        } or None
        description["ignore_colors"] = _colors(ignored)
    return {**description, "described": {"ids": description["ids"]}}


def _classes(node: Any) -> dict[str, dict[str, Any]]:
    """Return a mapping from class name to its `ids`, `color`, `colors` and `labels`."""
    if isinstance(node, list):
        if twice := [str(name) for name, count in Counter(node).items() if count > 1]:
            raise ValueError(f"classes names {', '.join(twice)} more than once: make each name unique")
        node = dict.fromkeys(node)
    if not isinstance(node, dict) or not node:
        raise ValueError(
            f"classes is {format_value(node)}: list names in id order, such as `classes: [background, leaf]`"
        )
    return {_name(name): {} if entry is None else entry for name, entry in node.items()}


def _name(value: Any) -> str:
    # a "${...}" would be resolved by OmegaConf and refused in the checkpoint, and it takes ??? for a missing value
    if not isinstance(value, str) or "${" in value or value.strip() in ("", "???"):
        raise ValueError(
            f"{value!r} is not a name: write text, in quotes if YAML takes it for a value, and no ??? or ${{"
        )
    return value


def _check_mapping(node: Any, where: str, keys: Sequence[str]) -> None:
    unknown = [key for key in node if key not in keys] if isinstance(node, dict) else [node]
    if unknown:
        raise ValueError(
            f"{where} has {format_value(unknown[0], 60)}: give a mapping with the keys {', '.join(keys) or 'none'}"
        )


def _check_entry(node: Any, where: str, masks: str, keys: Sequence[str]) -> None:
    """Refuse what is not a mapping of lists, with keys that have an effect for this kind of masks."""
    _check_mapping(node, f"with `masks: {masks}`, {where}", keys)
    for key, value in node.items():
        if not isinstance(value, list):
            raise ValueError(f"{key} of {where} is {format_value(value, 60)}: give a list")


def _colors(entry: Mapping[str, Any]) -> list[list[int]]:
    """Return the colours of a class; the first one is for drawing."""
    colors = [entry["color"]] if "color" in entry else []
    return [list(as_color(color)) for color in (*colors, *entry.get("colors", []))]


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
        name: entry.get("ids", []) if named else [position] for position, (name, entry) in enumerate(classes.items())
    }
    owners = _map_to_owner([*file_ids.items(), ("ignore", ignored)])
    table = dict.fromkeys(ignored, ignore_index)
    if named:
        order = {name: position for position, name in enumerate(classes)}
        table |= {number: order[name] for number, name in owners.items() if number not in table}
        rest = -1 if others is None else order[others]
        table |= {number: rest for number in range(len(classes)) if number not in table and number != ignore_index}
    return table


def _labels(classes: Mapping[str, Mapping[str, Any]], ignored: Sequence[str]) -> dict[str, str]:
    """Return a mapping from label to class, or to `ignore`."""
    labels = {name: list(map(_name, entry.get("labels", [name]))) for name, entry in classes.items()}
    return _map_to_owner([*labels.items(), ("ignore", list(map(_name, ignored)))])


def _map_to_owner(values: Iterable[tuple[str, Sequence[Any]]]) -> dict[Any, str]:
    """Return a mapping from each value to its class, or to `ignore`."""
    owners: dict[Any, str] = {}
    for owner, own_values in values:
        for value in own_values:
            if value in owners:
                raise ValueError(
                    f"{format_value(value)} is given for {owners[value]} and for {owner}: keep one of them"
                )
            owners[value] = owner
    return owners
