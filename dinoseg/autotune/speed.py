"""Benchmark of a recipe on this device: training steps and predictions, each in a separate process."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.autotune.random_batch import random_batch
from dinoseg.autotune.step_bytes import DummyLoss, LossBytes, ends_of, outline, predict
from dinoseg.autotune.trial import try_steps
from dinoseg.core.shapes import SegmentationData
from dinoseg.inference.policy import Policy
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.walk import walking
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.meter import peak_memory, reset_peak_memory, used_memory
from dinoseg.training.parts import TrainingParts
from dinoseg.utils.devices import synchronize

_FEW = 16  # images held in memory and predicted in turn


@dataclass(frozen=True)
class SpeedMeasurement:
    """Measurements of a benchmark.

    Attributes:
        device: its type.
        precision: of the computation.
        images: per pass; a training step counts all of its batches.
        size: (H, W) of the images.
        seconds: of each pass.
        waited: share of the time spent waiting for data; None: no data was read.
        peak_bytes: peak on top of what was there before: resident memory on a CPU, else allocated.
        flops: of a pass of the model; what checkpointing repeats is not counted.
        peak_flops: of the device per second, measured by products of large matrices.
    """

    device: str
    precision: str
    images: int
    size: tuple[int, int]
    seconds: list[float]
    waited: float | None
    peak_bytes: int
    flops: int
    peak_flops: float

    def figures(self, peak_flops: float) -> dict[str, Any]:
        """Return the results by name, including the share of `peak_flops`, the device's FLOPs per second."""
        total = sum(self.seconds)
        p50, p95 = np.percentile(self.seconds, [50, 95])
        a_second = self.flops * len(self.seconds) / total
        return {
            "images": self.images,
            "size": list(self.size),
            "images_per_s": self.images * len(self.seconds) / total,
            "latency_p50_s": float(p50),
            "latency_p95_s": float(p95),
            "data_wait": self.waited,
            "peak_bytes": self.peak_bytes,
            "model_flops": self.flops,
            "model_flops_per_s": a_second,
            "share_of_matrix_peak": a_second / peak_flops,
        }


def time_training(
    parts: TrainingParts,
    engine: Engine,
    batches: Iterator[Any] | None,
    *,
    steps: int,
    warmup: int,
    counted: TrainingParts | None = None,
) -> SpeedMeasurement:
    """Time training steps after `warmup` untimed ones.

    Args:
        parts: of the training.
        engine: device and precision.
        batches: of the data; None: noise is used instead, and no data are read.
        steps: number of timed steps.
        warmup: number of steps before them.
        counted: parts without checkpointing, whose operations are counted; None: `parts`.
    """
    fed = repeat(random_batch(parts, parts.batch_size)) if batches is None else batches
    trial = try_steps(parts, parts.model, engine, fed, steps=steps, warmup=warmup)
    waited = None if batches is None else sum(trial.waited) / sum(trial.seconds)
    # counted last: the process keeps the memory that this frees, so the peak would miss its reuse
    flops = parts.accumulate * step_flops(counted or parts, parts.batch_size, bf16=engine.half)
    images = parts.batch_size * parts.accumulate
    return _measurement(engine, images, parts.crop, trial.seconds, waited, trial.peak, flops)


def time_prediction(
    make: Callable[[], SegmentationModel],
    engine: Engine,
    policy: Policy,
    images: Sequence[np.ndarray],
    *,
    count: int,
    warmup: int,
) -> SpeedMeasurement:
    """Time predictions of single images, from an image in memory to its class ids in memory.

    Args:
        make: returns the model.
        engine: device and precision.
        policy: inference strategy.
        images: (H, W, 3) uint8 of one size, predicted in turn.
        count: number of timed predictions.
        warmup: number of predictions before them.
    """
    reset_peak_memory(engine.device)
    before = used_memory(engine.device)
    # FlopCounterMode hooks into trainable modules, which fails if no gradient is computed (slots)
    model = engine.place(make()).eval().requires_grad_(False)
    predictor = Predictor(model, engine.device, engine.autocast, policy)
    with FlopCounterMode(display=False) as counter:
        predictor.ids([images[0]])
    seconds = []
    for number in range(warmup + count):
        image = images[number % len(images)]
        began = time.perf_counter()
        predictor.ids([image])
        seconds.append(time.perf_counter() - began)
    peak = peak_memory(engine.device) - before
    size = (images[0].shape[0], images[0].shape[1])
    return _measurement(engine, 1, size, seconds[warmup:], None, peak, counter.get_total_flops())


def random_image(parts: TrainingParts) -> np.ndarray:
    """Return noise (H, W, 3) uint8 of a training image's size."""
    images = random_batch(parts, 1).image
    return np.ascontiguousarray(images.flatten(0, -4)[0].permute(1, 2, 0).numpy())


def first_images(data: SegmentationData) -> list[np.ndarray]:
    """Return the first images (H, W, 3) uint8 of a dataset that have the size of its first one."""
    read = [np.asarray(data[index]["image"]) for index in range(min(_FEW, len(data)))]
    same = [image for image in read if image.shape == read[0].shape]
    return [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in same]


def _measurement(
    engine: Engine,
    images: int,
    size: tuple[int, int],
    seconds: list[float],
    waited: float | None,
    peak: int,
    flops: int,
) -> SpeedMeasurement:
    fastest = matrix_peak(engine.device, engine.dtype)
    return SpeedMeasurement(engine.device.type, engine.precision, images, size, seconds, waited, peak, flops, fastest)


_SIDES = {"cuda": 8192, "cpu": 1024}  # sides of the multiplied matrices: large enough to be compute-bound
_TIMES = 10


def step_flops(parts: TrainingParts, samples: int, *, bf16: bool) -> int:
    """Return the FLOPs of a forward and a backward pass over `samples` samples; a multiply-add counts as two.

    Matrix products, convolutions and attention are counted, but not the loss. Operations that checkpointing repeats
    are counted again.

    Raises:
        UserError: the parts do not fit together.
    """
    learns = LossBytes(parts, bf16=bf16, accelerator=False).learns
    model, _ = outline(parts)
    with walking(), FlopCounterMode(display=False) as counter:
        ends = ends_of(predict(model.to_empty(device="cpu"), parts, samples, bf16))
        DummyLoss.apply(*(ends[index] for index in learns)).backward()
    return counter.get_total_flops()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return a device's FLOPs per second, from the fastest of several products of large square matrices."""
    side = _SIDES.get(device.type, 1024)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_TIMES):
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
