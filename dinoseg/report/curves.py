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
_ROOM = 0.06  # margin above and below the curves, as a share of the axis
_BEGINNING = 0.1  # share of the first steps whose training scores may lie outside the axis
_MIN_SPAN = 0.02  # least span of an axis of shares: noise should not fill a figure


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
    if any(map(len, curves)):
        if np.ptp(axes.dataLim.intervalx) == 0:  # one step only
            step = axes.dataLim.x0
            axes.set_xlim(step - 1, step + 1)
        _dress(axes, title, _shown_values(curves, share=share), share=share)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no value yet", ha="center", va="center", fontsize=14, color="#666666")


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
    """Return the centred mean over about a twentieth of the points, and over fewer points at the ends."""
    reach = max(1, len(points) // 40)
    sums = np.concatenate([np.zeros((1, 2)), points.cumsum(axis=0)])
    index = np.arange(len(points))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(points))
    means = (sums[high] - sums[low]) / (high - low)[:, None]
    return np.stack([points[:, 0], means[:, 1]], axis=1)


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


def _shown_values(curves: Sequence[np.ndarray], *, share: bool) -> np.ndarray:
    """Return the values that determine the axis limits; for a validated score, those after the beginning.

    A training score starts near 0, which would hide the differences between validations. The beginning ends at the
    first validation, or after a tenth of the steps if that is earlier: a run may validate only at its end.
    """
    validated = [points[0, 0] for points in curves[1:] if len(points)]
    last = max((points[-1, 0] for points in curves if len(points)), default=0)
    start = min(*validated, _BEGINNING * last) if share and validated else -math.inf
    return np.concatenate([points[points[:, 0] >= start, 1] for points in curves])


def _dress(axes: Axes, title: str, values: np.ndarray, *, share: bool) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom, top = _limits(values.min(), values.max(), share=share)
    axes.set_ylim(bottom, top)
    if bottom > 0:
        axes.set_ylabel(f"{title} (axis starts at {bottom:.3g}, not at 0)")
    axes.legend(frameon=False, loc="best")


def _limits(lowest: float, highest: float, *, share: bool) -> tuple[float, float]:
    """Return the limits of the value axis: around the values, or from 0 if that takes less than half of the axis."""
    span = max(highest - lowest, _MIN_SPAN if share else 0.01 * abs(highest) or 1.0)
    room = _ROOM * span + (span - (highest - lowest)) / 2
    bottom = 0.0 if 0 <= lowest < span else lowest - room
    return bottom, min(highest + room, 1 + _ROOM * span) if share else highest + room
