"""Pre- and postprocessing of an exported graph in numpy: resizing and padding as in training, and per-pixel classes."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from dinoseg.core.sizes import Size
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
    def has_layers(self) -> bool:
        """Whether masks have a layer for each class."""
        return self.record.thresholds is not None

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W)."""
        return np.stack(
            [
                np.concatenate([self._decide(band).astype(np.uint8) for band in bands], axis=-2)
                for bands in self._pictures(images)
            ]
        )

    def predict(self, images: Sequence[np.ndarray]) -> Sequence[tuple[np.ndarray, None]]:
        """Return for each image what `ids` does; a graph predicts no objects."""
        return [(ids, None) for ids in self.ids(images)]

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        shares = _shares if self.record.mixture else softmax if self.record.thresholds is None else sigmoid
        return np.stack([np.concatenate([shares(band) for band in bands], axis=1) for bands in self._pictures(images)])

    def _decide(self, scores: np.ndarray) -> np.ndarray:
        """Return the ids (r, W) of the highest scores (K, r, W), or where each class reaches its threshold."""
        if self.record.thresholds is None:
            return scores.argmax(axis=0)
        return sigmoid(scores) >= np.array(self.record.thresholds, np.float32)[:, None, None]

    def _pictures(self, images: Sequence[np.ndarray]) -> Iterator[Iterator[np.ndarray]]:
        """Yield an iterator for each image, over bands (K, rows, W) of its class scores from the top down."""
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
                yield bands([np.asarray(part[index]) for part in outputs], size, layout.valid, self.record)


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
            yield (classes @ sigmoid(band).reshape(len(band), -1)).reshape(len(classes), *band.shape[1:])


def bilinear_matrix(length: int, cells: int, share: float) -> np.ndarray:
    """Return the weights (length, cells) with which `length` pixels read `cells`, as `geometry.upsample` does.

    Args:
        length: pixels along a side of the image.
        cells: along the same side of the grid.
        share: of the grid that the image covers, from its start.
    """
    positions = np.clip((np.arange(length) + 0.5) * cells * share / length - 0.5, 0, cells - 1)
    distance = np.abs(positions[:, None] - np.arange(cells))
    return np.clip(1 - distance, 0, None).astype(np.float32)


def softmax(logits: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the softmax of logits over an axis."""
    raised = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return raised / raised.sum(axis=axis, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the logistic function of logits, without overflow."""
    return 0.5 * (np.tanh(0.5 * logits) + 1)


def _shares(scores: np.ndarray) -> np.ndarray:
    """Return a mixture's scores (K, ...) as probabilities, equal to the softmax of `Prediction.logits`."""
    positive = scores.clip(np.finfo(np.float32).tiny)
    return positive / positive.sum(axis=0, keepdims=True)
