"""Figure of a confusion matrix."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

_LONGEST_NAME = 40  # characters of a class name: the figure grows with them
_MAX_NUMBERS = 40  # classes up to which the cells carry numbers


def confusion_picture(matrix: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw counts (K, K), rows = reference, as RGB: each row in percent of the reference's pixels.

    A row without pixels is hatched instead of shown as 0 %.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    num_classes = len(classes)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"A matrix {counts.shape} does not match {num_classes} class names.")
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, 100 * counts / np.maximum(totals, 1), np.nan)
    cell = float(np.interp(num_classes, (10, 25, 150), (0.62, 0.5, 0.13)))  # inches
    side = max(2.4, cell * num_classes)
    figure = Figure(figsize=(side + 1, side), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, side / (side + 1), 1))
    bar = figure.add_axes(((side + 0.15) / (side + 1), 0.1, 0.2 / (side + 1), 0.8))
    image = axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, cax=bar, label="% of the reference class")
    _label(axes, classes, cell=side / num_classes)
    _hatch_empty_rows(axes, totals[:, 0])
    if num_classes <= _MAX_NUMBERS:
        _write_numbers(axes, shares)
    return _pixels(figure)


def _pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    # "tight" grows the figure to fit the labels
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _label(axes: Axes, classes: Sequence[str], *, cell: float) -> None:
    classes = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in classes]
    size = 10 if cell > 0.25 else 6
    tilt = 45 if cell > 0.25 else 90
    if max(map(len, classes)) * 0.1 < cell:
        axes.set_xticks(range(len(classes)), classes, fontsize=size)
    else:
        axes.set_xticks(range(len(classes)), classes, rotation=tilt, ha="right", va="center", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_xlabel("prediction", fontsize=11)
    axes.set_ylabel("reference", fontsize=11)
    axes.tick_params(length=0, pad=5)


def _hatch_empty_rows(axes: Axes, totals: np.ndarray) -> None:
    for row in np.flatnonzero(totals == 0):
        axes.axhspan(row - 0.5, row + 0.5, facecolor="#f4f4f4", edgecolor="#bbbbbb", hatch="////", linewidth=0)


def _write_numbers(axes: Axes, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share) and share > 0:
            text = "<1" if share < 1 else f"{share:.0f}"
            colour = "white" if share > 55 else "#222222"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
