"""What to do about a mask that holds what is no class: told by the values, the same in every message."""

from collections.abc import Collection, Sequence

HIGHEST_ID = 65535  # 16-bit files are the widest in use
_LOSSY_MARGIN = 16  # how far JPEG commonly moves a 0 or a 255
_MOST = 20  # more foreign ids than that are no oversight in a table


def for_ids(foreign: Collection[int], ignore_index: int, *, described: bool) -> str:
    """Return what to do about numbers without class; `described` where `classes.yaml` says which are classes."""
    numbers = sorted(int(number) for number in foreign)
    if len(numbers) > _MOST or numbers[0] < 0 or numbers[-1] > HIGHEST_ID:
        return (
            "So many, or such, numbers are hardly class ids: check that these files are the masks, data.classes and "
            "data.reader.masks.format."
        )
    if described:
        return (
            "Correct the masks, or name the ids in classes.yaml of data.root: under the class that they belong to, or "
            f"`ignore: {{ids: {numbers}}}`."
        )
    table = ", ".join(f"{number}: {ignore_index}" for number in numbers)
    return (
        f"Correct the masks, or map the ids, here so that they are ignored: '++data.reader.masks.ids={{{table}}}' (in "
        f"these quotes; a class id instead of {ignore_index} where they belong to one)."
    )


def for_colors(foreign: Sequence[Sequence[int]], *, described: bool) -> str:
    """Return what to do about colours (R, G, B) without class."""
    colors = [list(color) for color in foreign]
    if not 1 <= len(colors) <= _MOST:
        return "Correct the masks: so many colours are not those of classes. JPEG and smooth resizing make them."
    if described:
        return (
            "Correct the masks (JPEG cannot hold one), or name the colours in classes.yaml of data.root: among the "
            f"colors of a class, or `ignore: {{colors: {colors}}}`."
        )
    return (
        "Correct the masks (JPEG cannot hold one), complete data.palette, or ignore the colours: "
        f"'data.reader.masks.ignore_colors={colors}' (in these quotes)."
    )


def for_binary(values: Collection[int], *, described: bool) -> str:
    """Return what to do about masks with these values, which are more than 0 and 255."""
    near_white = any(255 - _LOSSY_MARGIN <= value < 255 for value in values)
    near_black = any(0 <= value <= _LOSSY_MARGIN for value in values)
    if near_white and near_black:
        return "Values near 0 and near 255 are what lossy compression leaves: threshold at 128 and save as PNG."
    remedy = "say `masks: ids` in classes.yaml" if described else "set data.reader.masks.format=ids"
    return f"They look like class numbers, which thresholding would destroy: {remedy}, and name all classes."
