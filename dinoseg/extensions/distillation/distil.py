"""Distillation: a student learns the class scores of a trained segmenter, on images with masks and without."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import Loss, overrides_both, safe_divide
from dinoseg.core.shapes import Batch, Prediction, SegmentationData, join_batches
from dinoseg.core.task import ObjectTask, refuse_layers
from dinoseg.data.loader import TrainViews, sample_batches
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.distillation.loss import TeacherView, divergence
from dinoseg.extensions.distillation.teacher import TEACHERS, Teacher, check_named
from dinoseg.extensions.distillation.unmasked import UNMASKED, open_unmasked
from dinoseg.extensions.feature_cache.cache import LazyFeatureBatch
from dinoseg.extensions.feature_cache.form import MAX_BYTES
from dinoseg.extensions.feature_cache.key import image_hash, origin
from dinoseg.extensions.feature_cache.store import DiskStore, FeatureStore, cap_of
from dinoseg.extensions.feature_cache.unlabelled import Unmasked
from dinoseg.methods.images import ImageTraining
from dinoseg.training.description import TEACHER
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import NotNegative, Temperature
from dinoseg.utils.units import hash_of
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
_LONGEST = 2**24  # maximum side in pixels
Look = Callable[[], TeacherView]


@dataclass
class CachedScores:
    """A teacher's class scores of whole images: read from a cache, or computed and cached.

    Args:
        ask: maps an image (C, H, W) to scores (K, h, w) and the share of that grid that the image covers.
        store: cache of the scores.
        classes: K.
    """

    ask: Callable[[Tensor], tuple[Tensor, tuple[float, float]]]
    store: FeatureStore
    classes: int

    def look(self, drawn: TrainViews, epoch: int, sample: int) -> TeacherView:
        """Return the scores of the view that a sample shows in an epoch.

        Raises:
            UserError: the image cannot be read, or the teacher cannot predict it.
        """
        data = drawn.data
        scores, (height, width, *valid) = self._of_image(data, sample)
        size = round(height), round(width)
        assert isinstance(drawn.augment, Augment)
        reads_mask = drawn.augment.cat_max_ratio is not None
        mask = _mask(data, sample) if reads_mask else np.broadcast_to(np.uint8(0), size)
        matrix = drawn.augment.place(mask, drawn.make_rng(epoch, sample))
        return TeacherView.of(scores, (valid[0], valid[1]), matrix, (mask.shape[0], mask.shape[1]))

    def _of_image(self, data: SegmentationData, index: int) -> tuple[Tensor, list[float]]:
        """Return scores (K, h, w) of an image at its file's own size, and its height, width and shares of the grid."""
        files = data.source if isinstance(data, PairDataset) else data
        key = hash_of(image_hash(files, index))
        cached = self.store.get(key)
        if cached is None or not self._is_valid(cached):
            image = files[index]["image"]
            scores, valid = self.ask(image)
            if scores.nbytes > MAX_BYTES:
                raise UserError(
                    f"The teacher's scores of {data.names[index]} are {' x '.join(map(str, scores.shape))} numbers, "
                    f"{scores.nbytes / 2**20:.0f} MiB, above the limit of {MAX_BYTES / 2**20:.0f} MiB. Choose a "
                    "teacher whose head has a coarser output, or smaller images."
                )
            facts = torch.tensor([*image.shape[-2:], *valid], dtype=torch.float64)
            cached = self.store.put(key, [scores, facts.view(torch.uint8)])
        return cached[0], cached[1].view(torch.float64).tolist()

    def _is_valid(self, cached: Sequence[Tensor]) -> bool:
        """Return whether cached tensors are scores of `classes` classes, with a valid size and valid shares."""
        if len(cached) != 2 or cached[0].dim() != 3 or (cached[1].dtype, cached[1].shape) != (torch.uint8, (32,)):
            return False
        facts = cached[1].view(torch.float64)
        sizes, shares = facts.split(2)
        whole = bool((sizes >= 1).all() and (sizes <= _LONGEST).all() and (shares > 0).all() and (shares <= 1).all())
        return whole and len(cached[0]) == self.classes


@dataclass
class Part:
    """Samples of one kind, each with a function that returns the teacher's scores of it."""

    batch: Batch | LazyFeatureBatch
    lookups: list[Look]

    def split(self, parts: int) -> list["Part"]:
        """Split the samples in their order into parts whose sizes differ by at most one sample."""
        rest = iter(self.lookups)
        return [Part(batch, list(islice(rest, len(batch.names)))) for batch in self.batch.split(parts)]


@dataclass
class ScoredBatch:
    """Samples with masks, followed by those without, if any; `to` looks up the teacher's scores."""

    parts: list[Part]

    @property
    def names(self) -> list[str]:
        """Return the names of the kind with fewer samples: each part of a split batch has to hold some of them."""
        return min((part.batch.names for part in self.parts), key=len)

    @property
    def with_masks(self) -> "Batch | LazyFeatureBatch":
        """Return the samples with masks."""
        return self.parts[0].batch

    @property
    def count(self) -> int:
        """Return the number of images."""
        return sum(len(part.batch.names) for part in self.parts)

    def split(self, parts: int) -> list["ScoredBatch"]:
        """Split the samples of each kind, in their order, into `parts` batches."""
        return [ScoredBatch(list(each)) for each in zip(*(part.split(parts) for part in self.parts), strict=True)]

    def to(self, device: torch.device) -> "DistilledBatch":
        """Return all samples as one batch on `device`, with the teacher's scores of each."""
        batches = [part.batch.to(device) for part in self.parts]
        seen = [look().to(device) for part in self.parts for look in part.lookups]
        return DistilledBatch(**vars(join_batches(batches)), seen=seen, labelled=len(batches[0].names))


@dataclass(kw_only=True)
class DistilledBatch(Batch):
    """Views with the teacher's scores of each; the masks of the first `labelled` ones are used as labels."""

    seen: list[TeacherView]
    labelled: int

    @property
    def with_masks(self) -> Batch:
        """Return the views with masks."""
        views = Batch(**{part.name: getattr(self, part.name) for part in fields(Batch)})
        return views.select(slice(self.labelled))


@dataclass(kw_only=True)
class DistillationDataModule(ImageDataModule):
    """Batches for distillation from a trained segmenter: images with masks, and optionally images without.

    Args:
        scores: scores of the teacher.
        others: feed of the images without masks; None: there are none.
    """

    scores: CachedScores
    others: ImageDataModule | None = None

    def __post_init__(self) -> None:
        """Refuse augmentations that do not report where a view lies in its image."""
        super().__post_init__()
        if not (isinstance(self.augment, Augment) and overrides_both(type(self.augment), "place", "__call__")):
            raise UserError(
                f"trainer=distil: data.augment, a {type(self.augment).__name__}, does not return the position of a "
                "view in its image, which is needed to crop the teacher's scores. Inherit from "
                "dinoseg.data.transforms.Augment with `place` as `__call__`, or choose another trainer."
            )

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's share of every batch from number `start` on, without end."""
        kinds = [_parts(self.scores, self, super().train_batches(start), start)]
        if self.others is not None:
            self.others.cache = self.cache
            kinds.append(_parts(self.scores, self.others, self.others.train_batches(start), start))
        return map(ScoredBatch, map(list, zip(*kinds, strict=True)))


class DistilledLoss(Loss):
    """Sum of a loss on images with masks and `weight` times the divergence from a teacher on all images.

    Args:
        criterion: the loss on masks.
        weight: weight of the divergence.
        temperature: divisor of both models' scores in the divergence, see `divergence`. Values above its limit
            would leave nothing of the scores' differences in float32.
    """

    def __init__(self, criterion: Loss, weight: NotNegative = 1.0, temperature: Temperature = 1.0) -> None:
        super().__init__()
        self.criterion, self.weight, self.temperature = criterion, weight, temperature
        self.needs, self.sums_over_batch = criterion.needs, criterion.sums_over_batch
        self.num_divisors = criterion.num_divisors + (1 if weight else 0)

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; its parts are those of the images with masks, and `teacher`, the divergence."""
        if not isinstance(batch, DistilledBatch):
            return self.criterion(prediction, batch)
        value, parts = self.criterion(prediction.of_images(slice(0, batch.labelled)), batch.with_masks)
        taught = self._divergence(prediction, batch)
        return value + self.weight * taught, {**parts, "teacher": taught.detach()}

    def divisors(self, batch: Any) -> Tensor:
        """Return the divisors of the loss on masks, and the number of images."""
        values = self.criterion.divisors(batch.with_masks)
        return torch.cat([values, values.new_full((1,), batch.count)]) if self.weight else values

    def step_loss(
        self, prediction: Prediction, batch: Any, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's part of a step's loss, the loss of the batch alone, and its parts by name."""
        num_divisors = self.criterion.num_divisors
        labelled = prediction.of_images(slice(0, batch.labelled))
        part, value, parts = self.criterion.step_loss(labelled, batch.with_masks, divisors[:num_divisors])
        taught = self._divergence(prediction, batch)
        share = safe_divide(divisors.new_full((), batch.count), divisors[num_divisors:].sum())
        alone = value + self.weight * taught.detach()
        return part + self.weight * share * taught, alone, {**parts, "teacher": taught.detach()}

    def _divergence(self, prediction: Prediction, batch: DistilledBatch) -> Tensor:
        return divergence(prediction, batch.seen, (batch.mask.shape[-2], batch.mask.shape[-1]), self.temperature)


def _parts(
    scores: CachedScores, data_module: ImageDataModule, batches: Iterator[Batch | LazyFeatureBatch], start: int
) -> Iterator[Part]:
    """Yield the batches of a feed, with a function for each sample that returns the teacher's scores."""
    views = data_module.train_views

    def later(epoch: int, sample: int) -> Look:
        return partial(scores.look, views, epoch, sample)

    order = {
        "batch_size": data_module.batch_size,
        "seed": data_module.seed,
        "start": start,
        "rank": data_module.rank,
        "world_size": data_module.world_size,
    }
    return map(Part, batches, sample_batches(later, list, len(views.data), **order))


def _mask(data: SegmentationData, index: int) -> np.ndarray:
    """Return the mask (H, W) of an image in the form that determines a view's geometry."""
    return data.mask(index) if isinstance(data, PairDataset | Unmasked) else data[index]["mask"].numpy()


class Distillation(ImageTraining):
    """Training on images with masks and without, with a teacher's scores for both (arXiv 1503.02531).

    The teacher's scores count with `trainer.teacher_weight`, and the loss on masks with 1. `trainer.unlabelled` is used
    in addition to training images whose masks are not used.

    Args:
        builder: see `Training`.
    """

    data_module: DistillationDataModule

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        refuse_layers(builder.task, "trainer=distil", "Choose trainer=supervised.")
        if isinstance(builder.task, ObjectTask):
            raise UserError(
                "trainer=distil learns the class scores of a teacher, which do not separate objects. Choose "
                "trainer=supervised, or task=semantic."
            )
        check_named(builder.value(TEACHER))
        self._loss_options = builder.arguments(
            DistilledLoss, {"weight": "trainer.teacher_weight", "temperature": "trainer.temperature"}
        )
        self._of_images = builder.arguments(open_unmasked, UNMASKED)

    def open_data(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the images with masks and those without, and check the teacher."""
        super().open_data(engine, pictures=pictures)
        builder = self.builder
        train = self.data_module.train
        self._teacher = teacher = Teacher(builder, engine, train)
        root = builder.cache_dir / TEACHERS
        cap = cap_of(**builder.arguments(cap_of, {"gib": "features.gib"}))
        store = DiskStore(root, origin(root, teacher.parts), "float16", cap)
        scores = CachedScores(teacher, store, len(train.classes))
        others = open_unmasked(builder, self.data_module, **self._of_images)
        given = {part.name: getattr(self.data_module, part.name) for part in fields(ImageDataModule) if part.init}
        self.data_module = DistillationDataModule(**given, scores=scores, others=others)
        without = 0 if others is None else len(others.train)
        if others is not None:
            self.split = {**self.split, "unlabelled": [*others.train.names]}
        values = count_of(len(train), "training image"), without, builder.value(TEACHER), root
        logger.info("%s with masks, %s without; teacher %s, whose scores are cached in %s", *values)

    def cache_features(self) -> dict[str, str]:
        """Cache features as `ImageTraining` does; add the teacher's hash, so that resuming detects another one."""
        return {**super().cache_features(), "teacher": self._teacher.name}

    def wrap_loss(self, loss: Loss) -> Loss:
        """Return the loss on masks and on the teacher's scores."""
        return DistilledLoss(loss, **self._loss_options)
