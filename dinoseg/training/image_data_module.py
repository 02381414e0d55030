"""Batches of images and masks, from one dataset for training and one for validation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
from torch import Tensor

from dinoseg.core.contracts import Loss, overrides_both
from dinoseg.core.metric import RowMetric
from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.core.task import SEMANTIC, ObjectTask, Task
from dinoseg.data.loader import TrainViews, advise_more_workers, check_batch_size, train_batches
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.inference.windows import Whole
from dinoseg.metrics.confusion import SCORES
from dinoseg.metrics.rows import MetricRows
from dinoseg.models.model import SegmentationModel
from dinoseg.report.overlay import compare
from dinoseg.training.data_module import SHOWN_SIDE, BatchCache, Validation, spread
from dinoseg.training.engine import Engine
from dinoseg.training.step import StepScores
from dinoseg.training.validation import evaluate
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.ranges import Count

SCORE_NAMES = tuple(sorted(["loss", *SCORES]))
OBJECT_SCORE = "miou_no_background"  # of data with a background


def list_score_names(metrics: Sequence[RowMetric], *, has_background: bool) -> tuple[str, ...]:
    """Return the names of the scores of a validation with further metrics."""
    objects = (OBJECT_SCORE,) if has_background else ()
    return (*SCORE_NAMES, *objects, *(name for metric in metrics for name in metric.scores))


@dataclass
class ImageDataModule:
    """Batches of images and masks for one rank.

    Args:
        train: training dataset.
        val: validation dataset.
        augment: joint transform of a training image and its mask.
        batch_size: images in a batch, over all ranks.
        seed: determines order and augmentation, together with epoch and sample.
        workers: data-loading processes.
        background: ID of the background class; None: there is none.
        strategy: inference strategy of validations; None: whole images.
        rank: this rank.
        world_size: number of ranks.
        pictures: number of validation images that each validation visualises, the same ones every time.
        views: fixed augmentations of each training image, used in turn; None: new ones in each epoch.
        cache: cache of what the model's frozen part computes; None: batches consist of images.
        metrics: further metrics of validations.
        task: form of the masks.
    """

    train: SegmentationData
    val: SegmentationData
    augment: Callable
    batch_size: Count
    seed: int
    workers: int
    background: int | None = None
    strategy: InferenceStrategy | None = None
    rank: int = 0
    world_size: int = 1
    pictures: int = 0
    views: Count | None = None
    cache: BatchCache | None = None
    metrics: Sequence[RowMetric] = ()
    task: Task = SEMANTIC
    score_names: Sequence[str] = field(init=False)
    lowest: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        """Refuse a batch size that does not fit, long before the first batch."""
        check_batch_size(self.batch_size, len(self.train), self.world_size)
        self._check_maps()
        self.score_names = list_score_names(self.metrics, has_background=self.background is not None)
        better = {name: which for metric in self.metrics for name, which in metric.scores.items()}
        self.lowest = ("loss", *(name for name, which in better.items() if which == "min"))

    def _check_maps(self) -> None:
        """Refuse an augmentation that cannot move the maps of the training samples, and validation without them."""
        kinds, others, augment = get_map_kinds(self.train), get_map_kinds(self.val), self.augment
        if others != kinds:
            raise UserError(
                f"`maps` of the training dataset declares {dict(kinds)}, and of the validation dataset "
                f"{dict(others)}. Declare the same maps for each split."
            )
        if not kinds:
            return
        if not (isinstance(augment, Augment) and overrides_both(type(augment), "maps", "__call__")):
            raise UserError(
                f"data.augment, a {type(augment).__name__}, cannot move the maps of the data ({', '.join(kinds)}). "
                "Inherit from dinoseg.data.transforms.Augment, and override `maps` where you override `__call__`."
            )
        with name_parameters({"affine.shear": "data.augment.affine.shear"}):
            augment.check_maps(kinds)

    @property
    def train_views(self) -> TrainViews:
        """Return the training images as augmented views."""
        # a panoptic view without objects still trains on stuff
        is_redrawn = isinstance(self.task, ObjectTask) and self.task.overlap
        return TrainViews(self.train, self.augment, self.seed, self.views, needs_objects=is_redrawn)

    @property
    def epoch(self) -> float:
        """Return the number of batches in which each image is seen once."""
        return len(self.train) / self.batch_size

    @property
    def remedy(self) -> str:
        """Return advice on loading batches faster, in a sentence or two."""
        if self.cache is not None:
            return self.cache.remedy(self.workers)
        if isinstance(self.train, PairDataset) and not self.train.decodes_files:
            advice = "Images are packed: data.cache=packed with a lower resolution.longest reads less per image."
        else:
            advice = "Decode images only once (data.cache=packed)."
        return f"{advice} {advise_more_workers(self.workers)}"

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's share of every batch from number `start` on, without end."""
        order = {"batch_size": self.batch_size, "start": start, "rank": self.rank, "world_size": self.world_size}
        if self.cache is not None:
            return self.cache.train_batches(self.train_views, workers=self.workers, **order)
        return train_batches(self.train_views, workers=self.workers, **order)

    def step_scores(self, engine: Engine) -> StepScores:
        """Return the scores of how well a training step predicts its batches."""
        return StepScores(self.train, engine, self.task)

    def validate(self, model: SegmentationModel, loss: Loss, engine: Engine) -> Validation:
        """Return the scores of `evaluate`, `iou/CLASS` for each class, and visualised predictions of some images."""
        collector = PictureCollector(self.val, self.pictures, rank=self.rank, world_size=self.world_size)
        scores = evaluate(
            model,
            self.val,
            engine,
            strategy=self.strategy,
            background=self.background,
            loss=loss,
            on_batch=collector.add,
            rows=MetricRows(self.metrics, self.val, self.rank, self.world_size) if self.metrics else None,
            batches=None if self.cache is None else self._cached_batches(self.cache, model, engine),
        )
        by_class = {f"iou/{self.val.classes[row['id']]}": row["iou"] for row in scores["classes"]}
        return Validation(scores | by_class, collector.pictures)

    def _cached_batches(self, cache: BatchCache, model: SegmentationModel, engine: Engine) -> Iterator[Any]:
        """Yield cached batches of the validation images, or the image itself if the strategy does not see it whole."""
        strategy = self.strategy or Whole()
        samples = cache.eval_batches(self.val, workers=self.workers, rank=self.rank, world_size=self.world_size)
        for index, views in zip(count(self.rank, self.world_size), samples, strict=False):
            whole = strategy.is_single_pass(model, views.size, engine.autocast)
            yield views if whole else Batch.stack([self.val[index]])


class PictureCollector:
    """Collector of visualised predictions of some images of a validation.

    Args:
        data: validation dataset.
        wanted: maximum number of images.
        rank: this rank; only rank 0 validates any of them.
        world_size: number of ranks.

    Attributes:
        pictures: frame, prediction and reference (H, W, 3) uint8, by the image's name.
    """

    def __init__(self, data: SegmentationData, wanted: int, *, rank: int, world_size: int) -> None:
        self._data = data
        self._chosen = spread(len(data), wanted, world_size)
        self._indices = count(rank, world_size)
        self._draw = partial(compare, classes=data.classes, palette=data.palette, ignore_index=data.ignore_index)
        self.pictures: dict[str, np.ndarray] = {}

    def add(self, batch: Batch, ids: Tensor, _: Tensor) -> None:
        """Draw those images of the next batch that are chosen."""
        for row, index in enumerate(islice(self._indices, len(ids))):
            if index in self._chosen:
                frame = self._data[index]["image"].permute(1, 2, 0).numpy()
                masks = ids[row].cpu().numpy(), batch.mask[row].cpu().numpy()
                self.pictures[batch.names[row]] = self._draw(frame, *masks, longest=SHOWN_SIDE)
