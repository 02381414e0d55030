"""Tables that sort by mouse and keyboard, and the contents of their cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.report.html.page import text


@dataclass(frozen=True)
class Cell:
    """Content and sort key of a cell.

    Args:
        html: escaped HTML.
        value: number, plain text, or None if undefined: these sort last.
    """

    html: str
    value: float | str | None


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], caption: str = "") -> str:
    """Return a table whose first column names the rows.

    Args:
        heads: name (plain text) and kind of each column: `number`, `text`, or `long` for text that wraps; `plain` ones
            do not sort.
        rows: one cell per column.
        caption: plain text.
    """
    head = "".join(
        f'<th scope="col" class="{kind}"' + ("" if kind == "plain" else f' data-kind="{kind}"') + f">{text(name)}</th>"
        for name, kind in heads
    )
    kinds = [kind for _, kind in heads]
    body = "\n".join("<tr>" + "".join(map(_cell, row, kinds, range(len(row)))) + "</tr>" for row in rows)
    heading = f"<caption>{text(caption)}</caption>" if caption else ""
    # a scrolling box must be reachable by keyboard
    label = text(caption or heads[0][0])
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{heading}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def plain_cell(value: object) -> Cell:
    """Return a cell of plain text, sorted by this text."""
    return Cell(text(value), str(value))


def number_cell(value: float | None, shown: str) -> Cell:
    """Return a cell that shows a number as `shown`, sorted by its value."""
    return Cell(text(shown), value)


def class_cell(name: str, colour: Sequence[int]) -> Cell:
    """Return a cell with the name and colour of a class."""
    levels = ", ".join(str(int(level)) for level in colour)
    return Cell(f'<span class="swatch" style="background: rgb({levels})"></span>{text(name)}', name)


def whisker(value: float | None, limits: Sequence[float] | None, ends: tuple[float, float] = (0.0, 1.0)) -> Cell:
    """Return a cell that draws a value and its interval on a scale between `ends`, with 0 marked if inside."""
    if value is None:
        return Cell("", None)
    low, high = ends

    def position(number: float) -> float:
        return round(100 * (min(max(number, low), high) - low) / ((high - low) or 1), 2)

    start = position(0.0)
    left, right = sorted((start, position(value)))
    drawn = f'<rect x="{left}" y="4" width="{max(right - left, 0.5):.2f}" height="8" fill="var(--bar)"/>'
    if low < 0 < high:
        drawn += f'<path class="axis" d="M{start} 0V16"/>'
    if limits is not None:
        drawn += f'<path stroke="currentColor" stroke-width="1.5" d="M{position(limits[0])} 8H{position(limits[1])}"/>'
    return Cell(
        f'<svg class="whisker" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>', value
    )


def _cell(cell: Cell, kind: str, column: int) -> str:
    value = "" if cell.value is None else text(cell.value)
    name = "th" if column == 0 else "td"
    scope = ' scope="row"' if column == 0 else ""
    title = f' title="{value}"' if kind == "text" and len(value) > 30 else ""
    return f'<{name}{scope} class="{kind}" data-value="{value}"{title}>{cell.html}</{name}>'
