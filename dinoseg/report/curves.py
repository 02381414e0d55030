"""Figures of training curves, from the rows of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinoseg.utils.images import write_png

_BLUE, _VERMILION = "#0072B2", "#D55E00"  # these and the colours below are colour-blind safe
_OTHERS = ("#009E73", "#CC79A7")  # colours of curves with their own label
_STYLES = {"train": (_BLUE, "training"), "val": (_VERMILION, "validation")}
_JUDGED = ("val/miou", "val/fg_ari")  # scores whose best value is marked
_MANY = 40  # points above which a curve becomes a running mean over a pale line


Plot = tuple[str, Mapping[str, str | None], str | None]  # file, keys with their names, title of a share in 0..1
_LOSS: Plot = ("loss", {"train/loss": None, "val/loss": None}, None)
IMAGE_PLOTS: tuple[Plot, ...] = (
    _LOSS,
    ("accuracy", {"train/accuracy": None, "val/accuracy": None}, "pixel accuracy"),
    ("miou", {"train/miou": None, "val/miou": None, "val/miou_no_background": "without background"}, "mean IoU"),
)
CLIP_PLOTS: tuple[Plot, ...] = (
    _LOSS,
    ("fg_ari", {"val/fg_ari": None, "val/ari": "ARI, with background", "val/mbo": "mBO"}, "FG-ARI"),
)


def draw_curves(
    rows: Sequence[Mapping[str, Any]], out_dir: str | Path, plots: Sequence[Plot] = IMAGE_PLOTS
) -> list[Path]:
    """Write the figures of `plots` from `rows` with `step` and keys such as `train/loss`; return their paths.

    Rows may lack any key, hold None or non-finite values, and come in any order of steps. The figure of a score
    without values has a note instead of curves.
    """
    paths = []
    for name, keys, title in plots:
        path = Path(out_dir) / f"{name}.png"
        write_png(path, _picture(rows, keys, title or name, share=title is not None))
        paths.append(path)
    return paths


def _picture(
    rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str | None], title: str, *, share: bool
) -> np.ndarray:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _draw_plot(figure.add_subplot(), rows, keys, title, share=share)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curves_figure(rows: Sequence[Mapping[str, Any]], plots: Sequence[Plot] = (*IMAGE_PLOTS, CLIP_PLOTS[1])) -> Figure:
    """Return one figure with a panel for each of `plots` that `rows` have values for, see `draw_curves`."""
    shown = [plot for plot in plots if any(len(_points(rows, key)) for key in plot[1])] or [_LOSS]
    figure = Figure(figsize=(6 * len(shown), 4), dpi=100, layout="constrained")
    for axes, (name, keys, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw_plot(axes, rows, keys, title or name, share=title is not None)
    return figure


def _draw_plot(
    axes: Axes, rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str | None], title: str, *, share: bool
) -> None:
    others = iter(_OTHERS)
    curves = [_points(rows, key) for key in keys]
    for (key, label), points in zip(keys.items(), curves, strict=True):
        style = _STYLES[key.split("/")[0]] if label is None else (next(others), label)
        _draw(axes, points, style, best=share and key in _JUDGED)
    axes.set_title(title, loc="left", fontsize=13)
    if not any(map(len, curves)):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no value yet", ha="center", va="center", fontsize=14, color="#666666")
        return
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="best")


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Return steps and finite values (N, 2), sorted by step; for equal steps, the last row counts."""
    values = {row["step"]: float(row[key]) for row in rows if row.get(key) is not None}
    points = [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _draw(axes: Axes, points: np.ndarray, style: tuple[str, str], *, best: bool) -> None:
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
    if best:
        _mark_best(axes, points)


def _running_mean(points: np.ndarray) -> np.ndarray:
    """Return the centred mean over about a twentieth of the points, without the ends."""
    reach = max(1, len(points) // 40)
    window = np.ones(2 * reach + 1) / (2 * reach + 1)
    return np.stack([points[reach:-reach, 0], np.convolve(points[:, 1], window, mode="valid")], axis=1)


def _mark_best(axes: Axes, points: np.ndarray) -> None:
    step, value = points[points[:, 1].argmax()]
    axes.plot(
        [step],
        [value],
        marker="*",
        markersize=13,
        color=_VERMILION,
        markeredgecolor="white",
        linestyle="none",
        label=f"best {value:.3f} at step {step:.0f}",
    )
