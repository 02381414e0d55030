"""Distillation: a student learns the class scores of a trained segmenter, on images with masks and without."""

import logging
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.checks import checked
from dinoseg.core.contracts import Loss
from dinoseg.data.unlabelled import Unmasked
from dinoseg.experiment.teacher import Teacher, named_teacher, scores_kept
from dinoseg.models.model import Segmenter
from dinoseg.tasks.images import ImageRegime
from dinoseg.tasks.unmasked import unmasked_images
from dinoseg.training.distilled import DistilFeed, DistilledLoss, KeptScores
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.key import origin
from dinoseg.training.feature_cache.store import DiskStore, cap_of
from dinoseg.training.image_feed import ImageFeed
from dinoseg.training.mixed_feed import WHICH, Unlabelled
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
_OF_LOSS = {"teacher_weight": "weight", "temperature": "temperature"}  # keys of `trainer` to parameters of the loss
_CAP = "dinoseg.training.feature_cache.store.cap_of"
KEYS = ("teacher", *_OF_LOSS)


class DistilRegime(ImageRegime):
    """Training task for images with masks and without, with a teacher's scores for both (arXiv 1503.02531)."""

    feed: DistilFeed

    def __init__(self, cfg: DictConfig, engine: Engine, *, pictures: int = 0) -> None:
        if not any(key in cfg.trainer for key in _OF_LOSS):
            raise UserError(
                f"trainer.feed=distil: trainer={cfg.choices.trainer} does not say how a teacher is learnt from. Choose "
                "trainer=distil."
            )
        named_teacher(cfg)
        _loss_options(cfg)
        super().__init__(cfg, engine, pictures=pictures)
        train = self.feed.train
        self._teacher = teacher = Teacher(cfg, engine, train)
        root, cap = scores_kept(cfg), cap_of(**checked(_CAP, cfg.features, {"gib": "gib"}, "features"))
        store = DiskStore(root, origin(root, teacher.parts), "float16", cap)
        scores = KeptScores(teacher, store, len(train.classes))
        others = self._others(cfg)
        self.feed = DistilFeed(**self.feed.given, scores=scores, others=others)
        without = 0 if others is None else len(others.train)
        told = count_of(len(train), "training image"), without, cfg.trainer.teacher, root
        logger.info("%s with masks, %s without; taught by %s, whose scores are kept in %s", *told)

    @classmethod
    def check_parts(cls, cfg: DictConfig, model: Segmenter, world: int) -> None:
        """Refuse what `ImageRegime` refuses, a missing teacher, and `data.class_mix`: teachers score unmixed images."""
        super().check_parts(cfg, model, world)
        named_teacher(cfg)
        _loss_options(cfg)
        if cfg.data.get("class_mix"):
            raise UserError(
                f"data.class_mix={cfg.data.class_mix}: a teacher's scores are of images as they are, without classes "
                "of another. Set it to 0 with trainer=distil."
            )

    def keep_features(self, model: Segmenter, loss: Loss, engine: Engine, *given: Any, **more: Any) -> dict[str, str]:
        """Cache features as `ImageRegime` does; add the teacher's hash, by which a resumed run detects another one."""
        return {**super().keep_features(model, loss, engine, *given, **more), "teacher": self._teacher.name}

    def objective(self, loss: Loss) -> Loss:
        """Return the loss on masks and on the teacher's scores."""
        return DistilledLoss(loss, **_loss_options(self.cfg))

    def _others(self, cfg: DictConfig) -> ImageFeed | None:
        """Return the feed of images without masks; None if there are none."""
        feed = self.feed
        options = Unlabelled(**checked("dinoseg.training.mixed_feed.Unlabelled", cfg.trainer, WHICH, "trainer"))
        found = unmasked_images(cfg, options, feed.train, feed.val)
        if not found:
            if options.batch_size is not None:
                raise UserError(
                    f"trainer.unlabelled_batch_size={options.batch_size}: there are no images without masks. Give "
                    "trainer.unlabelled=<folder, quoted pattern or video>, or data.labelled=<share or file of names>, "
                    "which leaves masks out; or leave it out, to learn from the images with masks alone."
                )
            return None
        images = Unmasked([image.name for image in found], [image.source for image in found], feed.train)
        size = options.size(feed.batch_size, len(images), feed.world)
        return replace(feed, train=images, batch_size=size, uniform=None)


def _loss_options(cfg: DictConfig) -> dict[str, float]:
    """Return the options of the distillation loss."""
    return checked("dinoseg.training.distilled.DistilledLoss", cfg.trainer, _OF_LOSS, "trainer")
