"""Whole images where there is memory for them, else windows."""

import logging
import math
from collections.abc import Iterator, Sequence

import torch

from dinoseg.core.shapes import Prediction
from dinoseg.inference.memory import PassCost, described, free_bytes, measure
from dinoseg.inference.policy import Autocast, Policy, Seen
from dinoseg.inference.rows import HeldRows, Rows
from dinoseg.inference.whole import Whole
from dinoseg.inference.windows import Overlap, Windows
from dinoseg.models.model import Segmenter, Size, backbone_size
from dinoseg.utils.ranges import Count, HighShare, Scale

logger = logging.getLogger(__name__)
_AMPLE = 2**14  # bytes a pixel that the backbone sees; no model here takes half of it, so that far nothing is computed


class Auto(Policy):
    """Whole images, and windows where a pass over the whole would take too much of the memory that is free.

    Both see an image at the same scale, so that windows change what a model predicts as little as they can. What a pass
    takes is told from small ones, see `measure`; it is compared with what is free once for images of so many pixels.

    Args:
        size: height and width of a window, see `Windows`.
        memory: share of the free memory that a whole image may take.
        overlap: of windows.
        weights: of windows.
        batch_size: windows that the model sees at once.
        flips: as of `Windows`, for either.
        scales: likewise.
    """

    def __init__(
        self,
        size: Count | Sequence[Count],
        *,
        memory: HighShare = 0.8,
        overlap: Overlap = 0.25,
        weights: str = "cosine",
        batch_size: Count = 4,
        flips: str = "none",
        scales: Sequence[Scale] = (1.0,),
    ) -> None:
        options = {"overlap": overlap, "weights": weights, "batch_size": batch_size, "flips": flips, "scales": scales}
        self.whole = Whole(flips=flips, scales=scales)
        self.windows = Windows(size, **options)  # type: ignore[arg-type]
        self.memory = memory
        self._cost: PassCost | None = None  # of the model; there is one to a policy
        self._fits, self._too_many = 0.0, math.inf  # pixels of a batch, as the model sees them and as it predicts them

    def bands(
        self, model: Segmenter, rows: Rows, autocast: Autocast, *, size: Size | None = None, seen: Seen | None = None
    ) -> Iterator[Prediction]:
        """Yield what whole images or windows give."""
        grid = model.reduced_size(rows.size)
        if self._whole_fits(model, rows, autocast, size or rows.size):
            return self.whole.bands(model, rows, autocast, size=size, seen=seen)
        return self.windows.over(model, rows, autocast, grid, size=size, seen=seen)

    def sees_whole(self, model: Segmenter, size: Size, autocast: Autocast) -> bool:
        """Return whether there is one pass, of a whole image."""
        rows = HeldRows(torch.empty(1, 3, *size, device="meta"))
        return self.whole.sees_whole(model, size, autocast) and self._whole_fits(model, rows, autocast, size)

    def spare(self, model: Segmenter, rows: Rows, *, size: Size | None = None) -> bool:
        """See such images, and larger ones, in windows from now on."""
        pixels = self._pixels(model, rows, size or rows.size)
        if pixels > self._fits:
            return False
        self._fits, self._too_many = 0.0, pixels
        facts = f"inference=auto: memory did not suffice for {described(rows)} whole"
        logger.warning("%s", self._said(facts, whole=False))
        return True

    def _whole_fits(self, model: Segmenter, rows: Rows, autocast: Autocast, size: Size) -> bool:
        pixels = self._pixels(model, rows, size)
        if self._fits < pixels < self._too_many:
            free = free_bytes(next(model.parameters(), torch.empty(0)).device) * self.memory
            need: float = pixels * _AMPLE
            if need > free:
                self._cost = self._cost or measure(model, min(self.windows.size), autocast)
                need = self._cost.of(rows.count, self._seen(model, rows), size)
                facts = (
                    f"inference=auto: {described(rows)} would take about {need / 2**30:.1f} GiB whole, of "
                    f"{free / 2**30:.1f} GiB that may be taken"
                )
                logger.info("%s", self._said(facts, whole=need <= free))
            if need > free:
                self._too_many = pixels
            else:
                self._fits = pixels
        return pixels <= self._fits

    def _pixels(self, model: Segmenter, rows: Rows, size: Size) -> int:
        return rows.count * (math.prod(self._seen(model, rows)) + math.prod(size))

    def _seen(self, model: Segmenter, rows: Rows) -> Size:
        """Return the (h, w) at which the backbone sees whole images, at the largest scale."""
        return backbone_size(model.seen_size(rows.size), max(1.0, *self.windows.scales), None)

    def _said(self, facts: str, *, whole: bool) -> str:
        if whole:
            return f"{facts}: whole images."
        tall, wide = self.windows.size
        return (
            f"{facts}: windows of {wide} x {tall} are put together, and so of larger ones. Give inference=whole or "
            "inference=windows to choose yourself."
        )
