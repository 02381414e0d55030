"""Verdicts on differences in comparisons, and the figure of all differences with their intervals."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinoseg.utils.wording import in_lines, printable

SURELY_BETTER, SURELY_WORSE, UNSURE, NO_VERDICT = (
    "significantly better",
    "significantly worse",
    "no significant difference",
    "no verdict",
)
LEVEL = 0.05  # p-value below which a difference is significant
_COLOURS = {SURELY_BETTER: "#0072B2", SURELY_WORSE: "#D55E00", UNSURE: "#888888", NO_VERDICT: "#bbbbbb"}
_MAX_ROWS, _MAX_COLUMNS = 40, 4
_LONGEST = 30  # characters of a class name


def verdicts_picture(
    first: str, labels: Mapping[str, str], others: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]
) -> np.ndarray:
    """Draw the differences from the first side in points, with intervals, as RGB, with one panel for each other side.

    Args:
        first: name of the first side.
        labels: display label of each score, by name, from top to bottom.
        others: name of each other side, and `value`, `ci95` and `verdict` of its differences by score name.
    """
    keys, left_out = _shown(labels, others)
    columns = min(len(others), _MAX_COLUMNS)
    lines = math.ceil(len(others) / columns)
    titles, unit = [in_lines(name, 48) for name, _ in others], in_lines(f"points, minus {first}", 54)
    named = max(title.count("\n") for title in titles) + unit.count("\n")  # additional text lines
    size = (2.2 + 3.6 * columns, 0.7 + lines * (0.9 + 0.16 * named + 0.26 * len(keys)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, title, (_, gaps) in zip(panels, titles, others, strict=False):  # the last line may have more panels
        axes.axvline(0, color="#555555", linewidth=0.8)
        for row, key in enumerate(keys):
            gap = gaps[key]
            if gap["value"] is None:
                continue
            colour = _COLOURS[gap["verdict"]]
            if gap["ci95"] is not None:
                axes.plot([100 * end for end in gap["ci95"]], [row, row], color=colour, linewidth=1.6)
            axes.plot(100 * gap["value"], row, "o", color=colour, markersize=5)
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xlabel(unit, fontsize=8, parse_math=False)
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, left=False, labelbottom=True)
    for axes in figure.axes[len(others) :]:
        axes.set_axis_off()
    axes = figure.axes[0]
    axes.set_yticks(range(len(keys)), [_short(labels[key]) for key in keys], parse_math=False)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    note = (
        "95 % intervals; blue: significantly better, red: significantly worse, grey: no significant difference "
        "(Holm-corrected p)"
    )
    figure.supxlabel(note + left_out, fontsize=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks become boxes
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _shown(labels: Mapping[str, str], others: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> tuple:
    """Return the scores to draw, and a note on those left out.

    With more than `_MAX_ROWS` scores, the class scores with the smallest differences are left out.
    """
    reach = {key: max(abs(gaps[key]["value"] or 0.0) for _, gaps in others) for key in labels}
    selected = sorted(labels, key=lambda key: ("/" in key, -reach[key]))[:_MAX_ROWS]
    more = len(labels) - len(selected)
    return [
        key for key in labels if key in selected
    ], f"; {more} classes with smaller differences are in compare.csv" if more else ""


def _short(name: str) -> str:
    return printable(name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}")
