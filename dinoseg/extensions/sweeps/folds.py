"""Scores of a setting of a sweep over all folds; torch is imported only to read records."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import RowMetric, plain_score
from dinoseg.extensions.compare.paper_table import Score
from dinoseg.metrics.counts import iou, mean_defined, ratio
from dinoseg.report.table import CHOSEN_HERE
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

BuildMetrics = Callable[[Path, str], Sequence[RowMetric]]  # as of `pooled_scores`, which imports torch


def pool_matrix(counts: np.ndarray, job: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the scores of the confusion matrix (K, K) of all folds, whose rows are the reference.

    `background` and `ignored_class` of a job's row are ids, or None.
    """
    background, ignored = job.get("background"), job.get("ignored_class")
    hits = counts.diagonal()
    ious = iou(hits, counts.sum(axis=0) - hits, counts.sum(axis=1) - hits)
    if ignored is not None:
        ious[ignored] = np.nan
    objects = {} if background is None else {"miou_no_background": mean_defined(np.delete(ious, background))}
    scores = {"miou": mean_defined(ious), **objects, "accuracy": ratio(hits.sum(), counts.sum())}
    return {key: plain_score(value) for key, value in scores.items()}


def pool_records(runs: Sequence[Path], build_metrics: BuildMetrics | None) -> tuple[dict[str, Score], str]:
    """Return the scores of a setting over all folds, with their intervals, and a note on them.

    There are none if a job has no record of its images, or if one fold alone has a score.
    """
    from dinoseg.extensions.compare.comparison import side_scores  # imports torch
    from dinoseg.extensions.compare.sides import describe_folds, has_record, read_side

    if not runs or not all(map(has_record, runs)):
        return {}, ""
    try:
        side = read_side(runs, build_metrics)
    except UserError as error:
        return {}, f"no interval of {join_names([str(run) for run in runs])}: {error}"
    remark = describe_folds([side])
    if side.chosen_here:
        remark += f". {CHOSEN_HERE}"
    return {} if side.pooled is None else side_scores(side), remark
