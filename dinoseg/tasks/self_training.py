"""Self-training on few masks and on images without masks, which the model's moving average labels."""

import logging
from collections.abc import Mapping

from dinoseg.core.contracts import Loss
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.data.unlabelled import StrongView, UnlabelledImages
from dinoseg.experiment.builder import Builder
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel
from dinoseg.tasks.images import ImageTask
from dinoseg.tasks.unmasked import unmasked_images
from dinoseg.training.engine import Engine
from dinoseg.training.mixed_data_module import MixedDataModule, SelfTraining
from dinoseg.training.self_training_batch import SelfTrainingLoss
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)


class SelfTrainingTask(ImageTask):
    """Training task for images with masks and without (FixMatch, arXiv 2001.07685; UniMatch V2, arXiv 2410.10777).

    It follows UniMatch V2 in the moving average as the teacher, one weak view (`data.augment`), strong views of it with
    CutMix, and the confidence threshold. It omits the complementary dropout of the two strong views.

    Args:
        parts: builds the parts of the experiment.
        options: images without masks, and how they are used.
        val_images: see `ImageTask`.
    """

    data_module: MixedDataModule

    def __init__(self, parts: Builder, *, options: SelfTraining, val_images: Count | None = None) -> None:
        super().__init__(parts, val_images=val_images)
        self._options = options

    def open(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the images with masks and those without."""
        super().open(engine, pictures=pictures)
        options = self._options
        sources = [
            image.source for image in unmasked_images(self.parts, options, self.data_module.train, self.data_module.val)
        ]
        if not sources:
            raise UserError(
                "trainer=self_training has no images without masks. Give trainer.unlabelled=<folder, quoted pattern or "
                "video>, or data.labelled=<share or file of names>, which leaves masks out; or train on masks only: "
                "trainer=supervised."
            )
        ignored = self.data_module.train.ignore_index
        seen = self.data_module.augment, StrongView(), options.views
        images = UnlabelledImages(sources, *seen, inside=0 if ignored else 1)
        self.data_module = MixedDataModule(**self.data_module.given, unlabelled=images, options=options)
        logger.info("%s with masks, %s without", count_of(len(self.data_module.train), "training image"), len(sources))

    def check_parts(self, model: SegmentationModel, world_size: int) -> None:
        """Refuse what `ImageTask` refuses, and settings without a teacher, with sharding or with feature noise."""
        super().check_parts(model, world_size)
        parts = self.parts
        if parts.value("trainer.ema") is None:
            raise UserError(
                "trainer.ema=null: in self-training the moving average is the teacher. Set its decay, such as 0.996."
            )
        if (sharding := parts.value("engine.sharding", "none")) != "none":
            raise UserError(
                f"engine.sharding={sharding} shards the weights, but a teacher needs full ones. Leave it out with "
                "trainer=self_training."
            )
        if noise := parts.value("data.feature_noise"):
            raise UserError(
                f"data.feature_noise={noise} is for training on masks only: here the noise comes from strong views. "
                "Set it to 0 with trainer=self_training."
            )

    def wrap_loss(self, loss: Loss) -> Loss:
        """Return the loss on masks and on pseudo-labels; class weights apply only to masks."""
        return SelfTrainingLoss(loss, self.parts.unweighted_loss(), self._options.weight)

    def cache_features(
        self, model: SegmentationModel, engine: Engine, epochs: float, *, before: Mapping[str, str | None]
    ) -> dict[str, str]:
        """Cache nothing: strong views are new in each epoch.

        Raises:
            UserError: `engine.cache` requires a cache.
        """
        if engine.cache in ("disk", "memory"):
            raise UserError(
                f"engine.cache={engine.cache}: with trainer=self_training the student's views change in each epoch, so "
                "their features cannot be cached. Leave it out."
            )
        return {}

    def check_data(self) -> TrainedSizes | None:
        """Run the short dataset checks, and refuse masks of at most one class: a teacher would predict only that."""
        sizes = super().check_data()
        train = self.data_module.train
        counts = dict(zip(train.classes, class_counts(train, self.parts.cache_dir).tolist(), strict=True))
        there = [name for name, count in counts.items() if count]
        if len(there) < 2:
            only = f"{there[0]} alone" if there else "only ignored pixels"
            raise UserError(
                f"The {count_of(len(train), 'mask')} to train on hold {only}: the teacher would predict it everywhere. "
                "Add a mask with other classes (data.labelled, or mode=select for which)."
            )
        absent = [name for name in counts if name not in there]
        if absent:
            logger.warning(
                "No training mask has a pixel of %s: such classes cannot be learned from images without masks either.",
                join_names(absent),
            )
        return sizes
