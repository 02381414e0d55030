"""Losses of segmentation: `loss(logits, targets)` on tensors, for any training loop.

`functional` documents their arguments. The classes that `mode=train` uses, which take a prediction and a batch, are in
the modules of this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoseg.losses.functional import (
        bce_loss,
        binary_dice_loss,
        cldice_loss,
        compute_class_weights,
        cross_entropy_loss,
        dice_loss,
        focal_loss,
        lovasz_loss,
        mask_classification_loss,
        tversky_loss,
    )

__all__ = [
    "bce_loss",
    "binary_dice_loss",
    "cldice_loss",
    "compute_class_weights",
    "cross_entropy_loss",
    "dice_loss",
    "focal_loss",
    "lovasz_loss",
    "mask_classification_loss",
    "tversky_loss",
]


def __getattr__(name: str) -> Any:
    """Import a function on first access: `import dinoseg` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dinoseg.losses.functional"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
