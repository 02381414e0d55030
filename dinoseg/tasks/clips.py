"""Training task for clips without labels."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.nodes import instantiate
from dinoseg.data.classes.labels import Labels
from dinoseg.evaluation.about import EVALUATION
from dinoseg.evaluation.supervision import chosen_supervision
from dinoseg.evaluation.videos import EvalOptions, follow_slots
from dinoseg.experiment import build, criteria
from dinoseg.experiment.trained import Trained, labels_of
from dinoseg.models.model import Segmenter
from dinoseg.report.curves import CLIP_PLOTS
from dinoseg.tasks.regime import Regime, share_of
from dinoseg.training.clip_feed import ClipFeed
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import listed

logger = logging.getLogger(__name__)


class ClipRegime(Regime):
    """Training task for slots on clips; masks, if there are any, are only used to score."""

    what = "clips"
    feed: ClipFeed
    labels: Labels

    def __init__(self, cfg: DictConfig, engine: Engine, *, pictures: int = 0) -> None:
        share, slots = share_of(cfg, engine, pictures), instantiate(cfg.slots)
        self.cfg = cfg
        self.feed = ClipFeed(
            train=build.clips(cfg, "train"),
            val=build.clips(cfg, "val"),
            view=instantiate(cfg.data.view),
            following=replace(slots, lock_on=False, slots_per_object=1, extra_slots=0),  # no labels to lock on to
            **share,
        )
        self.labels = labels_of(cfg)
        self.plots = [plot for plot in CLIP_PLOTS if plot[0] in self.feed.score_names]
        # by video: clips of one video on both sides would leak data
        sides = {"train": self.feed.train, "val": self.feed.val}
        self.split = {side: [video.name for video in clips.videos] for side, clips in sides.items()}

    @classmethod
    def check_parts(cls, cfg: DictConfig, model: Segmenter, world: int) -> None:
        """Refuse a head or a loss that clips cannot be trained with."""
        if model.head.slots is None:
            raise UserError(
                f"trainer.feed=clips trains slots, and head={cfg.choices.head} has none. Choose head=slots, or "
                "trainer=supervised for images and masks."
            )
        loss = criteria.criterion(cfg) if cfg.loss.class_weights is None else None
        if loss is None or not loss.needs_slots:
            raise UserError(
                f"loss={cfg.choices.loss} is no loss of slots. Choose loss=feature_reconstruction, "
                "loss=video_similarity or loss=slot_contrast."
            )
        if cfg.head.similarity != loss.needs_similarity:
            fitting = {True: "loss=video_similarity", False: "loss=feature_reconstruction"}[cfg.head.similarity]
            raise UserError(
                f"head.similarity={str(cfg.head.similarity).lower()} does not go with loss={cfg.choices.loss}: with it "
                f"goes {fitting}. Change one of them."
            )
        if loss.needs_carried and model.head.slots.predictor is None:
            raise UserError(
                f"loss={cfg.choices.loss} compares slots that go from frame to frame, and head.predictor=none draws "
                "them anew in each. Set head.predictor=savi or carry, or choose loss=feature_reconstruction."
            )
        if cfg.trainer.get("val_images") is not None:
            raise UserError(
                f"trainer.val_images={cfg.trainer.val_images} is for images with masks, not for clips. Set it to null."
            )
        if cfg.data.cache is not None:
            raise UserError(f"data.cache={cfg.data.cache} holds images with masks, not clips. Set data.cache=null.")
        for key in ("feature_noise", "class_uniform", "class_mix"):
            if value := cfg.data.get(key):
                raise UserError(f"data.{key}={value} is for images with masks, not for clips. Set it to 0.")
        cls._check_following(cfg)

    @staticmethod
    def _check_following(cfg: DictConfig) -> None:
        """Refuse settings that the evaluation would only refuse at the end of the training."""
        if cfg.data.tracking is None:
            return
        supervision = chosen_supervision(cfg, None)
        if instantiate(cfg.slots).lock_on and supervision == "none":
            raise UserError(
                f"slots.lock_on=true needs the first frame's masks, and data={cfg.choices.data} is evaluated "
                "without: train with slots=free. mode=eval mode.supervision=first_frame slots=lock_on gives them later."
            )

    @classmethod
    def data_nodes(cls, cfg: DictConfig) -> Iterator[DictConfig]:
        """Yield the nodes of clips and of the views of them."""
        yield from (cfg.data.clips, cfg.data.view)

    def check_data(self) -> None:
        """Warn of videos on both sides of the split, and of videos too short for a clip."""
        both = sorted(set(self.split["train"]) & set(self.split["val"]))
        if both:
            logger.warning(
                "Videos stand in train and in val: %s. What is validated on was trained on: set "
                "data.clips.partition.by=fraction, or give each split a folder of its own.",
                listed(both),
            )
        for side, clips in (("train", self.feed.train), ("val", self.feed.val)):
            if clips.skipped:
                logger.warning("%s: too short for a clip and left out: %s", side, listed(clips.skipped))

    def evaluate(
        self, cfg: DictConfig, model: Segmenter, engine: Engine, best: Path, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score as mode=eval does; without masks, only report the loss and write no report."""
        out_dir = best.parent.parent / EVALUATION
        if cfg.data.tracking is not None:
            palette = [(red, green, blue) for red, green, blue in self.labels.palette]
            labels = (list(self.labels.classes), palette, self.labels.ignore_index)
            trained = Trained(model.eval(), engine, *labels, info={})
            options = EvalOptions(metrics_only=metrics_only, report=report, best=best)
            return follow_slots(cfg, trained, out_dir, options)
        scores, pictures = self.feed.validate(model, criteria.loss(cfg, None).to(engine.device), engine)
        if engine.is_main:
            write_json(out_dir / "scores.json", scores)
            print(f"val/loss:     {scores['loss']:.4f}, and no other score: data={cfg.choices.data} has no masks")
            if pictures and not metrics_only:
                write_png(out_dir / "segments.png", next(iter(pictures.values())))
                print(f"picture:      {out_dir / 'segments.png'}")
        return scores
