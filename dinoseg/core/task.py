"""Predictions for a pixel: exactly one class, or a yes or no for each class."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dinoseg.core.class_ids import argmax_ids
from dinoseg.core.metric import BINS
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import MapKind
from dinoseg.core.targets import MaskTargets, class_targets
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Count, OpenShare, Positive, check_annotations


class Task(ABC):
    """Base class of tasks: the meaning of class scores and the form of masks.

    Attributes:
        has_layers: whether a mask is (K, H, W), with 0, 1 or `ignore_index` for each class; else (H, W) class ids.
        reader_options: keyword arguments of the data's reader, in addition to those of its config.
        advice: losses and heads to choose, for messages.
        thresholds: (K,) probabilities from which a class is predicted; None: the most probable class is.
        is_auto: whether `thresholds` are still to be chosen on data.
        chosen_on: the split on which `thresholds` were chosen; None: they were set.
        beta: thresholds are chosen by F-beta.
        eval_metrics: options of the group `metric` that mode=eval counts by default.
    """

    has_layers: ClassVar[bool]
    reader_options: ClassVar[Mapping[str, Any]]
    advice: ClassVar[str]
    eval_metrics: ClassVar[Sequence[str]] = ()
    thresholds: Sequence[float] | None = None
    is_auto: bool = False
    beta: float = 1.0
    chosen_on: str | None = None

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, K, H, W) of class logits."""

    @abstractmethod
    def logits(self, probabilities: Tensor) -> Tensor:
        """Return float32 logits (B, K, H, W) whose `probabilities` are these."""

    def pixel_scores(self, scores: Tensor) -> Tensor:
        """Return class scores of pixels (B, K, H, W), where the highest wins, from those of masks.

        Args:
            scores: sums (B, K, H, W) over the masks of each one's class probability times that of the pixel; they may
                exceed 1.
        """
        return scores

    def class_masks(self, logits: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks whose mixture has the same highest class at each pixel as `pixel_scores`.

        Args:
            logits: of the masks (B, Q, h, w).
            shares: (B, Q, K) of each mask in each class; a class's score is the sum of share times mask probability.
        """
        return logits, shares

    @abstractmethod
    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the predicted masks, uint8, of probabilities (B, K, H, W)."""

    def targets(self, mask: Tensor, maps: Mapping[str, Tensor], num_classes: int, ignore_index: int) -> MaskTargets:
        """Return the target masks of a head that predicts masks; by default, each class of an image is a target.

        Args:
            mask: class ids (B, H, W) uint8.
            maps: of the batch, by name.
            num_classes: K.
            ignore_index: id of pixels without a label.
        """
        return class_targets(mask, num_classes, ignore_index)

    def use_thresholds(self, thresholds: Sequence[float], chosen_on: str) -> None:
        """Decide by thresholds that were chosen on a split from here on."""
        self.thresholds, self.is_auto, self.chosen_on = [*thresholds], False, chosen_on


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
        threshold: probability from which a class is predicted, one for all classes or one for each; `auto`: 0.5, until
            thresholds are chosen.
        beta: thresholds are chosen by the best F-beta: recall counts `beta` times as much as precision; 1: Dice.

    Raises:
        UserError: the number of thresholds is neither 1 nor K.
    """

    has_layers = True
    reader_options: ClassVar[Mapping[str, Any]] = {"layers": True}
    advice = "loss=bce or loss=bce_dice"
    eval_metrics = ("average_precision",)

    @check_annotations
    def __init__(
        self,
        num_classes: Count,
        threshold: OpenShare | Sequence[OpenShare] | Literal["auto"] = 0.5,
        *,
        beta: Positive = 1.0,
    ) -> None:
        self.is_auto, self.beta = threshold == "auto", beta
        if isinstance(threshold, str):
            threshold = 0.5
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
        # bfloat16 would round the thresholds
        wide = at_least_float32(probabilities)
        return (wide >= wide.new_tensor(self.thresholds).view(-1, 1, 1)).to(torch.uint8)


SEMANTIC = SemanticTask()


def probability_bins(probabilities: Tensor) -> Tensor:
    """Return the bin of each probability, int16 in 0..1023; the last one includes 1.

    A multi-label task of threshold n / 1024 decides exactly the pixels of bin n and above, in any precision.
    """
    return (at_least_float32(probabilities) * BINS).to(torch.int16).clamp(max=BINS - 1)


def _clamp(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp(min=torch.finfo(torch.float32).tiny)


def refuse_layers(task: Task, what: str, remedy: str) -> None:
    """Refuse a multi-label model where each pixel needs one class.

    Args:
        task: of the model.
        what: what needs it, as the subject of a sentence.
        remedy: sentence that names the alternative.

    Raises:
        UserError: masks of the task have layers.
    """
    if task.has_layers:
        raise UserError(f"task=multilabel: {what} needs one class per pixel. {remedy}")


class ObjectTask(SemanticTask):
    """Base class of tasks that also predict the single objects of an image, from the masks of queries.

    Its `targets` are the objects of the map `object_ids.OBJECTS`. The rules are those of an extension.

    Attributes:
        overlap: whether objects may overlap; else each pixel belongs to one at most.
        things: ids of the classes whose objects are separated.
        graph_options: plain values with which an exported graph finds the objects; None: it cannot. Keys: `things`,
            `background`, `max_instances`, `score_threshold` and `overlap_threshold`; those of the other kind are None.
        scored_file: the output of mode=predict with its objects, the file there, and the protocol that scores it.
    """

    overlap: ClassVar[bool]
    scored_file: ClassVar[tuple[str, str, str]]
    things: Collection[int]
    graph_options: Mapping[str, Any] | None = None

    @abstractmethod
    def find_objects(
        self, class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], valid: tuple[float, float]
    ) -> list[Objects]:
        """Return the objects of each image from the masks of its queries.

        Args:
            class_logits: (B, Q, K + 1), the last column means "no object"; (B, Q, K) without it.
            mask_logits: (B, Q, h, w).
            size: (H, W) of the masks to predict.
            valid: share of the height and width of `mask_logits` that the image covers.
        """

    @abstractmethod
    def join_objects(self, parts: Sequence[tuple[Objects, int, int]], size: tuple[int, int]) -> Objects:
        """Return the objects of an image of `size` (H, W) from those of overlapping parts.

        Args:
            parts: objects of each part, and its first row and column.
            size: (H, W) of the image.
        """

    def fuse_objects(self, members: Sequence[Objects]) -> Objects:
        """Return the objects of an image from those of each of several models; of a task whose objects overlap."""
        raise NotImplementedError

    def check_data(self, name: str, kinds: Mapping[str, MapKind], classes: Sequence[str], loss: Any) -> None:  # noqa: B027
        """Refuse data that lack what a training for this task reads, or a loss that cannot be computed on them.

        Args:
            name: of the data, for messages.
            kinds: of their maps, by name.
            classes: names in the order of their ids.
            loss: a `Loss`.

        Raises:
            UserError: they do not fit.
        """

    def check_objects(self, name: str, data: Any) -> None:  # noqa: B027
        """Refuse data without any object to learn from; images are read until one has an object.

        Args:
            name: of the data, for messages.
            data: a `SegmentationData`.

        Raises:
            UserError: there is no object, or a file is unreadable.
        """
