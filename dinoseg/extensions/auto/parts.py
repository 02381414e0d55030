"""Parts of a training as factories, with the plain values that its time and memory depend on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.models.model import SegmentationModel
from dinoseg.training.optim import Schedule
from dinoseg.training.trainer import Settings


@dataclass(frozen=True)
class TrainingParts:
    """Factories of the parts of a training, and the values that decide its time and memory.

    Attributes:
        model: returns the model with random weights.
        outline: returns the model on the meta device, without quantisation.
        loss: returns the loss with equal class weights.
        optimizer: returns the optimizer of a model.
        settings: returns the settings of a training of so many steps that neither validates nor saves.
        schedule: returns the learning-rate schedule.
        shape: pixels of a sample, (C, H, W) or (T, 3, H, W).
        num_classes: number of classes; 0: the samples have no masks.
        has_layers: whether masks have a layer for each class.
        scale: backbone pixels per image pixel.
        batch_size: samples of a batch, over all ranks.
        accumulate: batches per step.
        has_ema: whether a moving average of the weights is kept.
        bits: of each quantised weight; None: no weight is quantised.
        seed: of all random numbers.
        score: name of the score that selects checkpoints.
        loss_name: option of the loss group, for messages.
        checkpointing: activation checkpointing of the parts that support it, by name (backbone, head).
    """

    model: Callable[[], SegmentationModel]
    outline: Callable[[], SegmentationModel]
    loss: Callable[[], Loss]
    optimizer: Callable[[SegmentationModel], Optimizer]
    settings: Callable[[int], Settings]
    schedule: Callable[[], Schedule]
    shape: tuple[int, ...]
    num_classes: int
    has_layers: bool
    scale: float
    batch_size: int
    accumulate: int
    has_ema: bool
    bits: int | None
    seed: int
    score: str
    loss_name: str
    checkpointing: Mapping[str, bool]

    @property
    def crop(self) -> tuple[int, int]:
        """Return (H, W) of a sample."""
        return self.shape[-2], self.shape[-1]

    @property
    def has_masks(self) -> bool:
        """Return whether the samples are images with masks, not clips."""
        return len(self.shape) == 3
