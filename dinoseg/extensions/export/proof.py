"""Verification of exported files: compare their results on real images with those of the trained model."""

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import resize, to_unit_range
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import SEMANTIC, Task
from dinoseg.extensions.export.onnx_record import GraphRecord
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.pictures import Picture
from dinoseg.metrics.confusion import make_counts
from dinoseg.models.model import SegmentationModel
from dinoseg.segmenter.runtime import Runtime
from dinoseg.utils.errors import UserError

TIMES = 5  # timed runs per image, after one warm-up run; also the number of timed images
MAX = 2**22  # number of probabilities compared per image
NO_ID = 255  # no class has it


class Reference:
    """The trained model in PyTorch, run as mode=predict runs it.

    For a fixed-size graph, it runs at that graph's input size instead.

    Args:
        segmenter: on the CPU, in eval mode.
        record: of the exported graph.
    """

    name = "torch"

    def __init__(self, segmenter: SegmentationModel, record: GraphRecord) -> None:
        self.segmenter = segmenter
        self.record = record

    @torch.inference_mode()
    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, C) of one size."""
        return self._predict(images).class_ids().numpy()

    @torch.inference_mode()
    def predict_ids(self, image: np.ndarray) -> np.ndarray:
        """Return the class ids (H, W) that mode=predict gives an image (H, W, C), whatever the graph's input size."""
        whole = self.segmenter(torch.from_numpy(image[None].copy()).permute(0, 3, 1, 2))
        return whole.class_ids()[0].numpy()

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, C) of one size."""
        return self._predict(images).probabilities().numpy()

    def pixels(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) as the graph's input."""
        layout = self.record.layout((images.shape[-2], images.shape[-1]))
        floats = to_unit_range(images)
        if layout.content != tuple(images.shape[-2:]):
            floats = resize(floats, layout.content)
        padded = self.segmenter.backbone.mean.repeat(len(floats), 1, *layout.padded)
        padded[..., : layout.content[0], : layout.content[1]] = floats
        return padded

    def _predict(self, images: Sequence[np.ndarray]) -> Prediction:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        if self.record.size is None:
            return self.segmenter(batch)
        size = (batch.shape[-2], batch.shape[-1])
        head = self.segmenter.head
        outputs = head.run(self.segmenter.backbone, self.pixels(batch))
        valid, task = self.record.layout(size).valid, self.segmenter.task
        return Prediction(outputs, size, valid, head.predict, head.mixture, task=task)


def measure_seconds(runtime: Runtime | Reference, image: np.ndarray) -> float:
    """Return the seconds from an image (H, W, C) in memory to its class ids."""
    start = time.perf_counter()
    runtime.ids([image])
    return time.perf_counter() - start


def subsample(probabilities: np.ndarray) -> np.ndarray:
    """Subsample the rows and columns of (K, H, W) by one common step, to about `MAX` values at most."""
    step = max(1, int(np.ceil((probabilities.size / MAX) ** 0.5)))
    return np.ascontiguousarray(probabilities[:, ::step, ::step], np.float32)


def compare(
    reference: Reference,
    runtime: Runtime,
    pictures: Sequence[Picture],
    num_classes: int,
    ignore_index: int,
    task: Task = SEMANTIC,
) -> dict[str, Any]:
    """Measure the agreement of an exported file with the trained model on images, and the latency of both.

    Without masks, the file's `miou` is computed against the trained model's classes, and the trained model's is 1.

    Args:
        reference: the trained model.
        runtime: runs the exported file.
        pictures: the images.
        num_classes: of the model.
        ignore_index: of the masks.
        task: of the model.

    Raises:
        UserError: if the trained model gives NaN probabilities, since NaN would agree with anything.
    """
    ours, theirs = (make_counts(task, num_classes, ignore_index) for _ in range(2))
    between = make_counts(task, num_classes, NO_ID)  # exported against trained classes
    equal, as_predicted, pixels, largest = 0, 0, 0, 0.0
    torch_seconds: list[float] = []
    file_seconds: list[float] = []
    has_fixed_size = reference.record.size is not None
    for number, picture in enumerate(pictures):
        image = picture.read()
        wanted = reference.ids([image])[0]
        expected = subsample(reference.probabilities([image])[0])
        if not np.isfinite(expected).all():
            raise UserError(
                f"{picture.path.name}: the trained model's own probabilities are NaN, so the export cannot be "
                "verified. Choose an earlier checkpoint."
            )
        given = runtime.ids([image])[0]
        probabilities = subsample(runtime.probabilities([image])[0])
        if number < TIMES:  # the passes above warm both up
            torch_seconds += [measure_seconds(reference, image) for _ in range(TIMES)]
            file_seconds += [measure_seconds(runtime, image) for _ in range(TIMES)]
        equal += int((wanted == given).sum())
        pixels += wanted.size  # of layers: of all classes
        largest = float(np.maximum(largest, np.abs(expected - probabilities).max()))  # NaN stays NaN
        between.update(torch.from_numpy(given), torch.from_numpy(wanted))
        if has_fixed_size:
            as_predicted += int((reference.predict_ids(image) == given).sum())
        if picture.mask is not None:
            ours.update(torch.from_numpy(wanted), torch.from_numpy(picture.mask))
            theirs.update(torch.from_numpy(given), torch.from_numpy(picture.mask))
    total = between.compute()
    scored = ours.compute()["miou"] is not None
    return {
        "pictures": len(pictures),
        "pixels": pixels,
        "agreement": equal / pixels,
        **({"agreement_with_predict": as_predicted / pixels} if has_fixed_size else {}),
        "finite": math.isfinite(largest),
        "largest_difference_of_probabilities": largest if math.isfinite(largest) else None,
        "has_masks": scored,
        "references": "masks of the data set" if scored else "the trained model's own classes",
        "miou": {
            "torch": ours.compute()["miou"] if scored else 1.0,
            # layers without any class agree
            "exported": theirs.compute()["miou"] if scored else 1.0 if total["miou"] is None else total["miou"],
        },
        "latency_ms": {
            "torch": 1000 * median(torch_seconds),
            "exported": 1000 * median(file_seconds),
            "ratio": median(file_seconds) / median(torch_seconds),
            "how": f"median of {TIMES} runs for each of {min(TIMES, len(pictures))} images, one at a time, from the "
            f"array in memory to class ids, on the CPU with {torch.get_num_threads()} threads; PyTorch eager",
        },
    }


def meets_limits(result: dict[str, Any], options: GraphOptions) -> bool:
    """Return whether a comparison meets the required agreement; NaN, which would agree with anything, fails."""
    points = 100 * abs(result["miou"]["torch"] - result["miou"]["exported"])
    return result["finite"] and result["agreement"] >= options.min_agreement and points <= options.max_miou_drop
