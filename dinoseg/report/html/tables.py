"""Tables that mouse and keyboard sort, and the marks that stand in their cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.report.html.page import text


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and what it is sorted by.

    Args:
        html: escaped.
        value: a number, plain text, or None where it is undefined: those stay last.
    """

    html: str
    value: float | str | None


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], caption: str = "") -> str:
    """Return a table of which the first cell of a row names it.

    Args:
        heads: name and kind (`number`, `text`, or `long` text that wraps) of each column, plain text; `plain` ones do
            not sort.
        rows: a cell for each column.
        caption: plain text.
    """
    head = "".join(
        f'<th scope="col" class="{kind}"' + ("" if kind == "plain" else f' data-kind="{kind}"') + f">{text(name)}</th>"
        for name, kind in heads
    )
    kinds = [kind for _, kind in heads]
    body = "\n".join("<tr>" + "".join(map(_cell, row, kinds, range(len(row)))) + "</tr>" for row in rows)
    told = f"<caption>{text(caption)}</caption>" if caption else ""
    # a box that scrolls has to be reached by keys, too
    label = text(caption or heads[0][0])
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{told}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def plain_cell(value: object) -> Cell:
    """Return a cell of plain text, sorted by it."""
    return Cell(text(value), str(value))


def number_cell(value: float | None, shown: str) -> Cell:
    """Return a cell that shows a number, sorted by it."""
    return Cell(text(shown), value)


def class_cell(name: str, colour: Sequence[int]) -> Cell:
    """Return a cell that names a class in its colour."""
    levels = ", ".join(str(int(level)) for level in colour)
    return Cell(f'<span class="swatch" style="background: rgb({levels})"></span>{text(name)}', name)


def whisker(value: float | None, limits: Sequence[float] | None, ends: tuple[float, float] = (0.0, 1.0)) -> Cell:
    """Return a cell that draws a value and its interval between the ends of a scale, with 0 marked if it is inside."""
    if value is None:
        return Cell("", None)
    low, high = ends

    def place(number: float) -> float:
        return round(100 * (min(max(number, low), high) - low) / ((high - low) or 1), 2)

    start = place(0.0)
    left, right = sorted((start, place(value)))
    drawn = f'<rect x="{left}" y="4" width="{max(right - left, 0.5):.2f}" height="8" fill="var(--bar)"/>'
    if low < 0 < high:
        drawn += f'<path class="axis" d="M{start} 0V16"/>'
    if limits is not None:
        drawn += f'<path stroke="currentColor" stroke-width="1.5" d="M{place(limits[0])} 8H{place(limits[1])}"/>'
    return Cell(
        f'<svg class="whisker" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>', value
    )


def _cell(cell: Cell, kind: str, column: int) -> str:
    value = "" if cell.value is None else text(cell.value)
    name = "th" if column == 0 else "td"
    scope = ' scope="row"' if column == 0 else ""
    title = f' title="{value}"' if kind == "text" and len(value) > 30 else ""
    return f'<{name}{scope} class="{kind}" data-value="{value}"{title}>{cell.html}</{name}>'
