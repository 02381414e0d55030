"""Benchmark of a recipe on this device: training steps and predictions, each in a separate process."""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.autotune.fitting import Change, changed
from dinoseg.autotune.stand_in import drawn_batch
from dinoseg.autotune.step_bytes import Learnt, LossBytes, ends_of, outline, predict
from dinoseg.autotune.trial import settled, try_steps
from dinoseg.config.nodes import instantiate
from dinoseg.experiment import build
from dinoseg.experiment.builder import build_task
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.walk import walking
from dinoseg.training.engine import Engine
from dinoseg.training.meter import held_memory, peak_memory, reset_peak_memory
from dinoseg.utils.devices import synchronize

_FEW = 16  # images held in memory and predicted in turn


@dataclass(frozen=True)
class Timed:
    """Measurements of a benchmark.

    Attributes:
        device: its type.
        precision: of the computation.
        images: per pass; a training step counts all of its batches.
        size: (H, W) of the images.
        seconds: of each pass.
        waited: share of the time spent waiting for data; None: no data was read.
        peak_bytes: peak on top of what was there before: resident memory on a CPU, else allocated.
        flops: of a pass of the model.
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


def time_training(values: Mapping[str, Any], *, steps: int, warmup: int, drawn: bool) -> Timed:
    """Time training steps of a plain config after `warmup` untimed ones, on its data or, if `drawn`, on noise."""
    cfg, engine = settled(values)
    batch, accumulate = cfg.data.batch_size, cfg.trainer.accumulate
    batches: Iterator[Any] = itertools.repeat(drawn_batch(cfg, batch)) if drawn else _train_batches(cfg, engine)
    make = partial(build.model, cfg, untrained=True)
    trial = try_steps(cfg, make, engine, batches, steps=steps, warmup=warmup)
    waited = None if drawn else sum(trial.waited) / sum(trial.seconds)
    # counted last: the process keeps the memory that this frees, so the peak would miss its reuse
    flops = accumulate * step_flops(cfg, batch, bf16=engine.half)
    return _timed(engine, batch * accumulate, tuple(cfg.resolution.crop), trial.seconds, waited, trial.peak, flops)


def time_prediction(values: Mapping[str, Any], *, images: int, warmup: int, drawn: bool) -> Timed:
    """Time a plain config's predictions of single images, from an image in memory to its class ids in memory."""
    cfg, engine = settled(values)
    pictures = _pictures(cfg, drawn)
    reset_peak_memory(engine.device)
    before = held_memory(engine.device)
    # FlopCounterMode hooks into trainable modules, which fails if no gradient is computed (slots)
    model = engine.place(build.model(cfg, untrained=True)).eval().requires_grad_(False)
    predictor = Predictor(model, engine.device, engine.autocast, instantiate(cfg.inference))
    with FlopCounterMode(display=False) as counter:
        predictor.ids([pictures[0]])
    seconds = []
    for number in range(warmup + images):
        picture = pictures[number % len(pictures)]
        began = time.perf_counter()
        predictor.ids([picture])
        seconds.append(time.perf_counter() - began)
    peak = peak_memory(engine.device) - before
    size = (pictures[0].shape[0], pictures[0].shape[1])
    return _timed(engine, 1, size, seconds[warmup:], None, peak, counter.get_total_flops())


def _train_batches(cfg: DictConfig, engine: Engine) -> Iterator[Any]:
    task = build_task(cfg)
    task.open(engine)
    return task.feed.train_batches(start=0)


def _pictures(cfg: DictConfig, drawn: bool) -> list[np.ndarray]:
    """Return images (H, W, 3) uint8 of one size: validation images, or noise of a training image's size."""
    if drawn or build.on_clips(cfg):
        images = drawn_batch(cfg, 1).image
        return [np.ascontiguousarray(images.flatten(0, -4)[0].permute(1, 2, 0).numpy())]
    data = build.dataset(cfg, "val")
    read = [np.asarray(data[place]["image"]) for place in range(min(_FEW, len(data)))]
    same = [image for image in read if image.shape == read[0].shape]
    return [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in same]


def _timed(
    engine: Engine,
    images: int,
    size: tuple[int, ...],
    seconds: list[float],
    waited: float | None,
    peak: int,
    flops: int,
) -> Timed:
    fastest = matrix_peak(engine.device, engine.dtype)
    return Timed(
        engine.device.type, engine.precision, images, (size[0], size[1]), seconds, waited, peak, flops, fastest
    )


_SIDES = {"cuda": 8192, "cpu": 1024}  # sides of the multiplied matrices: large enough to be compute-bound
_TIMES = 10


def step_flops(cfg: DictConfig, samples: int, *, bf16: bool) -> int:
    """Return the FLOPs of a forward and a backward pass over `samples` samples; a multiply-add counts as two.

    Matrix products, convolutions and attention are counted. Recomputation by checkpointing and the loss are not.

    Raises:
        UserError: the parts of the config do not fit together.
    """
    parts = [part for part in ("backbone", "head") if cfg[part].get("checkpointing")]
    cfg = changed(cfg, (Change({f"{part}.checkpointing": False for part in parts}, ""),))
    learns = LossBytes(cfg, bf16=bf16, accelerator=False).learns
    model, _ = outline(cfg)
    with walking(), FlopCounterMode(display=False) as counter:
        ends = ends_of(predict(model.to_empty(device="cpu"), cfg, samples, bf16))
        Learnt.apply(*(ends[place] for place in learns)).backward()
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
