"""What a model costs: how large it is, and how fast and with what memory it was trained."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from dinoseg.report.log import read_rows

COST = "cost.json"  # in the run folder of a training


def count_numbers(parameters: Iterable[Tensor]) -> dict[str, int]:
    """Return how many numbers parameters hold, `total` and `trainable`."""
    parameters = list(parameters)
    return {
        "total": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def cost_of(model: nn.Module, log: Path) -> dict[str, Any]:
    """Return how large a model is, and how fast and with what peak memory the run was, from its metrics.jsonl."""
    rows = [row for row in read_rows(log) if "train/images_per_s" in row]
    counts = count_numbers(model.parameters())
    return {
        "parameters": counts["total"],
        "trainable": counts["trainable"],
        "images_per_s": median(row["train/images_per_s"] for row in rows) if rows else None,
        "memory_gib": max((row["train/memory_gib"] for row in rows), default=None),
    }
