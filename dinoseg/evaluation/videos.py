"""mode=eval on videos: the masks of tracked objects, written as benchmarks take them and scored by their protocols."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg import build
from dinoseg.config.nodes import instantiate
from dinoseg.config.values import plain
from dinoseg.data.clips.videos import Video, chosen
from dinoseg.errors import UserError
from dinoseg.evaluation.restart import RECORD, digest_of, earlier_run, keep_digest, record_of, take_over, tell_taken
from dinoseg.evaluation.video_scores import score_masks
from dinoseg.metrics.protocols.contract import ScoreProtocol
from dinoseg.report.progress import Bar
from dinoseg.runs.trained import Trained, is_trained
from dinoseg.runs.unread import warn_unread
from dinoseg.storage.atomic import write_json
from dinoseg.tracking.propagation.tracker import PropagationTracker
from dinoseg.tracking.slots.tracker import SlotTracker
from dinoseg.tracking.tracker import Tracker
from dinoseg.tracking.video.benchmark_masks import write_masks
from dinoseg.training.engine import Engine
from dinoseg.wording import count_of

SUPERVISION = ("none", "first_frame")
BLENDS = "blends"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What `mode=eval` was asked for.

    Args:
        split: train, val or test.
        metrics_only: write no blends.
        official: score the masks.
        supervision: `first_frame`, `none`, or None as the data set says.
        restart: run folder whose masks of whole videos are taken over.
    """

    split: str = "val"
    metrics_only: bool = False
    official: bool = True
    supervision: str | None = None
    restart: str | None = None

    def refuse_tracking(self) -> None:
        """Refuse what only tracking reads.

        Raises:
            UserError: one of these is given.
        """
        for key in ("supervision", "restart"):
            if (value := getattr(self, key)) is not None:
                raise UserError(
                    f"mode.{key}={value} is for tracking in videos: without resume, or with a model of head=slots. "
                    "This one predicts classes of single images: leave it out."
                )


def needs_no_training(cfg: DictConfig) -> bool:
    """Return whether a backbone alone is to track: in videos, without a checkpoint or a head that came trained."""
    return cfg.data.clips is not None and not is_trained(cfg)


def propagate(cfg: DictConfig, out_dir: Path, options: Options) -> dict[str, Any]:
    """Track objects by label propagation, which needs their first masks, and score their masks."""
    supervision = chosen_supervision(cfg, options.supervision or "first_frame")
    if supervision == "none":
        raise UserError(
            "mode.supervision=none needs a model that finds objects by itself: give resume=RUN of one with "
            "head=slots. Without resume, first masks are propagated (mode.supervision=first_frame)."
        )
    settings, engine = instantiate(cfg.tracker), instantiate(cfg.engine)
    if engine.is_main:
        warn_unread(out_dir, ("slots",), "Label propagation has no slots: give resume=RUN of a model with head=slots.")
    backbone = build.backbone(cfg).to(engine.device)

    def make() -> Tracker:
        return PropagationTracker(
            backbone, settings, device=engine.device, autocast=engine.autocast, batch_size=engine.eval_batch_size
        )

    return evaluate_videos(cfg, make, engine, out_dir, options, supervision=supervision)


def follow_slots(cfg: DictConfig, trained: Trained, out_dir: Path, options: Options) -> dict[str, Any]:
    """Track objects by the slots of a trained model, with or without their first masks, and score their masks.

    Raises:
        UserError: its slots are more than the protocol takes, they need masks that are not given, or see
            `evaluate_videos`.
    """
    supervision = chosen_supervision(cfg, options.supervision)
    limit = getattr(protocol_of(cfg, supervision), "max_proposals", None)
    head = trained.model.head.slots
    slots = 0 if head is None else head.num_slots
    if options.official and limit is not None and slots > limit:
        raise UserError(
            f"The model has {slots} slots, and the unsupervised protocol of data={cfg.choices.data} takes {limit} "
            f"segments. Give head.num_slots={limit} or fewer, which a trained model takes too; or raise the limit, "
            f"which is not official, by data.tracking.protocols.none.max_proposals={slots}."
        )
    engine, choice = trained.engine, instantiate(cfg.slots)
    if choice.lock_on and supervision == "none":
        raise UserError(
            "slots.lock_on=true makes slots for the objects of first frames' masks, and mode.supervision=none gives "
            "none. Give mode.supervision=first_frame, or slots=free."
        )
    if engine.is_main:
        warn_unread(out_dir, ("tracker",), "Slots are followed as slots=... says.")

    def make() -> Tracker:
        return SlotTracker(trained.model, choice, batch_size=engine.eval_batch_size, autocast=engine.autocast)

    return evaluate_videos(cfg, make, engine, out_dir, options, supervision=supervision)


def evaluate_videos(
    cfg: DictConfig,
    make: Callable[[], Tracker],
    engine: Engine,
    out_dir: Path,
    options: Options,
    *,
    supervision: str,
) -> dict[str, Any]:
    """Track the objects of all videos of a split and score their masks; return the scores.

    Masks go to `out_dir`/<data.tracking.folder>/<video>/<frame>.png, blends to `out_dir`/blends. `scores.json` is what
    mode=score writes of the same masks; where a split has no references but first masks, there is none.

    Args:
        cfg: the whole config.
        make: gives a tracker for a video.
        engine: of its ranks, each takes every n-th video.
        out_dir: the run folder.
        options: what was asked for.
        supervision: `first_frame` or `none`.

    Raises:
        UserError: masks that are to be given are missing, files cannot be read or scored, or the disk is full.
    """
    out_dir, protocol = Path(engine.share(str(out_dir))), protocol_of(cfg, supervision)
    layout = getattr(protocol, "layout", None)  # of DAVIS: its protocol says against which annotations
    videos = _videos(cfg, options.split, {} if layout is None else {"annotations": layout.annotations})
    given = "none" if supervision == "none" else "appearing" if cfg.data.tracking.later else "first"
    if given != "none" and not any(video.masks for video in videos):
        raise UserError(
            f"mode.supervision={supervision}: the videos of split {options.split} have no masks that could be given. "
            "Add them; or find objects without, by resume=RUN of a model of slots and mode.supervision=none."
        )
    record = record_of(cfg, make().settings, split=options.split, given=given)
    job = _Job(
        make=make,
        out_dir=out_dir,
        folder=out_dir / cfg.data.tracking.folder,
        blends=None if options.metrics_only else out_dir / BLENDS,
        given=given,
        written=_written(cfg, options.split),
        batch_size=engine.eval_batch_size,
        skip=cfg.data.on_error == "skip",
        earlier=earlier_run(options.restart, record),
    )
    if engine.is_main:
        write_json(out_dir / RECORD, record)
    followed = engine.gather(_follow_all(job, videos[engine.rank :: engine.world]))
    problems = [each.problem for each in followed if each.problem is not None]
    result: dict[str, Any] = {"videos": len(videos) - len(problems)}
    if engine.is_main:
        tell_taken(options.restart, [each.taken for each in followed if each.taken is not None])
        print(f"masks:        {job.folder}/<video>/<frame>.png, indexed, with the palette of DAVIS")
        print(f"blends:       {job.blends or 'none'}")
        scored_by = protocol if options.official else None
        result |= score_masks(scored_by, videos, job.folder, out_dir, problems=problems, skip=job.skip)
    engine.close()
    return {**result, "run": str(out_dir)}


def chosen_supervision(cfg: DictConfig, given: str | None) -> str:
    """Return what a tracker is told: as `given`, or as the data set says.

    Raises:
        UserError: it is unknown, or the data has no masks.
    """
    if cfg.data.tracking is None:
        raise UserError(
            f"data={cfg.choices.data} has no masks of objects, so mode=eval can neither give nor score any. Choose "
            "data=davis2016, davis2017, youtube_vos or movi; mode=track follows objects through videos of your own."
        )
    chosen = given or cfg.data.tracking.supervision
    if chosen not in SUPERVISION:
        raise UserError(f"mode.supervision={chosen} is unknown. Choose one of {', '.join(SUPERVISION)}, or null.")
    return chosen


def protocol_of(cfg: DictConfig, supervision: str) -> ScoreProtocol | None:
    """Return the protocol by which a data set's videos are scored; None where there is none."""
    node = cfg.data.tracking.protocols[supervision]
    return None if node is None else instantiate(node)


@dataclass(frozen=True)
class _Followed:
    """What became of a video."""

    frames: int  # tracked, none of those taken over
    problem: tuple[Path, str] | None = None  # where it was left out
    taken: str | None = None  # its name, if its masks were taken over


@dataclass(frozen=True)
class _Job:
    """How each video is tracked."""

    make: Callable[[], Tracker]
    out_dir: Path
    folder: Path  # of folders of masks
    blends: Path | None
    given: str
    written: Mapping[str, Collection[str]] | None  # video to names of frames; None: all
    batch_size: int
    skip: bool  # a video that cannot be tracked is left out
    earlier: Path | None  # run folder of masks that are taken over

    def follow(self, video: Video) -> _Followed:
        """Write a video's masks, or take them over."""
        written = None if self.written is None else self.written.get(video.name, ())
        digest = digest_of(video, self.given)
        if self._taken(video, written, digest):
            return _Followed(0, taken=video.name)
        try:
            write_masks(
                video,
                self.make(),
                self.folder / video.name,
                given=self.given,
                blends=None if self.blends is None else self.blends / video.name,
                written=written,
                batch_size=self.batch_size,
            )
        except UserError as error:
            if not self.skip:
                raise
            return _Followed(0, (self.folder / video.name, str(error)))
        keep_digest(self.out_dir, video.name, digest)
        return _Followed(len(video.frames))

    def _taken(self, video: Video, written: Collection[str] | None, digest: str) -> bool:
        """Take over what an earlier run has of a video; return whether that is all."""
        names = [video.frame_name(position) for position in range(len(video.frames))]
        names = [name for name in names if written is None or name in written]
        files = {self.folder / video.name: [f"{name}.png" for name in names]}
        if self.blends is not None:
            files[self.blends / video.name] = [f"{name}.jpg" for name in names]
        return take_over(self.earlier, self.out_dir, files, video.name, digest)


def _videos(cfg: DictConfig, split: str, changes: Mapping[str, Any]) -> list[Video]:
    """Return the videos of a split, with other values of some of data's keys."""
    if split not in build.SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of {', '.join(build.SPLITS)}.")
    merged = OmegaConf.merge(cfg, {"data": changes})
    return chosen(instantiate(merged.data.clips.layout), split, instantiate(merged.data.clips.partition))


def _written(cfg: DictConfig, split: str) -> dict[str, set[str]] | None:
    """Return by video the names of the frames whose masks are written, None for all of them."""
    changes = plain(cfg.data.tracking.written)
    if all(cfg.data[key] == value for key, value in changes.items()):
        return None
    videos = _videos(cfg, split, changes)
    return {video.name: {video.frame_name(position) for position in range(len(video.frames))} for video in videos}


def _follow_all(job: _Job, videos: Sequence[Video]) -> list[_Followed]:
    """Track this rank's videos."""
    start = time.perf_counter()
    try:
        followed = [job.follow(video) for video in Bar(videos, "tracking", unit="video", leave=False)]
    except OSError as error:
        raise UserError(
            f"Cannot write below {job.out_dir} ({error}). Make room, and go on with mode.restart={job.out_dir}."
        ) from error
    except KeyboardInterrupt:
        logger.warning("Stopped: the same command with mode.restart=%s takes over what is whole.", job.out_dir)
        raise
    frames, seconds = sum(each.frames for each in followed), time.perf_counter() - start
    rate = f"{frames / seconds:.2f} frames/s with reading and writing"
    logger.info("%s tracked in %.1f s: %s", count_of(frames, "frame"), seconds, rate)
    return followed
