"""Scores and costs of runs side by side: as a text table, CSV file and figure."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from tabulate import tabulate

from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.wording import in_lines

COLUMNS = {  # key of a row: heading and format
    "miou": ("mIoU %", lambda value: f"{100 * value:.2f}"),
    "accuracy": ("pixel accuracy %", lambda value: f"{100 * value:.2f}"),
    "parameters": ("parameters", "{:,}".format),
    "trainable": ("trained", "{:,}".format),
    "seconds": ("s per training image", "{:.3g}".format),
    "memory_gib": ("peak training memory, GiB", "{:.2f}".format),
}
_COSTS = ("parameters", "seconds", "memory_gib")  # x axes of the figure
_BLUE = "#0072B2"


def costs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `run` and `COLUMNS`, in their order, as text, without columns that all runs lack."""
    columns = {key: column for key, column in COLUMNS.items() if any(row[key] is not None for row in rows)}
    shown = [[row["run"], *("-" if row[key] is None else columns[key][1](row[key]) for key in columns)] for row in rows]
    heads = ["run", *(head for head, _ in columns.values())]
    return tabulate(shown, headers=heads, disable_numparse=True, colalign=("left", *["right"] * len(columns)))


def write_costs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per row, with scores in 0..1; unknown values are empty cells."""
    write_csv_table(path, ["run", *COLUMNS], rows)


def costs_picture(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Plot mIoU against each cost that is known for two runs or more, as RGB; None without such a cost."""
    panels = []
    for key in _COSTS:
        points = [row for row in rows if row["miou"] is not None and row[key]]
        if len(points) > 1:
            panels.append((key, points))
    if not panels:
        return None
    figure = Figure(figsize=(1 + 4 * len(panels), 4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (key, points) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _draw(axes, key, points)
    figure.axes[0].set_ylabel("mIoU %")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks become boxes
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw(axes: Axes, key: str, points: Sequence[Mapping[str, Any]]) -> None:
    costs, scores = [row[key] for row in points], [100 * row["miou"] for row in points]
    axes.plot(costs, scores, "o", color=_BLUE)
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if key == "parameters" else "{x:g}")
    middle = (min(costs) * max(costs)) ** 0.5 if axes.get_xscale() == "log" else (min(costs) + max(costs)) / 2
    for row, cost, score in zip(points, costs, scores, strict=True):
        right = cost > middle  # keeps names within the figure
        offset, side = ((-7, 4), "right") if right else ((7, 4), "left")
        named: dict[str, Any] = {"ha": side, "fontsize": 8, "parse_math": False}  # $ is plain text
        axes.annotate(in_lines(row["run"], 30), (cost, score), offset, textcoords="offset points", **named)
    axes.margins(0.12)
    axes.set_xlabel(COLUMNS[key][0])
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
