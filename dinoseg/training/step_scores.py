"""Training scores from a step's own predictions, counted on a coarse grid without another forward pass."""

import math

import torch
from torch import Tensor

from dinoseg.core.shapes import Batch, Prediction, SegmentationData
from dinoseg.core.task import SEMANTIC, Task
from dinoseg.metrics.layer_counts import make_counts
from dinoseg.training.engine import Engine

_POINTS = 128 * 128  # maximum per image, evenly spread: enough for shares, at a few percent of a step's time


class StepScores:
    """Class counts of one step over its batches and all ranks; they depend on the step only, also after a resume.

    Only `read` waits for an accelerator.
    """

    def __init__(self, data: SegmentationData, engine: Engine, task: Task = SEMANTIC) -> None:
        self._engine = engine
        self._counts = make_counts(task, len(data.classes), data.ignore_index)
        self._counts.counts = torch.zeros_like(self._counts.counts, device=engine.device)

    @torch.no_grad()
    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count the predictions for a batch that were made for its loss."""
        mask = _subsample(batch.mask)
        self._counts.update(prediction.class_ids((mask.shape[-2], mask.shape[-1])), mask)

    def read(self) -> dict[str, float | None]:
        """Return `train/accuracy` and `train/miou` of the augmented crops; None if no pixel counts."""
        self._counts.counts = self._engine.sum(self._counts.counts)
        scores = self._counts.compute()
        return {f"train/{name}": scores[name] for name in ("accuracy", "miou")}


def _subsample(mask: Tensor) -> Tensor:
    """Return every n-th ID of masks (..., H, W) in both directions: those nearest to the centres of a coarser grid."""
    height, width = mask.shape[-2:]
    apart = max(1.0, math.sqrt(height * width / _POINTS))
    rows, columns = (_centres(length, math.ceil(length / apart), mask.device) for length in (height, width))
    return mask[..., rows[:, None], columns]


def _centres(length: int, cells: int, device: torch.device) -> Tensor:
    return ((torch.arange(cells, device=device) + 0.5) * length / cells).long()
