"""Whole-image inference: one pass per image, padded to the backbone's patch size."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dinoseg.core.shapes import Prediction
from dinoseg.inference.rows import Rows
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass, Place
from dinoseg.inference.windows import Flips, Windows
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.utils.ranges import Scale


class Whole(InferenceStrategy):
    """Whole-image inference strategy; averages class probabilities over `flips` and `scales`, see `Windows`."""

    def __init__(self, *, flips: Flips = "none", scales: Sequence[Scale] = (1.0,)) -> None:
        # a single window larger than any image
        self.passes = Windows(2**31, overlap=0.0, weights="uniform", batch_size=2**31, flips=flips, scales=scales)

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield the model's prediction as one band, or several bands if it is averaged over flips or scales."""
        if not self.is_single_pass(model, rows.size, autocast):
            grid = model.reduced_size(rows.size)
            yield from self.passes.over(model, rows, autocast, grid, size=size, on_pass=on_pass)
            return
        images = rows.read(0, rows.size[0])
        with autocast():
            prediction = model(images)
        if on_pass is not None:
            on_pass(prediction, images, [Place(image, 0, 0) for image in range(rows.count)], rows.size)
        yield replace(prediction, size=size or prediction.size)

    def is_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether the prediction is a single pass: no flips and only scale 1."""
        return len(self.passes.turns) == 1 and list(self.passes.scales) == [1.0]
