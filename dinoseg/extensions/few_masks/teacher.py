"""The teacher: an average of the student's weights, which labels weak views; and the student's batches."""

from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.geometry import widths
from dinoseg.core.shapes import Batch
from dinoseg.extensions.few_masks.loss import StudentBatch
from dinoseg.extensions.few_masks.views import UnlabelledBatch
from dinoseg.inference.memory import OutOfMemory
from dinoseg.inference.strategy import Autocast
from dinoseg.losses.full_resolution import pixel_values
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.optim import MovingAverage
from dinoseg.utils.ranges import Share


class TeacherAverage(MovingAverage):
    """Moving average that starts as the mean of the weights after each step."""

    def decay_at(self, step: int) -> float:
        """Return the decay after a 0-based step: at most 1 - 1 / (step + 1), which is 0 after the first one."""
        return min(1 - 1 / (step + 1), self.decay)


def predict_labels(model: SegmentationModel, weak: Tensor, autocast: Autocast) -> tuple[Tensor, Tensor]:
    """Return the predicted classes (B, H, W) uint8 of views (B, C, H, W), and their probabilities (B, H, W).

    The model predicts in evaluation mode, and is in training mode afterwards.
    """
    model.eval()
    with torch.no_grad(), autocast():
        prediction = model(weak)
    model.train()
    ids = prediction.class_ids()
    # tile by tile: no probabilities of all classes at full size
    return ids, pixel_values(prediction, Batch.of_masks(ids), -1, lambda scores, *_: scores.softmax(0).amax(0))


def draw_dropout(channels: int, images: int) -> list[Tensor]:
    """Return factors (B, C) on the channels of two views: 0 or 2 of the first, and 2 minus it of the second.

    Those of floor(B / 2) images are 1.
    """
    first = 2 * torch.bernoulli(torch.full((images, channels), 0.5))
    first[torch.randperm(images)[: images // 2]] = 1
    return [first, 2 - first]


@dataclass
class EmaTeacher:
    """Labels images without masks, and joins them with those with masks to the batch of a student.

    Args:
        model: the student.
        average: of its weights, the teacher.
        engine: device and precision.
        threshold: probability from which a predicted class is a pseudo-label.
        dropout: whether the student's views are trained with (complementary) channel dropout.
        ignore_index: of the data.
    """

    model: SegmentationModel
    average: MovingAverage
    engine: Engine
    threshold: Share
    dropout: bool
    ignore_index: int
    _factors: list[Tensor] = field(default_factory=list, init=False)  # (N, C) of the next pass of the student

    def __post_init__(self) -> None:
        """Let the head's input pass through the dropout."""
        self.model.head.register_forward_pre_hook(self._drop_channels)

    def complete(self, labelled: Batch, unlabelled: UnlabelledBatch) -> StudentBatch:
        """Return the batch of the student, with the teacher's pseudo-labels; draw its dropout."""
        with self.average.use_average():
            self.engine.broadcast_buffers(self.model)  # running means differ between ranks
            ids, confidence = predict_labels(self.model, unlabelled.weak, self.engine.autocast)
        sure = (confidence >= self.threshold) & ~unlabelled.padding
        targets = ids.where(sure, self.ignore_index)
        views = range(unlabelled.strong.shape[1])
        strong = torch.cat([unlabelled.mix(unlabelled.strong[:, view], view) for view in views])
        if self.dropout:
            # one mask for all maps of a transformer, one for each level of a pyramid
            channels = widths(self.model.backbone.dim, 1)
            draws = [
                [torch.ones(labelled.count, each), *draw_dropout(each, len(ids))[: len(views)]] for each in channels
            ]
            self._factors = [torch.cat(draw).to(ids.device) for draw in draws]
        return StudentBatch(
            image=torch.cat([labelled.image, strong]),
            mask=torch.cat([labelled.mask, targets.new_full((len(strong), *targets.shape[1:]), self.ignore_index)]),
            names=[*labelled.names, *(unlabelled.names * len(views))],
            labelled=labelled,
            targets=torch.stack([unlabelled.mix(targets, view) for view in views]),
            counted=unlabelled.count_pixels(),
            facts={
                "confident": sure.sum() / (~unlabelled.padding).sum(),
                "pseudo_accuracy": (sure & (ids == unlabelled.truth)).sum()
                / (sure & (unlabelled.truth != self.ignore_index)).sum(),
            },
        )

    def _drop_channels(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Multiply the maps (N, C, h, w) of the student by its factors, once."""
        factors = self._factors
        self._factors = []
        pairs = zip(inputs[0], cycle(factors), strict=False)
        return ([part * factor[:, :, None, None] for part, factor in pairs],) if factors else None


@dataclass
class FewMasksBatch:
    """Images with masks and views of those without; `to` lets the teacher label these."""

    teacher: EmaTeacher
    labelled: Batch
    unlabelled: UnlabelledBatch

    @property
    def names(self) -> list[str]:
        """Return the names of the images."""
        return [*self.labelled.names, *self.unlabelled.names]

    def split(self, parts: int) -> list["FewMasksBatch"]:
        """Refuse to split the batch, since CutMix and dropout depend on all of its images.

        Raises:
            OutOfMemory: always.
        """
        raise OutOfMemory(
            f"Not enough memory, and a batch with CutMix cannot be split into {parts}. Set a smaller data.batch_size "
            "and trainer.unlabelled_batch_size with more trainer.accumulate, backbone.checkpointing=true, or a smaller "
            "resolution.crop."
        )

    def to(self, device: torch.device) -> StudentBatch:
        """Return the batch of the student on `device`."""
        return self.teacher.complete(self.labelled.to(device), self.unlabelled.to(device))
