"""Batches of clips for training without labels, and validation of the segments found in clips."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import ClipBatch
from dinoseg.data.clips.cut import Clip, Clips
from dinoseg.data.clips.videos import VOID
from dinoseg.data.clips.view import ClipView
from dinoseg.data.enough_workers import Workers, more_workers
from dinoseg.data.loader import check_batch_size, clip_batches
from dinoseg.metrics.clustering import contingency, segment_scores
from dinoseg.models.model import SegmentationModel
from dinoseg.report.clip_strip import clip_strip
from dinoseg.tracking.factories import SlotFactory
from dinoseg.tracking.tracker import Tracker
from dinoseg.training.engine import Engine
from dinoseg.training.feed import SHOWN_SIDE, Validation, spread
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count

logger = logging.getLogger(__name__)
SCORES = ("ari", "fg_ari", "mbo")  # of a validation with masks


@dataclass
class ClipFeed:
    """Batches of clips for one rank.

    Args:
        train: training clips; their masks are never read.
        val: validation clips, used at full length.
        view: maps the frames of a training clip to what the model sees.
        batch_size: clips in a batch, over all ranks.
        seed: determines order and views, together with epoch and clip.
        workers: data-loading processes.
        rank: this rank.
        world: number of ranks.
        pictures: number of validation clips that each validation visualises, the same ones every time.
        make_tracker: creates a tracker of a model's slots for a validation clip.
    """

    train: Clips
    val: Clips
    view: ClipView
    batch_size: Count
    seed: int
    workers: Workers
    rank: int = 0
    world: int = 1
    pictures: int = 0
    make_tracker: Callable[..., Tracker] = SlotFactory()
    score_names: Sequence[str] = field(init=False)
    lowest: Sequence[str] = ("loss",)
    _has_warned: bool = field(default=False, init=False)  # that no validation clip shows an object

    def __post_init__(self) -> None:
        """Refuse a batch size that does not fit, and clips that cannot be stacked, long before the first batch."""
        check_batch_size(self.batch_size, len(self.train), self.world, "clip")
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
        return more_workers(self.workers)

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
            world=self.world,
        )

    @property
    def epoch(self) -> float:
        """Return the number of batches in which each clip is seen once."""
        return len(self.train) / self.batch_size

    def tally(self, engine: Engine) -> None:
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
        shown = spread(len(self.val), self.pictures, self.world)
        for index in range(self.rank, len(self.val), self.world):
            clip = self.val[index]
            values = [self._loss(model, index, clip, loss, engine)]
            if index in shown or self._has_masks:
                segments = self.segments_of(model, clip, engine)
                values += _scores(clip, segments) if self._has_masks else ()
                if index in shown:
                    pictures[f"{clip['name']}_{clip['start']:05d}"] = _picture(clip, segments)
            sums += [*(value or 0.0 for value in values), *(value is not None for value in values)]
        model.train(training)
        totals, counts = engine.sum(torch.tensor(sums, dtype=torch.float32).to(engine.device)).view(2, -1).tolist()
        means = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        if self._has_masks and not counts[-1] and engine.is_main and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "No validation clip has an object: fg_ari is always 1 by definition, and mbo is undefined. Select "
                "checkpoints by trainer.score=loss, or give masks with objects."
            )
        return Validation(dict(zip(self.score_names, means, strict=True)), pictures)

    @property
    def _has_masks(self) -> bool:
        return len(self.score_names) > 1

    def _loss(self, model: SegmentationModel, index: int, clip: Clip, loss: Loss, engine: Engine) -> float | None:
        span, length = self.val.spans[index], self.train.spans[0].length
        apart = max(1, round(self.train.cut.stride_of(self.val.videos[span.video]) / span.stride))
        frames = clip["frames"][::apart][:length]
        if len(frames) < length:
            return None
        seen = self.view(_channels_last(frames))
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
        tracker.look_ahead(lambda: [(frames, labels)])
        return tracker.track(frames, labels)


def _scores(clip: Clip, segments: Sequence[np.ndarray]) -> tuple[float | None, ...]:
    """Return ARI, FG-ARI and mBO over all frames of a clip, None where no pixel has a mask."""
    table = contingency(np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    for mask, segment in zip(clip["masks"].numpy(), segments, strict=True):
        table += contingency(mask[mask != VOID], segment[mask != VOID])
    return segment_scores(table) if table.counts.size else (None,) * len(SCORES)


def _picture(clip: Clip, segments: Sequence[np.ndarray]) -> np.ndarray:
    known = bool(clip["annotated"].any())
    masks = list(clip["masks"].numpy()) if known else None
    return clip_strip(list(_channels_last(clip["frames"])), segments, masks, longest=SHOWN_SIDE)


def _channels_last(frames: Tensor) -> np.ndarray:
    """Return frames (T, 3, H, W) as (T, H, W, 3)."""
    return frames.permute(0, 2, 3, 1).contiguous().numpy()
