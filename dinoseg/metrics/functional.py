"""Scores of predictions as functions of tensors or arrays, computed in integers and float64."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.metrics import calibration, surface
from dinoseg.metrics.confusion import ConfusionMatrix, as_tensor
from dinoseg.metrics.counts import ratio as ratio_of
from dinoseg.metrics.region_boundary import object_scores
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, HighShare, NotNegative, Positive, check_annotations

Values = Tensor | np.ndarray


def mean_iou(predictions: Values, targets: Values, num_classes: int, *, ignore_index: int = 255) -> float:
    """Return the mean IoU over the classes in predictions or targets; NaN if no pixel counts.

    All pixels count together. For a dataset, update a `ConfusionMatrix` with each batch instead.

    Args:
        predictions: class ids (B, H, W) or (H, W), of any integer type.
        targets: class ids of the same shape.
        num_classes: K.
        ignore_index: target of pixels that do not count.

    Raises:
        UserError: a target is neither a class nor `ignore_index`.
        ValueError: the shapes differ, a tensor is not of an integer type, or a prediction is no class.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import mean_iou
        >>> mean_iou(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), num_classes=2)
        0.25
    """
    return _score("miou", predictions, targets, num_classes, ignore_index)


def mean_dice(predictions: Values, targets: Values, num_classes: int, *, ignore_index: int = 255) -> float:
    """Return the mean Dice coefficient over the classes in predictions or targets; see `mean_iou`.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import mean_dice
        >>> round(mean_dice(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), num_classes=2), 4)
        0.3333
    """
    return _score("dice", predictions, targets, num_classes, ignore_index)


def pixel_accuracy(predictions: Values, targets: Values, num_classes: int, *, ignore_index: int = 255) -> float:
    """Return the share of labelled pixels whose predicted class is the target's; see `mean_iou`.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import pixel_accuracy
        >>> pixel_accuracy(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), num_classes=2)
        0.5
    """
    return _score("accuracy", predictions, targets, num_classes, ignore_index)


@check_annotations
def region_and_boundary(
    prediction: Values, target: Values, num_objects: Count, *, void: Values | None = None
) -> tuple[Tensor, Tensor]:
    """Return DAVIS's region similarity J and boundary measure F of each object of a frame, (G,) float64.

    Args:
        prediction: object ids (H, W) of any integer type: 1..G, anything else is background.
        target: object ids (H, W) in the same form.
        num_objects: G.
        void: (H, W) bool or integers, True or not 0 where a pixel is background in both; None: nowhere.

    Raises:
        UserError: an argument holds no ids, or `num_objects` is below 1.
        ValueError: the maps or `void` differ in size.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import region_and_boundary
        >>> ids = torch.zeros(16, 16, dtype=torch.uint8)
        >>> ids[4:12, 4:12] = 1
        >>> region_and_boundary(ids, ids, 1)
        (tensor([1.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    prediction, target = _as_ids(prediction, "prediction"), _as_ids(target, "target")
    hidden = None if void is None else _array(_as_ids(void, "void"))
    if hidden is not None and hidden.shape != target.shape:
        raise ValueError(f"void has the shape {list(hidden.shape)}. Give that of the target, {list(target.shape)}.")
    region, boundary = object_scores(_array(target), _array(prediction), num_objects, hidden)
    return torch.from_numpy(region.copy()), torch.from_numpy(boundary.copy())


@check_annotations
def boundary_iou(prediction: Values, target: Values, num_classes: Count, *, ratio: HighShare = 0.02) -> Tensor:
    """Return the Boundary IoU (B. Cheng et al., 2021) of each class of an image, (K,) float64; NaN without pixels.

    Args:
        prediction: class ids (H, W) of any integer type; ids outside 0..K-1, such as 255, belong to no class.
        target: class ids (H, W) in the same form.
        num_classes: K.
        ratio: width of the boundary bands, as a share of the image diagonal, in (0, 1].

    Raises:
        UserError: an argument holds no ids, or a number is out of its range.
        ValueError: the maps differ in size.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import boundary_iou
        >>> ids = torch.zeros(16, 16, dtype=torch.uint8)
        >>> ids[4:12, 4:12] = 1
        >>> boundary_iou(ids, ids, 2)
        tensor([1., 1.], dtype=torch.float64)
    """
    prediction, target = _as_ids(prediction, "prediction"), _as_ids(target, "target")
    both, either = surface.boundary_ious(_array(target), _array(prediction), range(num_classes), ratio).T
    return torch.from_numpy(ratio_of(both, either))


@check_annotations
def surface_dice(prediction: Values, target: Values, num_classes: Count, *, tolerance: NotNegative) -> Tensor:
    """Return the normalised surface Dice (NSD) of each class of an image, (K,) float64; NaN for absent classes.

    Args:
        prediction: class ids (H, W) of any integer type; ids outside 0..K-1, such as 255, belong to no class.
        target: class ids (H, W) in the same form.
        num_classes: K.
        tolerance: distance in pixels up to which outlines agree, at least 0.

    Raises:
        UserError: an argument holds no ids, or a number is out of its range.
        ValueError: the maps differ in size.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import surface_dice
        >>> ids = torch.zeros(16, 16, dtype=torch.uint8)
        >>> ids[4:12, 4:12] = 1
        >>> surface_dice(ids, ids.roll(1, 0), 2, tolerance=1.0)
        tensor([1., 1.], dtype=torch.float64)
    """
    prediction, target = _as_ids(prediction, "prediction"), _as_ids(target, "target")
    near, total = surface.surface_counts(_array(target), _array(prediction), range(num_classes), tolerance).T
    return torch.from_numpy(ratio_of(near, total))


@check_annotations
def expected_calibration_error(
    logits: Values, targets: Values, *, ignore_index: int = 255, temperature: Positive = 1.0
) -> float:
    """Return the expected calibration error (C. Guo et al., 2017) over 15 bins of the confidence; NaN without pixels.

    Args:
        logits: (B, K, H, W).
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.
        temperature: divisor of the logits, above 0.

    Raises:
        UserError: a shape or type does not fit, a target is not a class, a logit is NaN or infinite, or the temperature
            is invalid.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import expected_calibration_error
        >>> expected_calibration_error(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))
        0.5
    """
    found = calibration.reliability(*_select_labelled(logits, targets, ignore_index), temperature).ece
    return float("nan") if found is None else found


def fit_temperature(logits: Values, targets: Values, *, ignore_index: int = 255) -> float:
    """Return the temperature in 0.01..100 by which logits must be divided to maximise the likelihood of the targets.

    Args:
        logits: (B, K, H, W).
        targets: (B, H, W) class ids.
        ignore_index: target of pixels that do not count.

    Raises:
        UserError: a shape or type does not fit, a target is not a class, or a logit is NaN or infinite.
        ValueError: there are no pixels.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import fit_temperature
        >>> logits = torch.tensor([[[[4.0, 4.0, 4.0, 4.0]], [[0.0, 0.0, 0.0, 0.0]]]])
        >>> round(fit_temperature(logits, torch.tensor([[[0, 0, 0, 1]]])), 2)
        3.64
    """
    rows, ids = _select_labelled(logits, targets, ignore_index)
    if not np.isfinite(rows[np.arange(len(ids)), ids]).all():
        raise UserError("Some pixels have the probability 0 for their class, so that no temperature is the best.")
    return calibration.fit_temperature(rows, ids)


def _score(name: str, predictions: Values, targets: Values, num_classes: int, ignore_index: int) -> float:
    matrix = ConfusionMatrix(num_classes, ignore_index)
    matrix.update(predictions, targets)
    found = matrix.compute()[name]
    return float("nan") if found is None else found


def _select_labelled(logits: Values, targets: Values, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits (N, K) and ids (N,) of labelled pixels."""
    logits, targets = as_tensor(logits, "logits"), _as_ids(targets, "targets")
    if logits.ndim != 4 or targets.shape != (len(logits), *logits.shape[2:]):
        raise UserError(
            f"Logits {list(logits.shape)} and targets {list(targets.shape)} do not fit. Give (B, K, H, W) and "
            "(B, H, W)."
        )
    rows = logits.detach().movedim(1, -1).flatten(0, 2)
    ids = targets.flatten().long()
    known = ids != ignore_index
    rows, ids = rows[known], ids[known]
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows.shape[1]:
        raise UserError(
            f"Some targets are not classes: give ids below {rows.shape[1]}, or {ignore_index} for no label."
        )
    if not rows.amax(1).isfinite().all():  # one of -inf is a probability of 0
        raise UserError("Some logits of labelled pixels are NaN or infinite. Check the images and weights behind them.")
    return _array(rows.double()), _array(ids)


def _as_ids(value: Any, name: str) -> Tensor:
    """Return a tensor or an array of integers or bool as a tensor; refuse others."""
    ids = as_tensor(value, name)
    if ids.is_floating_point() or ids.is_complex():
        raise UserError(f"{name} is {ids.dtype}. Give ids of an integer type: {name}.long().")
    return ids


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
