"""mode=bench: speed, memory and arithmetic efficiency of a recipe's training and inference on this device."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.core.shapes import SegmentationData
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto.parts import TrainingParts
from dinoseg.extensions.auto.random_batch import random_batch
from dinoseg.extensions.auto.separate_process import run_in_process
from dinoseg.extensions.auto.step_bytes import step_flops
from dinoseg.extensions.auto.training_parts import check_trainer, training_parts
from dinoseg.extensions.auto.trial import synchronize, try_steps
from dinoseg.inference.memory import OutOfMemory
from dinoseg.inference.predictor import Predictor
from dinoseg.training.meter import peak_memory, reset_peak_memory, used_memory
from dinoseg.utils.atomic import write_json
from dinoseg.utils.ranges import Count, Natural
from dinoseg.utils.wording import count_of

_FEW = 16  # images held in memory and predicted in turn
_SIDES = {"cuda": 8192, "cpu": 1024}  # sides of the multiplied matrices: large enough to be compute-bound
_TIMES = 10  # products, of which the fastest counts


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


def bench(
    cfg: DictConfig,
    *,
    out_dir: Path,
    steps: Count = 10,
    images: Count = 20,
    warmup: Natural = 3,
    synthetic: bool = False,
) -> dict[str, Any]:
    """Time a recipe's training steps and predictions with random weights; print and return the figures.

    Args:
        cfg: the whole config.
        out_dir: the run folder; `bench.json` in it holds the figures.
        steps: training steps to time.
        images: images to predict, one by one.
        warmup: untimed steps, and images, before the timed ones.
        synthetic: use noise instead of the data, which are then not read.

    Raises:
        UserError: the recipe cannot be trained on this device, or memory does not suffice.
    """
    builder = Builder(cfg)
    check_trainer(builder)
    builder.engine()  # refuses a missing device before anything is built
    builder.make_training().check_parts(builder.outline(), 1)
    values = builder.config
    training = _run_in_process(partial(time_training, steps=steps, warmup=warmup, synthetic=synthetic), values)
    prediction = _run_in_process(partial(time_prediction, images=images, warmup=warmup, synthetic=synthetic), values)
    peak = max(training.peak_flops, prediction.peak_flops)
    result = {
        "device": training.device,
        "name": torch.cuda.get_device_name() if training.device == "cuda" else platform.machine(),
        "precision": training.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": "synthetic" if synthetic else str(cfg.choices.data),
        "matrix_peak_flops_per_s": peak,
        "train": training.figures(peak),
        "inference": prediction.figures(peak),
    }
    write_json(out_dir / "bench.json", result)
    _print(result)
    return result


def time_training(values: Mapping[str, Any], *, steps: int, warmup: int, synthetic: bool) -> SpeedMeasurement:
    """Time training steps of a plain config after `warmup` untimed ones; run it in a process of its own."""
    builder = Builder.of(values)
    engine, parts = builder.engine(), training_parts(builder)
    if synthetic:
        batches = repeat(random_batch(parts, parts.batch_size))
    else:
        training = builder.make_training()
        training.open_data(engine)
        batches = training.data_module.train_batches(start=0)
    trial = try_steps(parts, engine, batches, steps=steps, warmup=warmup)
    waited = None if synthetic else sum(trial.waited) / sum(trial.seconds)
    # operations that checkpointing repeats do not count; counted last, since the process keeps the memory that this
    # frees, so the peak would miss its reuse
    off = {f"{name}.checkpointing": False for name, is_on in parts.checkpointing.items() if is_on}
    flops = parts.accumulate * step_flops(training_parts(builder, off), parts.batch_size, bf16=engine.half)
    return SpeedMeasurement(
        device=engine.device.type,
        precision=engine.precision,
        images=parts.batch_size * parts.accumulate,
        size=parts.crop,
        seconds=trial.seconds,
        waited=waited,
        peak_bytes=trial.peak,
        flops=flops,
        peak_flops=matrix_peak(engine.device, engine.dtype),
    )


def time_prediction(values: Mapping[str, Any], *, images: int, warmup: int, synthetic: bool) -> SpeedMeasurement:
    """Time predictions of a plain config, from an image in memory to its class ids; run it in a process of its own."""
    builder = Builder.of(values)
    engine, parts = builder.engine(), training_parts(builder)
    noise = synthetic or not parts.has_masks
    shown = [random_image(parts)] if noise else first_images(builder.dataset("val"))
    reset_peak_memory(engine.device)
    before = used_memory(engine.device)
    # FlopCounterMode hooks into trainable modules, which fails if no gradient is computed (slots)
    model = engine.place(parts.model()).eval().requires_grad_(False)
    predictor = Predictor(model, engine.device, engine.autocast, builder.strategy(builder.class_names))
    with FlopCounterMode(display=False) as counter:
        predictor.ids([shown[0]])
    seconds = []
    for number in range(warmup + images):
        image = shown[number % len(shown)]
        began = time.perf_counter()
        predictor.ids([image])
        seconds.append(time.perf_counter() - began)
    peak = peak_memory(engine.device) - before  # before the matrices below
    return SpeedMeasurement(
        device=engine.device.type,
        precision=engine.precision,
        images=1,
        size=(shown[0].shape[0], shown[0].shape[1]),
        seconds=seconds[warmup:],
        waited=None,
        peak_bytes=peak,
        flops=counter.get_total_flops(),
        peak_flops=matrix_peak(engine.device, engine.dtype),
    )


def random_image(parts: TrainingParts) -> np.ndarray:
    """Return noise (H, W, 3) uint8 of a training image's size."""
    images = random_batch(parts, 1).image
    return np.ascontiguousarray(images.flatten(0, -4)[0].permute(1, 2, 0).numpy())


def first_images(data: SegmentationData) -> list[np.ndarray]:
    """Return the first images (H, W, 3) uint8 of a dataset that have the size of its first one."""
    read = [np.asarray(data[index]["image"]) for index in range(min(_FEW, len(data)))]
    same = [image for image in read if image.shape == read[0].shape]
    return [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in same]


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


def _run_in_process(work: partial[SpeedMeasurement], values: dict[str, Any]) -> SpeedMeasurement:
    found = run_in_process(work, values)
    if found is None:
        raise OutOfMemory(
            "The timed process was killed, most likely because memory ran out. mode=plan lists settings that fit."
        )
    return found


def _print(result: dict[str, Any]) -> None:
    peak = result["matrix_peak_flops_per_s"]
    print(
        f"{result['device']} ({result['name']}), {result['precision']}, {count_of(result['threads'], 'thread')}, torch "
        f"{result['torch']}; products of large matrices: {peak / 1e12:.3g} TFLOP/s\n"
    )
    columns = [_column(result[name]) for name in ("train", "inference")]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    print(tabulate(rows, headers=["", "training step", "inference"], colalign=("left", "right", "right")))


def _column(figures: dict[str, Any]) -> dict[str, str]:
    waited = figures["data_wait"]
    return {
        "images": f"{figures['images']} of {figures['size'][0]} x {figures['size'][1]}",
        "images/s": f"{figures['images_per_s']:.3g}",
        "latency, p50": f"{1000 * figures['latency_p50_s']:.3g} ms",
        "latency, p95": f"{1000 * figures['latency_p95_s']:.3g} ms",
        "waiting for data": "none read" if waited is None else f"{waited:.1%}",
        "peak memory": f"{figures['peak_bytes'] / 2**30:.2f} GiB",
        "model FLOPs": f"{figures['model_flops'] / 1e9:.4g} G",
        "of the matrix peak": f"{figures['share_of_matrix_peak']:.1%}",
    }
