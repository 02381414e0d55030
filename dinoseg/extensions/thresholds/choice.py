"""Thresholds of a multi-label model: for each class that of the best F-beta of all pixels of a split."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from dinoseg.core.metric import BINS, Counts, sum_counts
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.metrics.average_precision import AveragePrecision, sum_from_above
from dinoseg.metrics.counts import ratio
from dinoseg.metrics.rows import MetricRows
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.validation import evaluate
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)


def choose_thresholds(positives: np.ndarray, totals: np.ndarray, beta: float = 1.0) -> list[float]:
    """Return the threshold of the best F-beta of each class, one of 1/1024 to 1023/1024.

    Of equally good thresholds it is the middle one, as between the bins of a class that is separated without errors. A
    class without a positive pixel keeps 0.5.

    Args:
        positives: counts (K, 1024) of `AveragePrecision`, summed over images: positive pixels by bin.
        totals: the same for all labelled pixels.
        beta: recall counts `beta` times as much as precision (C. van Rijsbergen, 1979); 1: Dice.
    """
    hits, predicted = sum_from_above(positives), sum_from_above(totals)
    scores = ratio((1 + beta**2) * hits, beta**2 * hits[:, :1] + predicted)
    chosen = []
    for values, present in zip(scores[:, 1:], hits[:, 0], strict=True):
        best = 1 + np.flatnonzero(values == values.max())
        chosen.append(float(best[(len(best) - 1) // 2]) / BINS if present else 0.5)
    return chosen


def choose_by_fold(
    counts: Sequence[Counts], folds: Sequence[str], beta: float = 1.0, classes: Sequence[str] | None = None
) -> dict[str, list[float]]:
    """Return the thresholds of each fold, chosen on the images of all other folds.

    Args:
        counts: of each image, by `AveragePrecision`.
        folds: fold of each image.
        beta: see `choose_thresholds`.
        classes: names for the log; None: nothing is logged.
    """
    chosen = {}
    for fold in dict.fromkeys(folds):
        others = [row for row, own in zip(counts, folds, strict=True) if own != fold]
        chosen[fold] = _choose(others, beta, classes, f"of fold {fold}: ")
    return chosen


def count_images(
    model: SegmentationModel,
    data: SegmentationData,
    engine: Engine,
    strategy: InferenceStrategy,
    batches: Iterable[Batch] | None = None,
) -> list[Counts]:
    """Return the counts of `AveragePrecision` of each image, on all ranks; `batches` as of `evaluate`."""
    rows = MetricRows([AveragePrecision()], data, engine.rank, engine.world_size)
    evaluate(model, data, engine, strategy=strategy, rows=rows, batches=batches)
    return rows.counts[0]


def choose(
    model: SegmentationModel, data: SegmentationData, engine: Engine, strategy: InferenceStrategy
) -> list[float]:
    """Return the thresholds of `choose_thresholds` for a model, from one exact count over a dataset, and log them."""
    counts = count_images(model, data, engine, strategy)
    chosen = _choose(counts, model.task.beta, data.classes if engine.is_main else None)
    logger.info(
        "A training stores them; elsewhere, as in mode=predict and mode=export, set task.threshold=[%s]",
        ",".join(map(str, chosen)),
    )
    return chosen


def _choose(rows: Sequence[Counts], beta: float, classes: Sequence[str] | None, which: str = "") -> list[float]:
    """Return the thresholds of `choose_thresholds` from the counts of images; log them if there are `classes`."""
    counts = sum_counts(rows)
    chosen = choose_thresholds(counts["positives"], counts["totals"], beta)
    if classes is not None:
        named = [f"{name} {value:.4g}" for name, value in zip(classes, chosen, strict=True)]
        shown = join_names(named, len(named))
        logger.info("thresholds:  %s%s, chosen on %s", which, shown, count_of(rows, "image"))
        absent = [name for name, hits in zip(classes, counts["positives"], strict=True) if not hits.any()]
        if absent:
            logger.warning(
                "task.threshold=auto: %sno pixel is %s, whose threshold stays 0.5.", which, join_names(absent, 10)
            )
    return chosen
