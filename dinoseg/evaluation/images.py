"""Evaluation of a split's images: exact counts, tables, figures and the benchmark's own protocol."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.official import FOLDER, official_scores
from dinoseg.inference.policy import Policy
from dinoseg.metrics.protocols.contract import DatasetProtocol
from dinoseg.models.model import SegmentationModel
from dinoseg.report.overlay import compare
from dinoseg.report.table import class_table, write_scores_csv
from dinoseg.training.engine import Engine
from dinoseg.training.validation import evaluate
from dinoseg.utils.atomic import write_json
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import count_of, one_line

_LONGEST_NAME = 40  # characters of a class name: the figure grows with them
_MAX_NUMBERS = 40  # classes up to which the cells carry numbers


def evaluate_images(
    model: SegmentationModel,
    data: SegmentationData,
    engine: Engine,
    out_dir: Path,
    *,
    metrics_only: bool,
    policy: Policy | None = None,
    background: int | None = None,
    protocol: DatasetProtocol | None = None,
    on_error: str = "stop",
    collector: Collector | None = None,
) -> dict[str, Any]:
    """Evaluate, print the table, and write scores.json, scores.csv, confusion.png and the predictions to `out_dir`.

    Predictions lie in `out_dir`/predictions: <name>_vis.png (frame | prediction | reference) and <name>_pred.png (class
    ids at full size). A protocol's scores go to official_scores.json, and the predictions in the benchmark's layout to
    `out_dir`/official. If the protocol cannot score them, problems.json gives the reasons; the other scores stand.
    The collector receives every batch of this rank.
    """

    def write(batch: Batch, ids: Tensor, logits: Tensor) -> None:
        if collector is not None:
            collector.add(batch, ids, logits)
        for image, mask, prediction, name in zip(batch.image, batch.mask, ids, batch.names, strict=True):
            if protocol is not None:
                pixels = protocol.file_ids(prediction.cpu().numpy())
                write_png(out_dir / FOLDER / protocol.target(name), pixels)
            if not metrics_only:
                _write_pictures(out_dir / "predictions" / name, data, image, mask, prediction)

    # skip the device-to-host copy if nothing uses the predictions
    on_batch = None if metrics_only and protocol is None and collector is None else write
    scores = evaluate(model, data, engine, policy=policy, background=background, on_batch=on_batch)
    if engine.is_main:
        write_json(out_dir / "scores.json", scores)
        write_scores_csv(out_dir / "scores.csv", scores, data.classes)
        write_png(out_dir / "confusion.png", confusion_picture(scores["matrix"], data.classes))
        print(class_table(scores, data.classes, background))
        print(f"\nscores:       {out_dir}/scores.json, scores.csv, confusion.png")
        if not metrics_only:
            print(f"images:       {out_dir / 'predictions'}")
        if protocol is not None:
            scores = {**scores, "official": official_scores(protocol, data, out_dir, on_error)}
    return scores


def list_skipped(skipped: Mapping[str, Mapping[str, str]], out_dir: Path) -> None:
    """Print the files that data.on_error=skip left out, by split, and write all with their reasons to skipped.json."""
    lines = [f"{split}: {name}: {reason}" for split, reasons in skipped.items() for name, reason in reasons.items()]
    if lines:
        write_json(out_dir / "skipped.json", {split: dict(reasons) for split, reasons in skipped.items()})
        shown = "".join(f"\n  {one_line(line)}" for line in lines[:20])
        print(f"left out:     {count_of(lines, 'image')}, all in {out_dir}/skipped.json{shown}")


def _write_pictures(stem: Path, data: SegmentationData, image: Tensor, mask: Tensor, ids: Tensor) -> None:
    frame: np.ndarray = image.permute(1, 2, 0).cpu().numpy()
    prediction, reference = ids.cpu().numpy(), mask.cpu().numpy()
    strip = compare(
        frame,
        prediction,
        reference,
        classes=data.classes,
        palette=data.palette,
        ignore_index=data.ignore_index,
    )
    write_png(stem.with_name(f"{stem.name}_vis.png"), strip)
    write_png(stem.with_name(f"{stem.name}_pred.png"), prediction)


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
