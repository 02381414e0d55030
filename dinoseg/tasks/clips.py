"""Training task for clips without labels."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoseg.data.classes.labels import Labels
from dinoseg.evaluation.about import EVALUATION
from dinoseg.evaluation.videos import TrackingOptions, check_slots, evaluate_videos
from dinoseg.experiment.benchmark_videos import benchmark_videos, chosen_supervision
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import provenance_of
from dinoseg.experiment.trackers import tracker_factory, tracker_maker
from dinoseg.experiment.trained import Trained
from dinoseg.models.model import SegmentationModel
from dinoseg.report.curves import CLIP_PLOTS
from dinoseg.tasks.task import TrainingTask
from dinoseg.tracking.tracker import Tracker
from dinoseg.training.clip_feed import ClipFeed
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import Count
from dinoseg.utils.wording import listed

logger = logging.getLogger(__name__)


class ClipTask(TrainingTask):
    """Training task for slots on clips; masks, if there are any, are only used to score.

    Args:
        parts: builds the parts of the experiment.
        val_images: None; clips are all validated.
    """

    what = "clips"
    on_clips = True
    feed: ClipFeed
    labels: Labels

    def __init__(self, parts: Builder, *, val_images: Count | None = None) -> None:
        super().__init__(parts)
        self._val_images = val_images

    def open(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the clips of train and val."""
        parts = self.parts
        self.feed = ClipFeed(
            train=parts.clips("train"),
            val=parts.clips("val"),
            view=parts.part("data.view"),
            make_tracker=_clip_trackers(parts),
            seed=parts.seed,
            workers=engine.workers,
            rank=engine.rank,
            world=engine.world,
            pictures=pictures,
            **parts.arguments(ClipFeed, {"batch_size": "data.batch_size"}),
        )
        self.labels = parts.labels
        self.plots = [plot for plot in CLIP_PLOTS if plot[0] in self.feed.score_names]
        # by video: clips of one video on both sides would leak data
        sides = {"train": self.feed.train, "val": self.feed.val}
        self.split = {side: [video.name for video in clips.videos] for side, clips in sides.items()}

    def check_parts(self, model: SegmentationModel, world: int) -> None:
        """Refuse a head or a loss that clips cannot be trained with."""
        parts, options = self.parts, self.parts.options
        if model.head.slots is None:
            raise UserError(
                f"trainer={options['trainer']} trains slots, and head={options['head']} has none. Choose head=slots, "
                "or trainer=supervised for images and masks."
            )
        loss = None if parts.loss_has_classes else parts.loss(None)
        if loss is None or not loss.needs_slots:
            raise UserError(
                f"loss={options['loss']} is not a slot loss. Choose loss=feature_reconstruction, loss=video_similarity "
                "or loss=slot_contrast."
            )
        similarity = parts.value("head.similarity")
        if similarity != loss.needs_similarity:
            fitting = {True: "loss=video_similarity", False: "loss=feature_reconstruction"}[similarity]
            raise UserError(
                f"head.similarity={str(similarity).lower()} does not fit loss={options['loss']}, which needs "
                f"{fitting}. Change one of them."
            )
        if loss.needs_carried and model.head.slots.predictor is None:
            raise UserError(
                f"loss={options['loss']} compares slots across frames, but head.predictor=none samples new ones in "
                "each frame. Set head.predictor=savi or carry, or choose loss=feature_reconstruction."
            )
        if self._val_images is not None:
            raise UserError(
                f"trainer.val_images={self._val_images} is for images with masks, not for clips. Set it to null."
            )
        if (cache := parts.value("data.cache")) is not None:
            raise UserError(f"data.cache={cache} stores images with masks, not clips. Set data.cache=null.")
        for key in ("feature_noise", "class_uniform", "class_mix"):
            if value := parts.value(f"data.{key}"):
                raise UserError(f"data.{key}={value} is for images with masks, not for clips. Set it to 0.")
        self._check_tracking()

    def _check_tracking(self) -> None:
        """Refuse settings that the evaluation would only refuse at the end of the training."""
        if self.parts.value("data.tracking") is None:
            return
        _clip_trackers(self.parts)
        if self.parts.value("slots.lock_on") and chosen_supervision(self.parts, None) == "none":
            raise UserError(
                f"slots.lock_on=true needs the first frame's masks, and data={self.parts.options['data']} is evaluated "
                "without: train with slots=free. Provide them later with mode=eval mode.supervision=first_frame "
                "slots=lock_on."
            )

    def check_sources(self) -> None:
        """Refuse clips, or views of them, that cannot be built."""
        self.parts.part("data.clips")
        self.parts.part("data.view")

    def check_data(self) -> None:
        """Warn of videos on both sides of the split, and of videos too short for a clip."""
        both = sorted(set(self.split["train"]) & set(self.split["val"]))
        if both:
            logger.warning(
                "Videos are in train and in val: %s. Validation would use training videos: set "
                "data.clips.partition.by=fraction, or give each split a separate folder.",
                listed(both),
            )
        for side, clips in (("train", self.feed.train), ("val", self.feed.val)):
            if clips.skipped:
                logger.warning("%s: left out, too short for a clip: %s", side, listed(clips.skipped))

    def evaluate(
        self, model: SegmentationModel, engine: Engine, best: Path, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score as mode=eval does; without masks, only report the loss and write no report."""
        out_dir = best.parent.parent / EVALUATION
        if self.parts.value("data.tracking") is not None:
            palette = [(red, green, blue) for red, green, blue in self.labels.palette]
            labels = (list(self.labels.classes), palette, self.labels.ignore_index)
            trained = Trained(model.eval(), engine, *labels, info={})
            data, slots = benchmark_videos(self.parts, "val", None), model.head.slots
            lock_on = bool(self.parts.value("slots.lock_on"))
            check_slots(data, 0 if slots is None else slots.num_slots, lock_on=lock_on, official=True)
            make_tracker = tracker_maker(self.parts, engine, trained, batch_size=engine.images_at_once())
            options = TrackingOptions(metrics_only=metrics_only, report=report)
            return evaluate_videos(
                data, make_tracker, engine, out_dir, options, provenance_of(self.parts, out_dir, best)
            )
        scores, pictures = self.feed.validate(model, self.parts.loss(None).to(engine.device), engine)
        if engine.is_main:
            write_json(out_dir / "scores.json", scores)
            name = self.parts.options["data"]
            print(f"val/loss:     {scores['loss']:.4f} (no other score: data={name} has no masks)")
            if pictures and not metrics_only:
                write_png(out_dir / "segments.png", next(iter(pictures.values())))
                print(f"image:        {out_dir / 'segments.png'}")
        return scores


def _clip_trackers(parts: Builder) -> Callable[..., Tracker]:
    """Return the factory of slot trackers for clips without masks, which give no labels to lock on to."""
    unlocked = {"lock_on": False, "slots_per_object": 1, "extra_slots": 0}
    return tracker_factory(parts.value("slots"), f"slots={parts.options.get('slots')}", unlocked)
