"""How well a training step predicts its own batches: counted on a coarse grid, with no forward pass of its own."""

import math

import torch
from torch import Tensor

from dinoseg.core.shapes import Batch, Prediction, SegmentationData
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.training.engine import Engine

_POINTS = 128 * 128  # at most of an image, evenly spread: enough for shares, and a few percent of a step's time


class Tally:
    """The class counts of one step, over its batches and the ranks: a function of the step, however the run came there.

    Nothing waits for an accelerator but `read`.
    """

    def __init__(self, data: SegmentationData, engine: Engine) -> None:
        self._engine = engine
        self._counts = ConfusionMatrix(len(data.classes), data.ignore_index)
        self._counts.counts = torch.zeros_like(self._counts.counts, device=engine.device)

    @torch.no_grad()
    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count a batch by what was predicted for its loss."""
        mask = _thinned(batch.mask)
        self._counts.update(prediction.class_ids((mask.shape[-2], mask.shape[-1])), mask)

    def read(self) -> dict[str, float | None]:
        """Return `train/accuracy` and `train/miou`, of the crops as they were augmented; None where no pixel counts."""
        self._counts.counts = self._engine.sum(self._counts.counts)
        scores = self._counts.compute()
        return {f"train/{name}": scores[name] for name in ("accuracy", "miou")}


def _thinned(mask: Tensor) -> Tensor:
    """Return every n-th id of masks (B, H, W) in both directions: those nearest to the centres of a coarser grid."""
    height, width = mask.shape[-2:]
    apart = max(1.0, math.sqrt(height * width / _POINTS))
    rows, columns = (_centres(length, math.ceil(length / apart), mask.device) for length in (height, width))
    return mask[:, rows[:, None], columns]


def _centres(length: int, cells: int, device: torch.device) -> Tensor:
    return ((torch.arange(cells, device=device) + 0.5) * length / cells).long()
