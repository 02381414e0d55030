"""Scores of segmentation: a confusion matrix for datasets, and functions of tensors.

The protocols of benchmarks, which `mode=score` uses, are in `protocols`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoseg.metrics.confusion import ConfusionMatrix
    from dinoseg.metrics.functional import (
        boundary_iou,
        expected_calibration_error,
        fit_temperature,
        mean_dice,
        mean_iou,
        pixel_accuracy,
        region_and_boundary,
        surface_dice,
    )

__all__ = [
    "ConfusionMatrix",
    "boundary_iou",
    "expected_calibration_error",
    "fit_temperature",
    "mean_dice",
    "mean_iou",
    "pixel_accuracy",
    "region_and_boundary",
    "surface_dice",
]


def __getattr__(name: str) -> Any:
    """Import a name on first access: `import dinoseg` and `mode=score` need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "confusion" if name == "ConfusionMatrix" else "functional"
    return getattr(import_module(f"dinoseg.metrics.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
