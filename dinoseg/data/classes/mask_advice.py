"""Advice on masks with values that are no class, identical in every message."""

import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence

HIGHEST_ID = 65535  # 16-bit files are the widest in common use
_LOSSY_MARGIN = 16  # JPEG commonly moves a 0 or a 255 by up to this
MAX_IDS = 20  # more unknown ids are no mere gap in a table
_PALETTE = "data.reader.masks.format=palette"
_WORDS = ("null", "true", "false", "nan", "inf")  # YAML values that the command line would not take for text


def for_ids(foreign: Collection[int], ignore_index: int, *, described: bool, next_id: int | None = None) -> str:
    """Return advice on ids without class: names first, since ignoring or merging classes changes every score.

    Args:
        foreign: the ids.
        ignore_index: the ignored class id.
        described: whether `classes.yaml` lists the ids.
        next_id: the id of the next class that is named; None if ids are mapped, or stand for no further class.
    """
    numbers = sorted(int(number) for number in foreign)
    if len(numbers) > MAX_IDS or numbers[0] < 0 or numbers[-1] > HIGHEST_ID:
        return (
            "These numbers do not look like class ids: check that these files are the masks, and check data.classes "
            "and data.reader.masks.format."
        )
    if described:
        return (
            "Correct the masks, or add the ids to classes.yaml of data.root: to their class, which may be a new one, "
            f"or as `ignore: {{ids: {numbers}}}`."
        )
    table = ", ".join(f"{number}: {ignore_index}" for number in numbers)
    mapping = (
        f"map the ids. To ignore them: '++data.reader.masks.ids={{{table}}}' (with these quotes); to use one, give its "
        f"class id instead of {ignore_index}."
    )
    if next_id is None:
        return f"Correct the masks, or {mapping}"
    follow = numbers == [*range(next_id, next_id + len(numbers))]
    where = "in the order of the ids" if follow else "and map each id to the place of its name, counted from 0"
    return f"If they are classes, add their names to data.classes, {where}. Otherwise correct the masks, or {mapping}"


def for_colors(foreign: Sequence[Sequence[int]], *, described: bool) -> str:
    """Return advice on colours (R, G, B) without class."""
    colors = [list(color) for color in foreign]
    if not 1 <= len(colors) <= MAX_IDS:
        return "Correct the masks: there are more colours than classes. JPEG and smooth resizing add colours."
    if described:
        return (
            "Correct the masks (JPEG cannot store class ids), or add the colours to classes.yaml of data.root: to the "
            f"colors of a class, which may be a new one, or as `ignore: {{colors: {colors}}}`."
        )
    return (
        "If they are classes, add them to data.classes and data.palette. Otherwise correct the masks (JPEG cannot "
        "store class ids), or ignore the colours: "
        f"'data.reader.masks.ignore_colors={colors}' (with these quotes)."
    )


def for_binary(values: Collection[int], *, described: bool) -> str:
    """Return advice on binary masks that hold more values than 0 and 255."""
    near_white = any(255 - _LOSSY_MARGIN <= value < 255 for value in values)
    near_black = any(0 <= value <= _LOSSY_MARGIN for value in values)
    if near_white and near_black:
        return "Values near 0 and near 255 come from lossy compression: threshold at 128 and save as PNG."
    remedy = "write `masks: ids` in classes.yaml" if described else "set data.reader.masks.format=ids"
    return f"They look like class numbers, which thresholding would destroy: {remedy}, and name all classes."


def for_instances(name: str, *, described: bool) -> str:
    """Return advice on ids that look like numbers of objects, where each may be an object of the class `name`."""
    remedy = (
        f"add this line to classes.yaml: `others: {json.dumps(name, ensure_ascii=False)}`"
        if described
        else f"add this to the command line: `{_override('++data.reader.masks.others', name)}`"
    )
    return f"They may be instances. If each number is one {name}, {remedy}. Every other id is then {name}."


def for_coloured(counts: Mapping[tuple[int, ...], int], classes: Sequence[str], *, described: bool) -> str:
    """Return advice on coloured masks that are read as ids; `counts`: pixels of each colour."""
    if len(counts) > MAX_IDS:
        return (
            "There are more colours than classes: JPEG and smooth resizing add colours, or images and masks are "
            "swapped. Save the masks again, as PNG and without smoothing."
        )
    if len(counts) < len(classes):
        return (
            f"They hold {len(counts)} colours for {len(classes)} classes. Save them as grey images of class ids, or "
            f"set the colour of each class: {'`masks: palette` in classes.yaml' if described else _PALETTE}."
        )
    order = sorted(counts, key=lambda color: (color != (0, 0, 0), -counts[color]))
    colors = [list(color) for color in order[: len(classes)]]
    rest = [list(color) for color in order[len(classes) :]]
    if described:
        entries = {name: {"color": color} for name, color in zip(classes, colors, strict=True)}
        content = {"classes": entries, **({"ignore": {"colors": rest}} if rest else {}), "masks": "palette"}
        line = f"replace the content of classes.yaml with: `{json.dumps(content, ensure_ascii=False)}`"
    else:
        ignored = f" 'data.reader.masks.ignore_colors={_format_colors(rest)}'" if rest else ""
        line = f"add this to the command line: `{_PALETTE} 'data.palette={_format_colors(colors)}'{ignored}`"
    meaning = ", ".join(f"{tuple(color)} {name}" for name, color in zip(classes, colors, strict=True))
    names = "If each colour is a class, name them all first. " if rest else ""
    return (
        f"{names}If their colours stand for classes, {line}. This assigns {meaning}{_also(rest)}, by their number of "
        "pixels: compare with the images, and correct the order."
    )


def _also(ignored: Sequence[Sequence[int]]) -> str:
    return f", and {', '.join(str(tuple(color)) for color in ignored)} ignored" if ignored else ""


def _format_colors(colors: Sequence[Sequence[int]]) -> str:
    return json.dumps(colors, separators=(",", ":"))


def _override(key: str, value: str) -> str:
    """Return an override of the command line, quoted for the shell."""
    plain = re.fullmatch(r"[A-Za-z_][\w-]*", value, re.ASCII) and value.lower() not in _WORDS
    escaped = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + ('\\"' if match[2] else ""), value)
    quoted = value if plain else f'"{escaped}"'
    return shlex.quote(f"{key}={quoted}")
