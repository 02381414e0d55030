"""Inference on images that are resized to fit a square and padded, as query heads are evaluated officially."""

from collections.abc import Iterator
from dataclasses import replace

import torch.nn.functional as F

from dinoseg.core.geometry import resize, to_unit_range
from dinoseg.core.shapes import Prediction
from dinoseg.inference.rows import Rows
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass, Place
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.utils.ranges import Count, check_annotations


class Letterbox(InferenceStrategy):
    """Whole images, resized to fit `size`, larger or smaller, and padded with black at the bottom and on the right.

    As tue-mps/eomt evaluates instances and panoptic segments (`resize_and_pad_imgs_instance_panoptic` in
    training/lightning_module.py): every image is seen at the size of the training crops. Resized pixels are not rounded
    to 8 bits, and scores are upsampled from the model's grid to the image in one step instead of two.

    Args:
        size: height and width that the model sees; one number for both.
    """

    resizes = True

    @check_annotations
    def __init__(self, size: Count | tuple[Count, Count]) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield the prediction of the whole images as one band."""
        images = to_unit_range(rows.read(0, rows.size[0]))
        height, width = self.fit(rows.size)
        resized = resize(images, (height, width))
        padded = F.pad(resized, (0, self.size[1] - width, 0, self.size[0] - height))
        with autocast():
            prediction = model(padded, reduce=False)
        # of the image in the padded square, and of the square in the grid of whole patches
        valid = prediction.valid[0] * height / self.size[0], prediction.valid[1] * width / self.size[1]
        prediction = replace(prediction, size=rows.size, valid=valid)
        if on_pass is not None:
            on_pass(prediction, images, [Place(image, 0, 0) for image in range(rows.count)], rows.size)
        yield replace(prediction, size=size or rows.size)

    def fit(self, size: Size) -> Size:
        """Return the (H, W) of an image of `size` that is resized to fit, at least one pixel a side."""
        factor = min(self.size[0] / size[0], self.size[1] / size[1])
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    @property
    def no_objects_reason(self) -> None:
        """None: it predicts objects."""
        return None
