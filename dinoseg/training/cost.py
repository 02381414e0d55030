"""Cost of a model: its size, and the speed and memory of its training."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from dinoseg.report.log import read_rows

COST = "cost.json"  # in the run folder of a training


def count_numbers(parameters: Iterable[Tensor]) -> dict[str, int]:
    """Return the number of values that parameters hold, as `total` and `trainable`."""
    parameters = list(parameters)
    return {
        "total": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def cost_of(model: nn.Module, log: Path) -> dict[str, Any]:
    """Return a model's size, and the speed and peak memory of its run, read from the run's metrics.jsonl."""
    rows = [row for row in read_rows(log) if "train/images_per_s" in row]
    counts = count_numbers(model.parameters())
    return {
        "parameters": counts["total"],
        "trainable": counts["trainable"],
        "images_per_s": median(row["train/images_per_s"] for row in rows) if rows else None,
        "memory_gib": max((row["train/memory_gib"] for row in rows), default=None),
    }
