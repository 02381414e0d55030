"""Automatic choice between whole-image and sliding-window inference by free memory."""

import logging
import math
from collections.abc import Iterator, Sequence

import torch

from dinoseg.core.shapes import Prediction
from dinoseg.inference.memory import PassCost, describe_images, free_bytes, measure
from dinoseg.inference.rows import MemoryRows, Rows
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass
from dinoseg.inference.windows import Flips, Overlap, Placement, Weights, Whole, Windows
from dinoseg.models.model import SegmentationModel, Size, backbone_size
from dinoseg.utils.ranges import Count, HighShare, Scale, check_annotations
from dinoseg.utils.wording import in_bytes

logger = logging.getLogger(__name__)
_AMPLE = 2**14  # bytes per input pixel, over twice what any model here needs; if this fits, no measurement is made


class Auto(InferenceStrategy):
    """Whole-image inference, with sliding windows as fallback for images that need too much of the free memory.

    Both use the same image scale, so windows change predictions as little as possible. The memory of a pass is
    estimated from small passes (see `measure`) and compared with free memory once per pixel count.

    Args:
        size: height and width of a window, see `Windows`.
        memory: fraction of free memory that a whole image may use.
        overlap: see `Windows`.
        stride: see `Windows`.
        placement: see `Windows`.
        weights: see `Windows`.
        batch_size: windows per forward pass.
        flips: see `Windows`; applies to whole images too.
        scales: see `Windows`; applies to whole images too.
    """

    @check_annotations
    def __init__(
        self,
        size: Count | tuple[Count, Count],
        *,
        memory: HighShare = 0.8,
        overlap: Overlap = 0.25,
        stride: Count | tuple[Count, Count] | None = None,
        placement: Placement = "stride",
        weights: Weights = "cosine",
        batch_size: Count = 4,
        flips: Flips = "none",
        scales: Sequence[Scale] = (1.0,),
    ) -> None:
        self.whole = Whole(flips=flips, scales=scales)
        self.windows = Windows(
            size,
            overlap=overlap,
            stride=stride,
            placement=placement,
            weights=weights,
            batch_size=batch_size,
            flips=flips,
            scales=scales,
        )
        self.memory = memory
        self._cost: PassCost | None = None  # of the model; a strategy serves one model
        self._feasible, self._too_many = 0.0, math.inf  # pixels of a batch, input plus output

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield the predictions of whole images, or of windows if whole images need too much memory."""
        grid = model.reduced_size(rows.size)
        if self._is_whole_feasible(model, rows, autocast, size or rows.size):
            return self.whole.bands(model, rows, autocast, size=size, on_pass=on_pass)
        return self.windows.over(model, rows, autocast, grid, size=size, on_pass=on_pass)

    @property
    def no_objects_reason(self) -> str | None:
        """Why it predicts no single objects; None: it predicts them."""
        return self.windows.no_objects_reason

    def is_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether the prediction of an image of `size` is a single pass over the whole image."""
        rows = MemoryRows(torch.empty(1, 3, *size, device="meta"))
        return self.whole.is_single_pass(model, size, autocast) and self._is_whole_feasible(model, rows, autocast, size)

    def equals_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether an image of `size` gets the classes of one pass, if memory suffices for it."""
        return self.whole.equals_single_pass(model, size, autocast)

    def reduce_memory(self, model: SegmentationModel, rows: Rows, *, size: Size | None = None) -> bool:
        """Use windows for images of this size and larger from now on; return False if that is already the case."""
        # the estimate does not see workspaces of operations: after an error, this size and larger ones get windows
        pixels = self._pixels(model, rows, size or rows.size)
        if pixels > self._feasible:
            return False
        self._feasible, self._too_many = 0.0, pixels
        facts = f"inference=auto: not enough memory for {describe_images(rows)} in one pass"
        logger.warning("%s", self._message(facts, whole=False))
        return True

    def _is_whole_feasible(self, model: SegmentationModel, rows: Rows, autocast: Autocast, size: Size) -> bool:
        pixels = self._pixels(model, rows, size)
        # memory grows with the pixels: what fits was proven for fewer, and what does not for more
        if self._feasible < pixels < self._too_many:
            free = free_bytes(next(model.parameters(), torch.empty(0)).device) * self.memory
            need: float = pixels * _AMPLE
            if need > free:
                # two passes over small squares, made once for a model
                self._cost = self._cost or measure(model, min(self.windows.size), autocast)
                need = self._cost.of(rows.count, self._input_size(model, rows), size)
                facts = (
                    f"inference=auto: {describe_images(rows)} would need about {in_bytes(need)} in one pass; "
                    f"{in_bytes(free)} are available"
                )
                logger.info("%s", self._message(facts, whole=need <= free))
            if need > free:
                self._too_many = pixels
            else:
                self._feasible = pixels
        return pixels <= self._feasible

    def _pixels(self, model: SegmentationModel, rows: Rows, size: Size) -> int:
        return rows.count * (math.prod(self._input_size(model, rows)) + math.prod(size))

    def _input_size(self, model: SegmentationModel, rows: Rows) -> Size:
        """Return the (h, w) of the backbone's input for whole images, at the largest scale."""
        return backbone_size(model.input_size(rows.size), max(1.0, *self.windows.scales), None)

    def _message(self, facts: str, *, whole: bool) -> str:
        if whole:
            return f"{facts}: whole images."
        tall, wide = self.windows.size
        return (
            f"{facts}: it is predicted in windows of {wide} x {tall}, as are larger images. Set inference=whole or "
            "inference=windows to choose."
        )
