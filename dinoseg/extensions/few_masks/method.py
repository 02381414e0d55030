"""Training with few masks: `trainer=fixmatch` and `trainer=unimatch_v2`."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np

from dinoseg.core.contracts import Head, Loss
from dinoseg.core.sources import source_origin
from dinoseg.core.task import refuse_layers
from dinoseg.data.loader import sample_batches
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import Provenance
from dinoseg.extensions.distillation.unmasked import UNMASKED, explain_none, open_unmasked
from dinoseg.extensions.few_masks.loss import FewMasksLoss
from dinoseg.extensions.few_masks.teacher import EmaTeacher, FewMasksBatch, TeacherAverage, predict_labels
from dinoseg.extensions.few_masks.views import UnlabelledViews, join_views
from dinoseg.methods.images import ImageTraining
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.report.log import RunLog, read_rows
from dinoseg.report.overlay import blend, legend_of, side_by_side
from dinoseg.training.data_module import Validation, spread
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.optim import tensors_of
from dinoseg.training.trainer import TrainingSetup
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FewMasksDataModule(ImageDataModule):
    """Batches of images with masks, and of views of images without.

    Args:
        unlabelled: the views.
        unlabelled_batch_size: images without masks in a batch, over all ranks.
        teacher: labels them; set before the first batch.
    """

    unlabelled: UnlabelledViews
    unlabelled_batch_size: int
    teacher: EmaTeacher = field(init=False)

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's share of every batch from number `start` on, without end."""
        others = sample_batches(
            self.unlabelled.read_views,
            join_views,
            len(self.unlabelled.data),
            batch_size=self.unlabelled_batch_size,
            seed=self.seed,
            start=start,
            workers=self.workers,
            rank=self.rank,
            world_size=self.world_size,
        )
        return map(partial(FewMasksBatch, self.teacher), super().train_batches(start), others)

    def validate(self, model: SegmentationModel, loss: Loss, engine: Engine) -> Validation:
        """Return the validation of `ImageDataModule`, with pictures of pseudo-labels too."""
        scores, pictures = super().validate(model, loss, engine)
        chosen = spread(len(self.unlabelled.data), self.pictures, self.world_size) if engine.is_main else ()
        return Validation(scores, pictures | dict(self._draw(model, engine, index) for index in chosen))

    def _draw(self, model: SegmentationModel, engine: Engine, index: int) -> tuple[str, np.ndarray]:
        """Return the name and the picture of an image: weak view, pseudo-labels, and the teacher's probabilities."""
        views = self.unlabelled.read_views(0, index).to(engine.device)
        ids, confidence = predict_labels(model, views.weak, engine.autocast)
        sure = (confidence >= self.teacher.threshold) & ~views.padding
        labels = ids.where(sure, self.val.ignore_index)[0].cpu().numpy()
        frame = views.weak[0, :3].permute(1, 2, 0).cpu().numpy()
        grey = (255 * confidence[0, :, :, None]).expand(-1, -1, 3).byte().cpu().numpy()
        look: dict[str, Any] = {"palette": self.val.palette, "ignore_index": self.val.ignore_index}
        panels = [("weak view", frame), ("pseudo-labels", blend(frame, labels, **look)), ("confidence", grey)]
        return f"pseudo_labels/{views.names[0]}", side_by_side(panels, legend_of([labels], self.val.classes, **look))


class FewMasks(ImageTraining):
    """Training on few masks, and on pseudo-labels of images without masks.

    The teacher is the moving average of the student's weights (`trainer.ema`), which validations score.

    Args:
        builder: see `Training`.
    """

    data_module: FewMasksDataModule

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self._name = f"trainer={builder.options['trainer']}"
        refuse_layers(builder.task, self._name, "Choose trainer=supervised.")
        if builder.value("trainer.ema") is None:
            raise UserError(f"{self._name}: trainer.ema=null leaves no teacher. Set a decay, such as 0.996.")
        self._of_teacher = builder.arguments(
            EmaTeacher, {"threshold": "trainer.threshold", "dropout": "trainer.dropout"}
        )
        self._of_views = builder.arguments(UnlabelledViews, {"strong_views": "trainer.views"})
        self._of_images = builder.arguments(open_unmasked, UNMASKED)

    def check_parts(self, model: SegmentationModel, world_size: int) -> None:
        """Refuse a head or an engine that the teacher or the dropout does not fit."""
        super().check_parts(model, world_size)
        head, cache = f"head={self.builder.options['head']}", self.engine.cache
        refused = {
            f"{head} has masks instead of scores of each pixel. Choose head=dpt, task=semantic.": model.head.mixture,
            f"trainer.dropout=true, and {head} does not read feature maps alone. Choose head=dpt.": (
                self._of_teacher["dropout"] and type(model.head).run is not Head.run
            ),
            f"engine.cache={cache}: features of strong views cannot be cached, since these are new in each step. Leave "
            "it out.": cache in ("disk", "memory"),
            "whole weights are needed on each device. Leave engine.sharding out.": self.engine.sharded,
        }
        for reason in (reason for reason, is_so in refused.items() if is_so):
            raise UserError(f"{self._name}: {reason}")

    def open_data(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the images with masks and those without."""
        super().open_data(engine, pictures=pictures)
        module = self.data_module
        if not isinstance(module.augment, Augment):
            raise UserError(
                f"{self._name}: data.augment does not return padding. Inherit from dinoseg.data.transforms.Augment."
            )
        whole = self.builder.reader()("train")
        pairs = whole.pairs if isinstance(whole, PairDataset) else ()
        feed = open_unmasked(
            self.builder,
            # a mask decides on no crop of an image without one
            replace(module, augment=replace(module.augment, cat_max_ratio=None)),
            exclude={source_origin(pair.image) for pair in pairs if pair.name in module.train.names},
            **self._of_images,
        )
        if feed is None:
            raise UserError(f"{self._name}: {explain_none(self._of_images.get('source'))}.")
        rows = {source_origin(pair.image): row for row, pair in enumerate(pairs)}
        truths = {
            index: partial(whole.mask, rows[source_origin(source)])  # type: ignore[attr-defined]
            for index, source in enumerate(feed.train.sources)  # type: ignore[attr-defined]
            if source_origin(source) in rows
        }
        views = UnlabelledViews(**vars(feed.train_views), truths=truths, **self._of_views)
        given = {part.name: getattr(module, part.name) for part in fields(ImageDataModule) if part.init}
        self.data_module = FewMasksDataModule(**given, unlabelled=views, unlabelled_batch_size=feed.batch_size)
        self.split = {**self.split, "unlabelled": [*feed.train.names]}
        logger.info(
            "training images with masks: %d, %d per batch; without: %d, %d per batch",
            *(len(module.train), module.batch_size, len(feed.train), feed.batch_size),
        )

    def cache_features(self) -> dict[str, str]:
        """Cache nothing: strong views are new in each step."""
        return {}

    def wrap_loss(self, loss: Loss) -> Loss:
        """Return the loss on masks and on pseudo-labels."""
        return FewMasksLoss(loss, len(self.labels.classes), self.data_module.train.ignore_index, **self._of_views)

    def loop_setup(self, log: RunLog) -> TrainingSetup:
        """Return what `fit` takes, with the teacher as the average of the weights."""
        return replace(super().loop_setup(log), make_ema=self._make_teacher)

    def evaluate(self, provenance: Provenance, *, metrics_only: bool, report: bool) -> dict[str, Any]:
        """Score as `ImageTraining` does; warn if no pseudo-label was ever used."""
        rows = read_rows(self.out_dir / "metrics.jsonl") if self.engine.is_main else ()
        shares = [row["train/confident"] for row in rows if "train/confident" in row]
        if shares and not any(shares):
            logger.warning(
                "No pixel of an image without a mask reached trainer.threshold=%g, so the training has learned from "
                "the masks alone, at half the weight. Lower trainer.threshold, or train longer.",
                self._of_teacher["threshold"],
            )
        return super().evaluate(provenance, metrics_only=metrics_only, report=report)

    def _make_teacher(self, model: SegmentationModel, decay: float | None) -> TeacherAverage:
        """Let the data module label images by an average of a model's weights, and return the average."""
        average = TeacherAverage(tensors_of(model, trained_names(model)), decay or 0.0)
        self.data_module.teacher = EmaTeacher(
            model, average, self.engine, ignore_index=self.data_module.train.ignore_index, **self._of_teacher
        )
        return average
