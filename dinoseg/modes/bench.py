"""mode=bench: speed, memory and arithmetic efficiency of a recipe's training and inference on this device."""

import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.autotune.speed import SpeedMeasurement, first_images, random_image, time_prediction, time_training
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import check_trainer, training_parts
from dinoseg.inference.memory import OutOfMemory
from dinoseg.utils.atomic import write_json
from dinoseg.utils.ranges import Count, Natural
from dinoseg.utils.wording import count_of
from dinoseg.utils.workers import run_in_process


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
    build = Builder(cfg)
    check_trainer(build)
    build.engine()  # refuses a missing device before anything is built
    build.task().check_parts(build.outline(), 1)
    values = build.config
    training = _run_in_process(partial(_time_training, steps=steps, warmup=warmup, synthetic=synthetic), values)
    prediction = _run_in_process(partial(_time_prediction, images=images, warmup=warmup, synthetic=synthetic), values)
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


def _time_training(values: Mapping[str, Any], *, steps: int, warmup: int, synthetic: bool) -> SpeedMeasurement:
    """Time training steps of a plain config; run it in a process of its own."""
    build = Builder.of(values)
    engine, parts = build.engine(), training_parts(build)
    task = build.task()
    if not synthetic:
        task.open(engine)
    batches = None if synthetic else task.data_module.train_batches(start=0)
    off = {f"{name}.checkpointing": False for name, is_on in parts.checkpointing.items() if is_on}
    return time_training(parts, engine, batches, steps=steps, warmup=warmup, counted=training_parts(build, off))


def _time_prediction(values: Mapping[str, Any], *, images: int, warmup: int, synthetic: bool) -> SpeedMeasurement:
    """Time predictions of a plain config; run it in a process of its own."""
    build = Builder.of(values)
    engine, parts = build.engine(), training_parts(build)
    noise = synthetic or not parts.has_masks
    shown = [random_image(parts)] if noise else first_images(build.dataset("val"))
    return time_prediction(parts.model, engine, build.part("inference"), shown, count=images, warmup=warmup)


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
