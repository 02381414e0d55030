"""Losses as functions of tensors, for a training loop of one's choice: `loss(logits, targets)` is a scalar.

All take logits (B, K, H, W) of K classes in any float type and targets (B, H, W) of any integer type, with class ids
0..K-1 and `ignore_index`; the losses of overlapping classes take targets (B, K, H, W) of 0, 1 and `ignore_index`, and
use a sigmoid for each class. Logits of another size are first upsampled to the targets. Instead of logits they take the
`Prediction` that `model(images, as_prediction=True)` returns, which saves the memory of logits at full size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.class_weights import Scheme
from dinoseg.losses.class_weights import class_weights as weights_by_scheme
from dinoseg.losses.cldice import SoftClDice
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.lovasz import Lovasz
from dinoseg.losses.mask_classification import FACTORS, MaskClassification
from dinoseg.losses.multilabel import BinaryCrossEntropy, BinaryDice
from dinoseg.losses.overlap import Dice, Tversky
from dinoseg.utils.errors import UserError

ClassWeights = Tensor | Sequence[float] | None


def cross_entropy_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
    label_smoothing: float = 0.0,
    hard_fraction: float = 1.0,
    average: str = "labelled",
) -> Tensor:
    """Return the cross-entropy over labelled pixels, averaged over their class weights; 0 without labelled pixels.

    Args:
        logits: (B, K, H, W), or a `Prediction`; upsampled to the targets if of another size.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class; None: 1 each.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        hard_fraction: share of each image's labelled pixels that count, those with the highest loss, in (0, 1]
            (online hard example mining).
        average: `labelled`, the mean over the summed weights of the labelled pixels; or `all`, the sum divided by the
            number of all pixels, ignored ones included, as in mmsegmentation and DINOv3. `all` needs
            `hard_fraction=1`.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import cross_entropy_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> round(cross_entropy_loss(logits, targets).item(), 4)
        0.6931
    """
    return _value(
        CrossEntropy,
        logits,
        targets,
        ignore_index,
        class_weights,
        label_smoothing=label_smoothing,
        hard_fraction=hard_fraction,
        average=average,
    )


def focal_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
    gamma: float = 2.0,
    hard_fraction: float = 1.0,
    average: str = "labelled",
) -> Tensor:
    """Return the focal loss (Lin et al., arXiv 1708.02002) over labelled pixels, with a softmax over the classes.

    Args:
        logits: (B, K, H, W), or a `Prediction`.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class; None: 1 each.
        gamma: focusing parameter, at least 0; 0 is cross-entropy.
        hard_fraction: as of `cross_entropy_loss`.
        average: as of `cross_entropy_loss`.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import focal_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> round(focal_loss(logits, targets, gamma=1.0).item(), 4)
        0.3466
    """
    return _value(
        Focal,
        logits,
        targets,
        ignore_index,
        class_weights,
        gamma=gamma,
        hard_fraction=hard_fraction,
        average=average,
    )


def dice_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
) -> Tensor:
    """Return the soft Dice loss (Milletari et al., arXiv 1606.04797), averaged over the classes in the targets.

    Sums are over all labelled pixels of the batch.

    Args:
        logits: (B, K, H, W), or a `Prediction`.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class in the mean; None: 1 each.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import dice_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> round(dice_loss(logits, targets).item(), 4)
        0.3333
    """
    return _value(Dice, logits, targets, ignore_index, class_weights)


def tversky_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
    alpha: float = 0.3,
    beta: float = 0.7,
) -> Tensor:
    """Return the Tversky loss (Salehi et al., arXiv 1706.05721), averaged over the classes in the targets.

    Args:
        logits: (B, K, H, W), or a `Prediction`.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class in the mean; None: 1 each.
        alpha: weight of false positives, at least 0.
        beta: weight of false negatives, above 0; both 0.5: the Dice loss.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import tversky_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> round(tversky_loss(logits, targets, alpha=0.5, beta=0.5).item(), 4)
        0.3333
    """
    return _value(Tversky, logits, targets, ignore_index, class_weights, alpha=alpha, beta=beta)


def lovasz_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
    per_image: bool = False,
) -> Tensor:
    """Return the Lovasz-softmax loss (Berman et al., arXiv 1705.08790), averaged over the classes in the targets.

    Args:
        logits: (B, K, H, W), or a `Prediction`.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class in the mean; None: 1 each.
        per_image: average over images instead of using all pixels of the batch together.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import lovasz_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> round(lovasz_loss(logits, targets).item(), 4)
        0.5
    """
    return _value(Lovasz, logits, targets, ignore_index, class_weights, per_image=per_image)


def cldice_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
    iterations: int = 3,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """Return the soft clDice loss of thin structures (Shit et al., arXiv 2003.07311), averaged over their classes.

    Args:
        logits: (B, K, H, W), or a `Prediction`.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class in the mean; None: 1 each.
        iterations: erosions of a mask, at least half the width in pixels of the structures: wider ones add no loss.
        classes: ids of the classes with thin structures; None: all but class 0.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import cldice_loss
        >>> targets = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> targets[0, 4] = 1
        >>> logits = 20 * torch.stack([targets == 0, targets == 1], dim=1).float()
        >>> round(cldice_loss(logits, targets).item(), 4)
        0.0
    """
    return _value(SoftClDice, logits, targets, ignore_index, class_weights, iterations=iterations, classes=classes)


def bce_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
) -> Tensor:
    """Return the binary cross-entropy of overlapping classes, averaged over the labelled pixels of all classes.

    Args:
        logits: (B, K, H, W), or a `Prediction`.
        targets: (B, K, H, W), 1 where a class is present, else 0.
        ignore_index: target of pixels that do not count for a class.
        class_weights: one weight (K,) per class; None: 1 each.

    Raises:
        UserError: a shape, type or value is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import bce_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
        >>> round(bce_loss(logits, targets).item(), 4)
        0.6931
    """
    return _value(BinaryCrossEntropy, logits, targets, ignore_index, class_weights, has_layers=True)


def binary_dice_loss(
    logits: Tensor | Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
) -> Tensor:
    """Return the soft Dice loss of overlapping classes, averaged over the classes in the targets; see `bce_loss`.

    Examples:
        >>> import torch
        >>> from dinoseg.losses import binary_dice_loss
        >>> logits, targets = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4, dtype=torch.uint8)
        >>> round(binary_dice_loss(logits, targets).item(), 4)
        0.3333
    """
    return _value(BinaryDice, logits, targets, ignore_index, class_weights, has_layers=True)


def mask_classification_loss(
    prediction: Prediction,
    targets: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights = None,
    factors: Mapping[str, float] = FACTORS,
    no_object: float = 0.1,
    num_points: int = 12544,
    ignored: str = "excluded",
    interpolation: str = "nearest",
) -> Tensor:
    """Return Mask2Former's loss (Cheng et al., arXiv 2112.01527) for heads of queries: mask2former and eomt.

    It samples points with torch's random state.

    Args:
        prediction: of `model(images, as_prediction=True)`.
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        class_weights: one weight (K,) per class in the class term; None: 1 each.
        factors: of the terms class, mask and dice.
        no_object: class weight of "no object".
        num_points: sampled points per mask.
        ignored: treatment of ignored pixels: `excluded`, or `background` of every mask, as in Mask2Former's code.
        interpolation: sampling of target masks at points: `nearest` pixel, or `bilinear`, as in Mask2Former's code.

    Raises:
        UserError: the prediction is one of logits, or a shape, type or value is invalid.

    Examples:
        >>> import dinoseg, torch
        >>> _ = torch.manual_seed(0)
        >>> model = dinoseg.create_model("tiny", head="eomt", adapter="full", num_classes=2)
        >>> prediction = model(torch.rand(1, 3, 32, 32), as_prediction=True)
        >>> targets = torch.zeros(1, 32, 32, dtype=torch.uint8)
        >>> loss = dinoseg.losses.mask_classification_loss(prediction, targets)
        >>> loss.shape, loss.item() > 0
        (torch.Size([]), True)
    """
    return _value(
        MaskClassification,
        prediction,
        targets,
        ignore_index,
        class_weights,
        factors=tuple(sorted(factors.items())),
        no_object=no_object,
        num_points=num_points,
        ignored=ignored,
        interpolation=interpolation,
    )


def compute_class_weights(counts: Sequence[int] | Tensor, scheme: Scheme = "median") -> Tensor:
    """Return a weight (K,) for each class from its number of pixels, for `class_weights` of the losses.

    Args:
        counts: pixels (K,) of each class in the training masks.
        scheme: one_minus_frequency, inverse, median or effective_number, as `loss.weights` on the command line.

    Raises:
        UserError: a count is not a whole number, the scheme is unknown, or there are no pixels.

    Examples:
        >>> from dinoseg.losses import compute_class_weights
        >>> compute_class_weights([900, 100], "one_minus_frequency")
        tensor([0.1000, 0.9000])
    """
    if isinstance(counts, Mapping) or not all(float(count).is_integer() and count >= 0 for count in counts):
        raise UserError("counts: give a whole number of pixels of at least 0 for each class, in the order of the ids.")
    numbers = [int(count) for count in counts]
    return weights_by_scheme(numbers, [str(number) for number in range(len(numbers))], scheme)


def _value(
    kind: Callable[..., Loss],
    logits: Tensor | Prediction,
    targets: Tensor,
    ignore_index: int,
    class_weights: ClassWeights,
    *,
    has_layers: bool = False,
    **options: Any,
) -> Tensor:
    """Return the value () of a loss class with these options; `has_layers`: of targets (B, K, H, W)."""
    prediction = logits if isinstance(logits, Prediction) else _as_prediction(logits)
    device, images, classes = _form_of(prediction)
    _check_targets(targets, (images, classes), ignore_index, has_layers=has_layers)
    options = {name: _plain(name, value) for name, value in options.items()}
    if class_weights is None:
        loss = _unweighted_loss(kind, classes, device, ignore_index, **options)
    else:
        weights = torch.as_tensor(class_weights, dtype=torch.float32).detach()
        is_valid = ((weights >= 0) & (weights < torch.inf)).all() and weights.any()
        if weights.shape != (classes,) or not is_valid:
            raise UserError(
                f"class_weights={weights.tolist()}: give {classes} numbers of at least 0, one per class, not all of "
                "them 0."
            )
        loss = _build_loss(kind, weights, ignore_index, options).to(device)
    batch = Batch.of_masks(targets)
    return loss(prediction, batch)[0]


def _plain(name: str, value: Any) -> Any:
    """Return an option as a plain value, which the cache of losses needs; tables and lists are tuples."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and (name == "classes" or not value.ndim):
        value = value.tolist()
    return tuple(value) if name == "classes" and isinstance(value, Iterable) else value


@lru_cache(maxsize=64, typed=True)  # 1 is not taken for True, whose loss is there already
def _unweighted_loss(
    kind: Callable[..., Loss], num_classes: int, device: torch.device, ignore_index: int, **options: Any
) -> Loss:
    """Return a loss with equal class weights; made once, since a constructor reads the weights back from the device."""
    with torch.inference_mode(False):  # its tensors are reused in training
        return _build_loss(kind, torch.ones(num_classes), ignore_index, options).to(device)


def _build_loss(kind: Callable[..., Loss], weights: Tensor, ignore_index: int, options: Mapping[str, Any]) -> Loss:
    known = {name: dict(value) if name == "factors" else value for name, value in options.items()}
    return kind(weights, ignore_index, **known)


def _as_prediction(logits: Tensor) -> Prediction:
    """Return logits (B, K, H, W) as a prediction.

    Raises:
        UserError: they have another shape or type.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 4 or not logits.is_floating_point():
        form = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"The logits are {form}. Give floats (B, K, H, W), or a Prediction.")
    size = (logits.shape[2], logits.shape[3])
    return Prediction(logits, size, (1.0, 1.0), upsample, grid=logits)


def _form_of(prediction: Prediction) -> tuple[torch.device, int, int]:
    """Return the device of a prediction, its number B of images and its number K of classes."""
    if prediction.masks is not None:
        shares = prediction.masks.shares
        return shares.device, shares.shape[0], shares.shape[2]
    scores = prediction.scores((1, 1)) if prediction.grid is None else prediction.grid
    return scores.device, scores.shape[0], scores.shape[1]


def _check_targets(targets: Tensor, sizes: tuple[int, int], ignore_index: int, *, has_layers: bool) -> None:
    """Refuse targets of another shape or type than the prediction needs, and ids that are no class.

    Args:
        targets: class ids (B, H, W), or layers (B, K, H, W).
        sizes: numbers B of images and K of classes of the prediction.
        ignore_index: target of pixels that do not count.
        has_layers: whether the targets must be layers.

    Raises:
        UserError: naming what to give.
    """
    images, classes = sizes
    last = 1 if has_layers else classes - 1
    leading = [images, classes] if has_layers else [images]
    if list(targets.shape[:-2]) != leading or targets.is_floating_point():
        form = f"{'layers' if has_layers else 'class ids'} ({', '.join(map(str, leading))}, H, W)"
        others = "cross_entropy_loss take (B, H, W)" if has_layers else "bce_loss take (B, K, H, W)"
        raise UserError(
            f"The targets are {targets.dtype} {list(targets.shape)}. Give {form} of integers; losses such as {others}."
        )
    if has_layers and ignore_index in (0, 1):
        raise UserError(f"ignore_index={ignore_index}: layers hold 0 and 1. Give another value, such as 255.")
    ids = targets.long()
    wrong = ((ids < 0) | (ids > last)) & (ids != ignore_index)
    if targets.device.type != "cpu":  # without waiting for the device
        torch._assert_async(~wrong.any(), f"The targets hold ids outside 0..{last} and {ignore_index}.")
    elif wrong.any():
        found = ids[wrong].unique()[:5].tolist()
        raise UserError(
            f"The targets hold the ids {found}, which are neither classes (0..{last}) nor "
            f"ignore_index={ignore_index}. Convert them, or set ignore_index."
        )
