"""Training on clips without labels."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.core.contracts import Loss, check_needs
from dinoseg.core.sizes import evenly_spaced
from dinoseg.data.classes.labels import Labels
from dinoseg.data.loader import advise_more_workers, check_batch_size
from dinoseg.evaluation.run_facts import EVALUATION
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import Provenance
from dinoseg.extensions.clips.cut import Clip, Clips
from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.clips.view import ClipBatch, ClipView, clip_batches
from dinoseg.extensions.protocols.clustering import contingency
from dinoseg.extensions.protocols.video_clustering import VideoClustering
from dinoseg.extensions.slots.contract import OUTPUTS, Slots
from dinoseg.extensions.slots.evaluation import check_slots
from dinoseg.extensions.slots.tracker.tracker import SlotFactory
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.extensions.tracking.trackers import tracker_factory, tracker_maker
from dinoseg.extensions.video_scores.benchmark_videos import benchmark_videos, chosen_supervision
from dinoseg.extensions.video_scores.videos import TrackingOptions, evaluate_videos
from dinoseg.methods.training import Training
from dinoseg.models.model import SegmentationModel
from dinoseg.report.overlay import blend, downscale, side_by_side, stack_vertically
from dinoseg.report.palette import default_palette
from dinoseg.training.data_module import SHOWN_SIDE, Validation, spread
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import Count
from dinoseg.utils.wording import join_names

logger = logging.getLogger(__name__)
SCORES = ("ari", "fg_ari", "mbo")  # of a validation with masks
_SHOWN = 4  # frames


@dataclass
class ClipDataModule:
    """Batches of clips for one rank.

    Args:
        train: training clips; their masks are never read.
        val: validation clips, used at full length.
        view: maps the frames of a training clip to what the model sees.
        batch_size: clips in a batch, over all ranks.
        seed: determines order and views, together with epoch and clip.
        workers: data-loading processes.
        rank: this rank.
        world_size: number of ranks.
        pictures: number of validation clips that each validation visualises, the same ones every time.
        make_tracker: creates a tracker of a model's slots for a validation clip.
        protocol: rules of the scores.
    """

    train: Clips
    val: Clips
    view: ClipView
    batch_size: Count
    seed: int
    workers: int
    rank: int = 0
    world_size: int = 1
    pictures: int = 0
    make_tracker: Callable[..., Tracker] = SlotFactory()
    protocol: VideoClustering = field(default_factory=VideoClustering)
    score_names: Sequence[str] = field(init=False)
    lowest: Sequence[str] = ("loss",)
    _has_warned: bool = field(default=False, init=False)  # that no validation clip shows an object

    def __post_init__(self) -> None:
        """Refuse a batch size that does not fit, and clips that cannot be stacked, long before the first batch."""
        check_batch_size(self.batch_size, len(self.train), self.world_size, "clip")
        lengths = sorted({span.length for span in self.train.spans})
        if len(lengths) > 1:
            raise UserError(
                f"data.clips.cut.length={self.train.cut.length} gives training clips of {lengths[0]} to {lengths[-1]} "
                f"frames, which cannot form a batch. Set data.clips.cut.length={lengths[0]} or less."
            )
        self.score_names = ("loss", *(SCORES if any(video.masks for video in self.val.videos) else ()))

    @property
    def remedy(self) -> str:
        """Return advice on loading batches faster, in a sentence."""
        return advise_more_workers(self.workers)

    def train_batches(self, start: int) -> Iterator[ClipBatch]:
        """Yield this rank's share of every batch from number `start` on, without end."""
        return clip_batches(
            self.train,
            self.view,
            batch_size=self.batch_size,
            seed=self.seed,
            start=start,
            workers=self.workers,
            rank=self.rank,
            world_size=self.world_size,
        )

    @property
    def epoch(self) -> float:
        """Return the number of batches in which each clip is seen once."""
        return len(self.train) / self.batch_size

    def step_scores(self, engine: Engine) -> None:
        """Return None: clips have no classes to count."""

    @torch.no_grad()
    def validate(self, model: SegmentationModel, loss: Loss, engine: Engine) -> Validation:
        """Return the loss and, if there are masks, `ari`, `fg_ari` and `mbo`, as means over clips; and visualisations.

        The loss is that of each clip's first frames, in the number and spacing of training, with a centred view.
        Clips with fewer frames are excluded from it. The scores are those of the segments in the whole clip at the
        masks' own size, as in protocol=video_clustering.
        """
        training = model.training
        model.eval()
        sums = np.zeros(2 * len(self.score_names))  # of each score, and of the clips that have it
        pictures: dict[str, np.ndarray] = {}
        chosen = spread(len(self.val), self.pictures, self.world_size)
        # every world_size-th clip: a sampler that fills up ranks would count clips twice
        for index in range(self.rank, len(self.val), self.world_size):
            clip = self.val[index]
            values = [self._loss(model, index, clip, loss, engine)]
            if index in chosen or self._has_masks:
                segments = self.segments_of(model, clip, engine)
                values += _scores(clip, segments, self.protocol) if self._has_masks else ()
                if index in chosen:
                    pictures[f"{clip['name']}_{clip['start']:05d}"] = _picture(clip, segments)
            sums += [*(value or 0.0 for value in values), *(value is not None for value in values)]
        model.train(training)
        totals, counts = engine.sum(torch.tensor(sums, dtype=torch.float32).to(engine.device)).view(2, -1).tolist()
        means = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        if self._has_masks and not counts[-1] and engine.is_main and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "No validation clip has an object: fg_ari is %s, and mbo is undefined. Select checkpoints by "
                "trainer.score=loss, or give masks with objects.",
                "always 1 by definition" if self.protocol.labelled_background else "undefined",
            )
        return Validation(dict(zip(self.score_names, means, strict=True)), pictures)

    @property
    def _has_masks(self) -> bool:
        return len(self.score_names) > 1

    def _loss(self, model: SegmentationModel, index: int, clip: Clip, loss: Loss, engine: Engine) -> float | None:
        span, length = self.val.spans[index], self.train.spans[0].length
        # frames as far apart as in training, though a validation clip may have been cut at another rate
        apart = max(1, round(self.train.cut.stride_of(self.val.videos[span.video]) / span.stride))
        frames = clip["frames"][::apart][:length]
        if len(frames) < length:
            return None
        seen = self.view(_channels_last(frames))
        # one clip at a time: slot_contrast would else depend on the clips that share a batch
        batch = ClipBatch.stack([(torch.from_numpy(seen).permute(0, 3, 1, 2), clip["name"])]).to(engine.device)
        with engine.autocast():
            prediction = model(batch.image)
        return loss(prediction, batch)[0].item()

    def segments_of(self, model: SegmentationModel, clip: Clip, engine: Engine) -> list[np.ndarray]:
        """Return the segments (H, W) uint8 of each frame of a clip, counted from 1."""
        options = {"device": engine.device, "autocast": engine.autocast, "batch_size": engine.images_at_once()}
        tracker = self.make_tracker(model, **options)
        frames = list(_channels_last(clip["frames"]))
        labels = [None] * len(frames)
        # with slots.passes=2, the tracker needs the whole clip before its first frame
        tracker.look_ahead(lambda: [(frames, labels)])
        return tracker.track(frames, labels)


def _scores(clip: Clip, segments: Sequence[np.ndarray], protocol: VideoClustering) -> tuple[float | None, ...]:
    """Return ARI, FG-ARI and mBO over all frames of a clip, None where undefined or if no pixel has a mask."""
    # one table for the whole clip, as Video ARI: an object whose slot changes between frames scores lower
    table = contingency(np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    for mask, segment in zip(clip["masks"].numpy(), segments, strict=True):
        table += contingency(mask[mask != VOID], segment[mask != VOID])
    return protocol.table_scores(table) if table.counts.size else (None,) * len(SCORES)


def _picture(clip: Clip, segments: Sequence[np.ndarray]) -> np.ndarray:
    known = bool(clip["annotated"].any())
    masks = list(clip["masks"].numpy()) if known else None
    return clip_strip(list(_channels_last(clip["frames"])), segments, masks, longest=SHOWN_SIDE)


def _channels_last(frames: Tensor) -> np.ndarray:
    """Return frames (T, 3, H, W) as (T, H, W, 3)."""
    return frames.permute(0, 2, 3, 1).contiguous().numpy()


def clip_strip(
    frames: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    references: Sequence[np.ndarray] | None = None,
    *,
    longest: int | None = None,
) -> np.ndarray:
    """Return up to four frames (H, W, 3) of a clip, evenly spaced, above their segments and references (H, W).

    Each id has its own colour; id 0 leaves the frame unchanged, and 255 (unknown) becomes beige. Frames with more than
    `longest` pixels on their longer side are downscaled to `longest`.
    """
    chosen = evenly_spaced(len(frames), _SHOWN)
    palette = default_palette(255)
    small = {number: downscale(frames[number], longest) for number in chosen}
    rows = [[(f"frame {number}", frame) for number, frame in small.items()]]
    for caption, masks in (("segments", segments), ("reference", references)):
        if masks is not None:
            ids = [downscale(masks[number], longest) for number in chosen]
            tinted = [blend(*pair, palette, opacity=0.6) for pair in zip(small.values(), ids, strict=True)]
            rows.append([(caption, picture) for picture in tinted])
    return stack_vertically([side_by_side(row) for row in rows])


class ClipTraining(Training):
    """Training of slots on clips; masks, if there are any, are only used to score."""

    what = "clips"
    on_clips = True
    data_module: ClipDataModule
    labels: Labels

    def find_score_names(self) -> Sequence[str]:
        """Return the scores of clips with masks; of others there is only the loss."""
        return ("loss", *SCORES)

    def open_data(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the clips of train and val."""
        builder = self.builder
        self.data_module = ClipDataModule(
            train=builder.clips("train"),
            val=builder.clips("val"),
            view=builder.part("data.view"),
            make_tracker=_clip_trackers(builder),
            protocol=_clip_protocol(builder),
            seed=builder.seed,
            workers=engine.workers,
            rank=engine.rank,
            world_size=engine.world_size,
            pictures=pictures,
            **builder.arguments(ClipDataModule, {"batch_size": "data.batch_size"}),
        )
        self.labels = builder.labels
        # by video: clips of one video on both sides would leak data
        sides = {"train": self.data_module.train, "val": self.data_module.val}
        self.split = {side: [video.name for video in clips.videos] for side, clips in sides.items()}

    def check_parts(self, model: SegmentationModel, world_size: int) -> None:
        """Refuse a head or a loss that clips cannot be trained with."""
        builder, options, head = self.builder, self.builder.options, model.head
        if not isinstance(head, Slots):
            raise UserError(
                f"trainer={options['trainer']} trains slots, and head={options['head']} has none. Choose head=slots, "
                "or trainer=supervised for images and masks."
            )
        loss = None if builder.loss_has_classes else builder.loss_outline
        if loss is None or "slots" not in loss.needs:
            raise UserError(
                f"loss={options['loss']} is not a slot loss. Choose loss=feature_reconstruction, "
                "loss=video_similarity, loss=temporal_similarity or loss=slot_contrast."
            )
        check_needs(loss, OUTPUTS, f"loss={options['loss']}", f"head={options['head']}")
        self._check_outputs(head, loss)
        if "carried" in loss.needs and "carried" not in head.provides:
            raise UserError(
                f"loss={options['loss']} compares slots across frames, but head.predictor=none samples new ones in "
                "each frame. Set head.predictor=savi, transformer or carry, or choose loss=feature_reconstruction."
            )
        if (val_images := builder.value("trainer.val_images")) is not None:
            raise UserError(f"trainer.val_images={val_images} is for images with masks, not for clips. Set it to null.")
        if metrics := builder.value("metric"):
            raise UserError(f"metric=[{','.join(metrics)}] scores images with masks, not clips. Leave it out.")
        if (cache := builder.value("data.cache")) is not None:
            raise UserError(f"data.cache={cache} stores images with masks, not clips. Set data.cache=null.")
        self._check_tracking()

    def _check_outputs(self, head: Slots, loss: Loss) -> None:
        """Refuse a head whose outputs the loss does not train, or that lacks outputs of the loss."""
        names = {"similarity": "similarity", "reconstruct": "reconstruction"}
        wanted, given = ({key: name in held for key, name in names.items()} for held in (loss.needs, head.provides))
        wrong = [key for key in names if wanted[key] != given[key]]
        if not wrong:
            return
        keys = [f"head.{key}={str(wanted[key]).lower()}" for key in wrong]
        if "head.reconstruct=false" in keys:
            keys.append("head.output_norm=false")
        losses = {
            (False, True): "feature_reconstruction or slot_contrast",
            (True, True): "video_similarity",
            (True, False): "temporal_similarity",
        }
        fitting = losses[given["similarity"], given["reconstruct"]]
        raise UserError(
            f"head.{wrong[0]}={str(given[wrong[0]]).lower()} does not fit loss={self.builder.options['loss']}. Set "
            f"{' '.join(keys)}, or choose loss={fitting}."
        )

    def _check_tracking(self) -> None:
        """Refuse settings that the evaluation would only refuse at the end of the training."""
        if self.builder.value("data.tracking") is None:
            return
        _clip_trackers(self.builder)
        if self.builder.value("slots.lock_on") and chosen_supervision(self.builder, None) == "none":
            raise UserError(
                f"slots.lock_on=true needs the first frame's masks, and data={self.builder.options['data']} is "
                "evaluated without: train with slots=free. Provide them later with mode=eval "
                "mode.supervision=first_frame slots=lock_on."
            )

    def check_sources(self) -> None:
        """Refuse clips, or views of them, that cannot be built."""
        self.builder.part("data.clips")
        self.builder.part("data.view")

    def check_data(self) -> None:
        """Warn of keys without effect, of videos on both sides of the split, and of those too short for a clip."""
        warn_unread(self.out_dir, ("data.augment",), "Clips are cropped and flipped by data.view.")
        both = sorted(set(self.split["train"]) & set(self.split["val"]))
        if both:
            logger.warning(
                "Videos are in train and in val: %s. Validation would use training videos: set "
                "data.clips.partition.by=fraction, or give each split a separate folder.",
                join_names(both),
            )
        for side, clips in (("train", self.data_module.train), ("val", self.data_module.val)):
            if clips.skipped:
                logger.warning("%s: left out, too short for a clip: %s", side, join_names(clips.skipped))

    def evaluate(self, provenance: Provenance, *, metrics_only: bool, report: bool) -> dict[str, Any]:
        """Score as mode=eval does; without masks, only report the loss and write no report."""
        model, engine = self.model, self.engine
        out_dir = provenance.folder / EVALUATION
        if self.builder.value("data.tracking") is not None:
            palette = [(red, green, blue) for red, green, blue in self.labels.palette]
            labels = (list(self.labels.classes), palette, self.labels.ignore_index)
            trained = TrainedModel(model.eval(), engine, *labels, info={})
            data = benchmark_videos(self.builder, "val", None)
            check_slots(self.builder, model, data, official=True)
            make_tracker = tracker_maker(self.builder, engine, trained, batch_size=engine.images_at_once())
            options = TrackingOptions(metrics_only=metrics_only, report=report)
            return evaluate_videos(data, make_tracker, engine, out_dir, options, provenance)
        scores, pictures = self.data_module.validate(model, self.loss, engine)
        if engine.is_main:
            write_json(out_dir / "scores.json", scores)
            name = self.builder.options["data"]
            print(f"val/loss:     {scores['loss']:.4f} (no other score: data={name} has no masks)")
            if pictures and not metrics_only:
                write_png(out_dir / "segments.png", next(iter(pictures.values())))
                print(f"image:        {out_dir / 'segments.png'}")
        return scores


def _clip_protocol(builder: Builder) -> VideoClustering:
    """Return the protocol of this dataset that scores segments at the end; the default one if there is none."""
    tracking, protocol = builder.value("data.tracking"), None
    if tracking is not None and tracking.protocols["none"] is not None:
        protocol = builder.part("data.tracking.protocols.none")
    return protocol if isinstance(protocol, VideoClustering) else VideoClustering()


def _clip_trackers(builder: Builder) -> Callable[..., Tracker]:
    """Return the factory of slot trackers for clips without masks, which give no labels to lock on to."""
    unlocked = {"lock_on": False, "slots_per_object": 1, "extra_slots": 0}
    return tracker_factory(builder.value("slots"), f"slots={builder.options.get('slots')}", unlocked)
