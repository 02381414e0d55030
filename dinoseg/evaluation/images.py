"""Evaluation of a split's images: exact counts, tables, figures and the benchmark's own protocol."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.evaluation.collected import Collector
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.metrics.rows import MetricRows
from dinoseg.models.model import SegmentationModel
from dinoseg.report.overlay import compare
from dinoseg.report.table import class_table, write_scores_csv
from dinoseg.training.engine import Engine
from dinoseg.training.validation import evaluate
from dinoseg.utils.atomic import write_json
from dinoseg.utils.images import write_png
from dinoseg.utils.mask_files import write_masks
from dinoseg.utils.wording import count_of, one_line


def evaluate_images(
    model: SegmentationModel,
    data: SegmentationData,
    engine: Engine,
    out_dir: Path,
    *,
    metrics_only: bool,
    split: str,
    strategy: InferenceStrategy | None = None,
    background: int | None = None,
    write_prediction: Callable[[np.ndarray, str], None] | None = None,
    collector: Collector | None = None,
    rows: MetricRows | None = None,
    batches: Iterable[Batch] | None = None,
    thresholds_by_fold: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Evaluate on a split, print the table, and write scores.json, scores.csv and the predictions to `out_dir`.

    Predictions lie in `out_dir`/predictions: <name>_vis.png (frame | prediction | reference) and <name>_pred.png (class
    ids at full size), or <class>/<name>_pred.png of a mask with layers. `write_prediction`
    gets the class ids (H, W) and the name of each image, to write them in another layout.
    The collector and the rows of further metrics receive every batch of this rank. `batches` are as of `evaluate`.
    `thresholds_by_fold` are written if each fold has thresholds of its own.
    """

    def write(batch: Batch, ids: Tensor, logits: Tensor) -> None:
        if collector is not None:
            collector.add(batch, ids, logits)
        for image, mask, prediction, name in zip(batch.image, batch.mask, ids, batch.names, strict=True):
            if write_prediction is not None:
                write_prediction(prediction.cpu().numpy(), name)
            if not metrics_only:
                _write_pictures(out_dir / "predictions" / name, data, image, mask, prediction)

    # skip the device-to-host copy if nothing uses the predictions
    on_batch = None if metrics_only and write_prediction is None and collector is None else write
    scores = evaluate(
        model, data, engine, strategy=strategy, background=background, on_batch=on_batch, rows=rows, batches=batches
    )
    task = model.task
    if task.has_layers:
        scores["thresholds"] = {
            "values": thresholds_by_fold or task.thresholds,
            "chosen_on": task.chosen_on,
            "chosen_here": task.chosen_on == split,
        }
    if engine.is_main:
        write_json(out_dir / "scores.json", scores)
        write_scores_csv(out_dir / "scores.csv", scores, data.classes)
        print(class_table(scores, data.classes, background, [] if rows is None else rows.metrics))
        print(f"\nscores:       {out_dir}/scores.json, scores.csv")
        if not metrics_only:
            print(f"images:       {out_dir / 'predictions'}")
    return scores


def list_skipped(skipped: Mapping[str, Mapping[str, str]], out_dir: Path) -> None:
    """Print the files that data.on_error=skip left out, by split, and write all with their reasons to skipped.json."""
    lines = [f"{split}: {name}: {reason}" for split, reasons in skipped.items() for name, reason in reasons.items()]
    if lines:
        write_json(out_dir / "skipped.json", {split: dict(reasons) for split, reasons in skipped.items()})
        examples = "".join(f"\n  {one_line(line)}" for line in lines[:20])
        print(f"left out:     {count_of(lines, 'image')}, all in {out_dir}/skipped.json{examples}")


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
    write_masks(stem.parent, f"{stem.name}_pred", prediction, data.classes if prediction.ndim > 2 else ())
