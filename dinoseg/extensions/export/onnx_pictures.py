"""Pre- and postprocessing of an exported graph in numpy: resizing and padding as in training, and per-pixel classes."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from PIL import Image

from dinoseg.core.objects import Objects
from dinoseg.core.sizes import Size
from dinoseg.extensions.export.numpy_ops import bilinear_matrix, sigmoid, softmax
from dinoseg.extensions.export.objects import find_instances, find_segments
from dinoseg.extensions.export.onnx_record import GraphRecord, Layout
from dinoseg.utils.errors import UserError

Compute = Callable[[np.ndarray], Sequence[np.ndarray]]  # pixels (B, C, H, W) to the graph's outputs
_MAX_PIXELS = 2**28  # largest input of the graph
_AT_ONCE = 2**23  # upsampled scores or masks in memory at a time: 32 MiB


class GraphRuntime:
    """The `Runtime` of ONNX files, and of programs during verification.

    Args:
        compute: runs the graph.
        record: describes its input and outputs.
    """

    name = "onnx"

    def __init__(self, compute: Compute, record: GraphRecord) -> None:
        self.compute = compute
        self.record = record

    @property
    def task(self) -> str:
        """`semantic`, `instance` or `panoptic`; `multilabel`: masks have a layer for each class."""
        if self.record.objects is not None:
            return "instance" if self.record.objects["score_threshold"] is None else "panoptic"
        return "semantic" if self.record.thresholds is None else "multilabel"

    @property
    def things(self) -> Collection[int]:
        """Ids of the classes that have objects; empty if the model predicts no objects."""
        return () if self.record.objects is None else self.record.objects["things"]

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W)."""
        return np.stack([ids for ids, _ in self._predict(images, objects=False)])

    def predict(self, images: Sequence[np.ndarray]) -> Sequence[tuple[np.ndarray, Objects | None]]:
        """Return for each image what `ids` does, and its objects from the same passes; None without objects."""
        return [*self._predict(images, objects=self.record.objects is not None)]

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        shares = _shares if self.record.mixture else softmax if self.record.thresholds is None else sigmoid
        size = images[0].shape[:2]
        return np.stack(
            [
                np.concatenate([shares(band) for band in bands(outputs, size, valid, self.record)], axis=1)
                for outputs, valid in self._run(images)
            ]
        )

    def _predict(self, images: Sequence[np.ndarray], *, objects: bool) -> Iterator[tuple[np.ndarray, Objects | None]]:
        size = (images[0].shape[0], images[0].shape[1])
        for outputs, valid in self._run(images):
            parts = [self._decide(band).astype(np.uint8) for band in bands(outputs, size, valid, self.record)]
            yield np.concatenate(parts, axis=-2), self._find_objects(outputs, size, valid) if objects else None

    def _find_objects(self, outputs: Sequence[np.ndarray], size: Size, valid: tuple[float, float]) -> Objects:
        """Return the objects of one image; arguments as of `bands`."""
        assert self.record.objects is not None
        class_logits, mask_logits = outputs
        options = {
            key: value for key, value in self.record.objects.items() if key != "background" and value is not None
        }
        find = find_segments if "score_threshold" in options else find_instances
        num_classes = class_logits.shape[1] - self.record.no_object
        return find(class_logits, mask_logits, size, valid, num_classes=num_classes, **options)

    def _decide(self, scores: np.ndarray) -> np.ndarray:
        """Return the ids (r, W) of the highest scores (K, r, W), or where each class reaches its threshold."""
        if self.record.thresholds is None:
            return scores.argmax(axis=0)
        return sigmoid(scores) >= np.array(self.record.thresholds, np.float32)[:, None, None]

    def _run(self, images: Sequence[np.ndarray]) -> Iterator[tuple[list[np.ndarray], tuple[float, float]]]:
        """Yield the outputs of the graph for each image, and the shares of their height and width that it covers."""
        size = (images[0].shape[0], images[0].shape[1])
        layout = self.record.layout(size)
        if math.prod(layout.padded) > _MAX_PIXELS:
            raise UserError(
                f"An image of {size[0]} x {size[1]} would enter the model at {layout.padded[0]} x {layout.padded[1]}; "
                f"the limit is {_MAX_PIXELS} pixels. Reduce it."
            )
        step = self.record.batch or len(images)
        for start in range(0, len(images), step):
            batch = np.stack([pixels(image, layout, self.record.fill) for image in images[start : start + step]])
            missing = step - len(batch)
            outputs = self.compute(np.concatenate([batch, batch[:1].repeat(missing, axis=0)]) if missing else batch)
            for index in range(len(batch)):
                yield [np.asarray(part[index]) for part in outputs], layout.valid


def pixels(image: np.ndarray, layout: Layout, fill: Sequence[float]) -> np.ndarray:
    """Convert an image (H, W, C) of 8 or 16 bits to the graph's input: (C, H', W') float32 in 0..1, padded with `fill`.

    Resizing matches torch's `antialias=True` to the last bits: each channel is resized bilinearly as floats.
    """
    rows, columns = layout.content
    channels, white = image.shape[2], np.iinfo(image.dtype).max
    result = np.empty((channels, *layout.padded), np.float32)
    result[:] = np.asarray(fill, np.float32)[:, None, None]
    for channel in range(channels):
        plane = image[..., channel].astype(np.float32) / np.float32(white)
        if plane.shape != layout.content:
            plane = np.asarray(Image.fromarray(plane).resize((columns, rows), Image.Resampling.BILINEAR))
        result[channel, :rows, :columns] = plane
    return result


def bands(
    outputs: Sequence[np.ndarray], size: Size, valid: tuple[float, float], record: GraphRecord
) -> Iterator[np.ndarray]:
    """Yield bands (K, rows, W) of the class scores of one image of `size`, from the top down.

    Args:
        outputs: of the graph: [(K, h, w)], or [(Q, K + 1), (Q, h, w)] for masks.
        size: (H, W) of the image.
        valid: shares of the maps' height and width that the image covers.
        record: states the kind of the outputs.
    """
    maps = outputs[-1].astype(np.float32, copy=False)
    rows = bilinear_matrix(size[0], maps.shape[1], valid[0])
    columns = bilinear_matrix(size[1], maps.shape[2], valid[1]).T
    classes = None
    if record.kind == "masks":
        classes = softmax(outputs[0].astype(np.float32, copy=False), axis=1)  # (Q, K + 1)
        classes = (classes[:, :-1] if record.no_object else classes).T  # (K, Q)
    step = max(1, _AT_ONCE // (len(maps) * size[1]))
    for start in range(0, size[0], step):
        band = rows[start : start + step] @ maps @ columns  # (K or Q, rows, W)
        if classes is None:
            yield band
        else:
            scores = (classes @ sigmoid(band).reshape(len(band), -1)).reshape(len(classes), *band.shape[1:])
            yield _pixel_scores(scores, record)


def _shares(scores: np.ndarray) -> np.ndarray:
    """Return a mixture's scores (K, ...) as probabilities, equal to the softmax of `Prediction.logits`."""
    positive = scores.clip(np.finfo(np.float32).tiny)
    return positive / positive.sum(axis=0, keepdims=True)


def _pixel_scores(scores: np.ndarray, record: GraphRecord) -> np.ndarray:
    """Return class scores of pixels (K, r, W) from those of masks, as `Task.pixel_scores` does."""
    if record.objects is None or record.objects["background"] is None:
        return scores
    things = record.objects["things"]
    pixels = np.zeros_like(scores)
    pixels[record.objects["background"]] = 1 - scores[things].max(axis=0)
    pixels[things] = scores[things]
    return pixels
