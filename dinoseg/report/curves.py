"""Figures of training curves, from the rows of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dinoseg.report.log import read_rows
from dinoseg.utils.images import write_png

_BLUE, _VERMILION = "#0072B2", "#D55E00"  # these and the colours below are colour-blind safe
_OTHERS = ("#009E73", "#CC79A7")  # colours of curves with their own label
_STYLES = {"train": (_BLUE, "training"), "val": (_VERMILION, "validation")}
_MANY = 40  # points above which a curve becomes a running mean over a pale line
Panel = tuple[Mapping[str, str | None], str]  # keys with their names, and the title
_LOSS: Panel = ({"train/loss": None, "val/loss": None}, "loss")
_PANELS: tuple[Panel, ...] = (
    _LOSS,
    ({"train/accuracy": None, "val/accuracy": None}, "pixel accuracy"),
    ({"train/miou": None, "val/miou": None, "val/miou_no_background": "without background"}, "mean IoU"),
    ({"val/fg_ari": None, "val/ari": "ARI, with background", "val/mbo": "mBO"}, "FG-ARI"),
    ({"train/confident": "confident pixels", "train/pseudo_accuracy": "accuracy of these"}, "pseudo-labels"),
)


def draw_curves(folder: Path, score: str, best_step: int) -> Path:
    """Write the figure of the log of a run to curves.png in its folder; return that path.

    `score` and `best_step` are those of `curves_figure`.
    """
    path = folder / "curves.png"
    write_png(path, _picture(curves_figure(read_rows(folder / "metrics.jsonl"), score, best_step)))
    return path


def _picture(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curves_figure(rows: Sequence[Mapping[str, Any]], score: str, best_step: int) -> Figure:
    """Return a figure with a panel for the loss and for each score that has values.

    Args:
        rows: with `step` and keys such as `train/loss`. They may lack any key, hold None or non-finite values, and come
            in any order of steps.
        score: validation score that selects the best checkpoint (`trainer.score`); it has a panel in any case.
        best_step: step of the best checkpoint, which a star marks.
    """
    selecting = f"val/{score}"
    panels = list(_PANELS)
    if not any(selecting in keys for keys, _ in panels):
        panels.append(({selecting: None}, score))
    filled = [panel for panel in panels if any(len(_points(rows, key)) for key in panel[0])] or [_LOSS]
    figure = Figure(figsize=(6 * len(filled), 4.5), dpi=100, layout="constrained")
    for axes, (keys, title) in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
        curves = {key: _points(rows, key) for key in keys}
        _draw_panel(axes, curves, keys, title)
        if selecting in curves:
            _mark_best(axes, curves[selecting], best_step)
        if any(map(len, curves.values())):
            # below the label of the axis, since a legend inside covers a curve
            axes.legend(
                frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0, ncols=2, fontsize=9
            )
    return figure


def _draw_panel(axes: Axes, curves: Mapping[str, np.ndarray], labels: Mapping[str, str | None], title: str) -> None:
    others = iter(_OTHERS)
    for key, points in curves.items():
        label = labels[key]
        _draw(axes, points, _STYLES[key.split("/")[0]] if label is None else (next(others), label))
    axes.set_title(title, loc="left", fontsize=13)
    if not any(map(len, curves.values())):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no value yet", ha="center", va="center", fontsize=14, color="#666666")
        return
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if title != _LOSS[1] and all((abs(points[:, 1]) <= 1).all() for points in curves.values()):
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Return steps and finite values (N, 2), sorted by step; for equal steps, the last row counts."""
    values = {row["step"]: float(row[key]) for row in rows if row.get(key) is not None}
    points = [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _draw(axes: Axes, points: np.ndarray, style: tuple[str, str]) -> None:
    if len(points) == 0:
        return
    colour, name = style
    steps, values = points.T
    few = len(points) <= _MANY
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=1.8 if few else 0.8,
        alpha=1 if few else 0.35,
        marker="o" if few else None,
        markersize=4,
        label=name if few else None,
    )
    if not few:
        axes.plot(*_running_mean(points).T, color=colour, linewidth=1.8, label=f"{name} (running mean)")


def _running_mean(points: np.ndarray) -> np.ndarray:
    """Return the centred mean over about a twentieth of the points, without the ends."""
    reach = max(1, len(points) // 40)
    window = np.ones(2 * reach + 1) / (2 * reach + 1)
    return np.stack([points[reach:-reach, 0], np.convolve(points[:, 1], window, mode="valid")], axis=1)


def _mark_best(axes: Axes, points: np.ndarray, best_step: int) -> None:
    for step, value in points[points[:, 0] == best_step]:
        is_share = isinstance(axes.yaxis.get_major_formatter(), PercentFormatter)
        axes.plot(
            [step],
            [value],
            marker="*",
            markersize=13,
            color=_VERMILION,
            markeredgecolor="white",
            linestyle="none",
            label=f"best {100 * value:.2f} % at step {step:.0f}"
            if is_share
            else f"best {value:.4g} at step {step:.0f}",
        )
