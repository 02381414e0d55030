"""Distillation: a student learns the class scores of a trained segmenter, on images with masks and without."""

import logging
from dataclasses import replace
from typing import Any

from dinoseg.core.contracts import Loss
from dinoseg.data.unlabelled import Unmasked
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.teacher import TEACHERS, Teacher, check_named
from dinoseg.models.model import SegmentationModel
from dinoseg.tasks.images import ImageTask
from dinoseg.tasks.unmasked import unmasked_images
from dinoseg.training.distilled import DistilFeed, DistilledLoss, KeptScores
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.key import origin
from dinoseg.training.feature_cache.store import DiskStore, cap_of
from dinoseg.training.image_feed import ImageFeed
from dinoseg.training.mixed_feed import Unlabelled
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Temperature
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)


class DistillationTask(ImageTask):
    """Training task for images with masks and without, with a teacher's scores for both (arXiv 1503.02531).

    Args:
        parts: builds the parts of the experiment.
        teacher: run folder or checkpoint of the teacher.
        weight: weight of the divergence from the teacher; the loss on masks has weight 1.
        temperature: divisor of both models' scores.
        unlabelled: images without masks.
        val_images: see `ImageTask`.
    """

    feed: DistilFeed

    def __init__(
        self,
        parts: Builder,
        *,
        teacher: str | None,
        weight: NotNegative,
        temperature: Temperature,
        unlabelled: Unlabelled,
        val_images: Count | None = None,
    ) -> None:
        super().__init__(parts, val_images=val_images)
        check_named(teacher)
        self._given, self._unlabelled = teacher, unlabelled
        self._loss_options = {"weight": weight, "temperature": temperature}

    def open(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the images with masks and those without, and check the teacher."""
        super().open(engine, pictures=pictures)
        parts, train = self.parts, self.feed.train
        self._teacher = teacher = Teacher(parts, engine, train)
        root, cap = parts.cache_dir / TEACHERS, cap_of(**parts.arguments(cap_of, {"gib": "features.gib"}))
        store = DiskStore(root, origin(root, teacher.parts), "float16", cap)
        scores = KeptScores(teacher, store, len(train.classes))
        others = self._others()
        self.feed = DistilFeed(**self.feed.given, scores=scores, others=others)
        without = 0 if others is None else len(others.train)
        values = count_of(len(train), "training image"), without, self._given, root
        logger.info("%s with masks, %s without; teacher %s, whose scores are cached in %s", *values)

    def check_parts(self, model: SegmentationModel, world: int) -> None:
        """Refuse what `ImageTask` refuses, and `data.class_mix`: teachers score unmixed images."""
        super().check_parts(model, world)
        if mix := self.parts.value("data.class_mix"):
            raise UserError(
                f"data.class_mix={mix}: a teacher's scores are computed on original images, without pasted classes. "
                "Set it to 0 with trainer=distil."
            )

    def cache_features(
        self, model: SegmentationModel, loss: Loss, engine: Engine, *given: Any, **more: Any
    ) -> dict[str, str]:
        """Cache features as `ImageTask` does; add the teacher's hash, by which a resumed run detects another one."""
        return {**super().cache_features(model, loss, engine, *given, **more), "teacher": self._teacher.name}

    def wrap_loss(self, loss: Loss) -> Loss:
        """Return the loss on masks and on the teacher's scores."""
        return DistilledLoss(loss, **self._loss_options)

    def _others(self) -> ImageFeed | None:
        """Return the feed of images without masks; None if there are none."""
        feed, options = self.feed, self._unlabelled
        found = unmasked_images(self.parts, options, feed.train, feed.val)
        if not found:
            if options.batch_size is not None:
                raise UserError(
                    f"trainer.unlabelled_batch_size={options.batch_size}: there are no images without masks. Give "
                    "trainer.unlabelled=<folder, quoted pattern or video>, or data.labelled=<share or file of names>, "
                    "which leaves masks out; or leave it out to train on images with masks only."
                )
            return None
        images = Unmasked([image.name for image in found], [image.source for image in found], feed.train)
        size = options.size(feed.batch_size, len(images), feed.world)
        return replace(feed, train=images, batch_size=size, uniform=None)
