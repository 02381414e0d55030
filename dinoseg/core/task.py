"""What a model predicts for a pixel: exactly one class, or a yes or no for each class."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dinoseg.core.class_ids import argmax_ids
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, OpenShare, check_annotations


class Task(ABC):
    """Base class of tasks: the meaning of class scores and the form of masks.

    Attributes:
        has_layers: whether a mask is (K, H, W), with 0, 1 or `ignore_index` for each class; else (H, W) class ids.
        reader_options: keyword arguments of the data's reader, in addition to those of its config.
        advice: losses and heads to choose, for messages.
        thresholds: (K,) probabilities from which a class is predicted; None: the most probable class is.
    """

    has_layers: ClassVar[bool]
    reader_options: ClassVar[Mapping[str, Any]]
    advice: ClassVar[str]
    thresholds: Sequence[float] | None = None

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, K, H, W) of class logits."""

    @abstractmethod
    def logits(self, probabilities: Tensor) -> Tensor:
        """Return float32 logits (B, K, H, W) whose `probabilities` are these."""

    @abstractmethod
    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the predicted masks, uint8, of probabilities (B, K, H, W)."""


class SemanticTask(Task):
    """Each pixel has one class: softmax over the classes, and masks (B, H, W) of class ids."""

    has_layers = False
    reader_options: ClassVar[Mapping[str, Any]] = {}
    advice = "loss=cross_entropy or loss=ce_dice"

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax over the classes."""
        return logits.softmax(dim=1)

    def logits(self, probabilities: Tensor) -> Tensor:
        """Return the logarithm of the probabilities."""
        return _clamp(probabilities).log()

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the ids (B, H, W) of the most probable classes; ties go to the first."""
        return argmax_ids(probabilities)


class MultilabelTask(Task):
    """A pixel has any number of classes: a sigmoid for each class, and masks (B, K, H, W) of 0 and 1.

    Args:
        num_classes: K.
        threshold: probability from which a class is predicted, one for all classes or one for each.

    Raises:
        UserError: the number of thresholds is neither 1 nor K.
    """

    has_layers = True
    reader_options: ClassVar[Mapping[str, Any]] = {"layers": True}
    advice = "loss=bce or loss=bce_dice"

    @check_annotations
    def __init__(self, num_classes: Count, threshold: OpenShare | Sequence[OpenShare] = 0.5) -> None:
        given = [threshold] * num_classes if isinstance(threshold, float) else list(threshold)
        if len(given) != num_classes:
            raise UserError(f"threshold={given}: give one number, or one for each of the {num_classes} classes.")
        self.thresholds = given

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sigmoid."""
        return logits.sigmoid()

    def logits(self, probabilities: Tensor) -> Tensor:
        """Return the logarithm of the odds."""
        return _clamp(probabilities).log() - _clamp(1 - probabilities.float()).log()

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return 1 where a class reaches its threshold, else 0: (B, K, H, W)."""
        return (probabilities >= probabilities.new_tensor(self.thresholds).view(-1, 1, 1)).to(torch.uint8)


SEMANTIC = SemanticTask()


def _clamp(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp(min=torch.finfo(torch.float32).tiny)


def refuse_layers(task: Task, what: str, remedy: str) -> None:
    """Refuse a multi-label model where each pixel needs one class.

    Args:
        task: of the model.
        what: what needs it, as the subject of a sentence.
        remedy: sentence that says what to do instead.

    Raises:
        UserError: masks of the task have layers.
    """
    if task.has_layers:
        raise UserError(f"task=multilabel: {what} needs one class per pixel. {remedy}")
