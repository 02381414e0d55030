"""Class names, their colours and the ignored id, validated once for all datasets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from dinoseg.report.palette import default_palette, layer_colours
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

Color = tuple[int, int, int]
LONGEST_NAME = 100  # characters of a class name


@dataclass(frozen=True)
class Labels:
    """Meaning of the ids in a mask; class id i is `classes[i]`, shown in `palette[i]`."""

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    ignore_index: int

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        palette: Iterable[Sequence[int]] | None,
        ignore_index: int,
        *,
        has_layers: bool = False,
    ) -> Labels:
        """Validate and freeze the classes of a config.

        Classes with layers get no black, which stands for pixels of no class.

        Raises:
            UserError: the classes are no list; there is no class or over 255; a name is repeated, empty, long or not
                printable; colours and classes differ in number; a colour or ignore_index is outside 0..255.
        """
        # a set has another order in each process
        is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
        names = tuple(map(str, classes)) if is_list else ()
        has_odd = any(not (0 < len(name) <= LONGEST_NAME and name.isprintable()) for name in names)
        if not 1 <= len(names) <= 255 or has_odd:
            raise UserError(
                f"data.classes={format_value(classes)}: give a list of 1 to 255 names, since masks are 8-bit, each of "
                f"1 to {LONGEST_NAME} printable characters."
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"data.classes names {', '.join(twice)} more than once: make each name unique.")
        if not isinstance(ignore_index, Integral) or ignore_index not in range(256):
            raise UserError(
                f"data.ignore_index={format_value(ignore_index)}: give an id from 0 to 255, since masks are 8-bit."
            )
        if palette is None:
            colors = tuple(default_palette(len(names) + has_layers)[has_layers:])
        else:
            colors = tuple(map(as_color, palette)) if isinstance(palette, Iterable) else ()
        if len(colors) != len(names):
            raise UserError(
                f"data.palette has {len(colors)} colours for {len(names)} classes: give one per class, or null."
            )
        return cls(names, tuple(layer_colours(colors)) if has_layers else colors, int(ignore_index))


def as_color(values: Sequence[int]) -> Color:
    """Return (red, green, blue), each 0..255.

    Raises:
        UserError: the values are not three whole numbers in that range.
    """
    numbers = tuple(values) if isinstance(values, Iterable) else ()
    if len(numbers) != 3 or not all(isinstance(v, Integral) and 0 <= v <= 255 for v in numbers):
        raise UserError(f"Colour {format_value(values)}: give three whole numbers from 0 to 255 (red, green, blue).")
    return int(numbers[0]), int(numbers[1]), int(numbers[2])
