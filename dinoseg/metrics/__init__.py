"""Scores of segmentation: a confusion matrix and metrics for datasets, and functions of tensors.

The protocols of benchmarks, which `mode=score` uses, are in `protocols`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoseg.core.metric import LabelledImage, Metric, PredictedImage
    from dinoseg.metrics.average_precision import AveragePrecision
    from dinoseg.metrics.calibration import CalibrationError
    from dinoseg.metrics.cldice import ClDice
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
    from dinoseg.metrics.layers import LayerMetric
    from dinoseg.metrics.miou import MeanIoU
    from dinoseg.metrics.outlines import BoundaryIoU, SurfaceDice

_HOMES = {  # modules of the classes; the functions are in `functional`
    "AveragePrecision": "dinoseg.metrics.average_precision",
    "BoundaryIoU": "dinoseg.metrics.outlines",
    "CalibrationError": "dinoseg.metrics.calibration",
    "ClDice": "dinoseg.metrics.cldice",
    "ConfusionMatrix": "dinoseg.metrics.confusion",
    "LabelledImage": "dinoseg.core.metric",
    "LayerMetric": "dinoseg.metrics.layers",
    "MeanIoU": "dinoseg.metrics.miou",
    "Metric": "dinoseg.core.metric",
    "PredictedImage": "dinoseg.core.metric",
    "SurfaceDice": "dinoseg.metrics.outlines",
}
__all__ = [
    "AveragePrecision",
    "BoundaryIoU",
    "CalibrationError",
    "ClDice",
    "ConfusionMatrix",
    "LabelledImage",
    "LayerMetric",
    "MeanIoU",
    "Metric",
    "PredictedImage",
    "SurfaceDice",
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
    return getattr(import_module(_HOMES.get(name, "dinoseg.metrics.functional")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
