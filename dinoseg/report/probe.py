"""Results of a probe: as a text table, CSV file and figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tabulate import tabulate

from dinoseg.utils.csv_text import write_csv_table

COLUMNS = ("blocks", "val_miou", "held_out_miou", "val_accuracy", "strength", "balance")


def probe_table(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    """Return rows with `COLUMNS` as text, with scores in percent and `best` marked."""
    shown = [
        (
            f"{row['blocks']}{' *' if row['blocks'] == best else ''}",
            *(_percent(row[key]) for key in COLUMNS[1:4]),
            f"{row['strength']:g}",
            f"{row['balance']:g}",
        )
        for row in rows
    ]
    headers = ["blocks", "val mIoU %", "held-out mIoU %", "val accuracy %", "ridge", "balance"]
    return tabulate(shown, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def write_probe_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per row, with scores in 0..1; an undefined score is an empty cell."""
    write_csv_table(path, COLUMNS, rows)


def probe_picture(rows: Sequence[Mapping[str, Any]], best: str) -> np.ndarray:
    """Plot the scores of rows in their order as RGB, with the name of the best row in bold."""
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)  # inches: keeps long block names off the edge
    figure = Figure(figsize=(max(4.0, 1.5 + 0.5 * len(rows)), 3.6), dpi=110, layout=layout)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, colour, name in (("val_miou", "#0072B2", "val"), ("held_out_miou", "#D55E00", "held out from train")):
        axes.plot([np.nan if row[key] is None else 100 * row[key] for row in rows], "o-", color=colour, label=name)
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(rows) > 6 else {}
    axes.set_xticks(range(len(rows)), [row["blocks"] for row in rows], **turned)
    for label, row in zip(axes.get_xticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["blocks"] == best else "normal")
    axes.set_xlabel("blocks read")
    axes.set_ylabel("mIoU % (closed form)")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"
