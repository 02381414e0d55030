"""mode=eval of videos: the objects of a split are tracked, by the slots of a trained model or by a backbone alone."""

from pathlib import Path
from typing import Any

from dinoseg.checkpoints.trained import Trained, is_trained, load_trained
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import provenance_of
from dinoseg.extensions.tracking.trackers import tracker_maker
from dinoseg.extensions.video_scores.benchmark_videos import benchmark_videos, chosen_supervision
from dinoseg.extensions.video_scores.videos import TrackingOptions, check_slots, evaluate_videos
from dinoseg.utils.errors import UserError


def evaluate_tracking(
    builder: Builder,
    out_dir: Path,
    split: str,
    supervision: str | None,
    *,
    metrics_only: bool,
    official: bool,
    restart: str | None,
    report: bool,
) -> dict[str, Any]:
    """Track the objects of a split's videos, and return the scores of their masks.

    Args:
        builder: of the whole config.
        out_dir: the run folder, for all files.
        split: train, val or test.
        supervision: `first_frame`, `none`, or None for the data set's default.
        metrics_only: see `TrackingOptions`, as the other options.
        official: see there.
        restart: see there.
        report: see there.

    Raises:
        UserError: the config does not fit, see `evaluate_videos`.
    """
    trained = load_trained(builder) if is_trained(builder) else None
    options = TrackingOptions(metrics_only=metrics_only, official=official, restart=restart, report=report)
    return track_split(builder, trained, out_dir, split, supervision, options)


def track_split(
    builder: Builder,
    trained: Trained | None,
    out_dir: Path,
    split: str,
    supervision: str | None,
    options: TrackingOptions,
) -> dict[str, Any]:
    """Track the objects with the slots of a trained model, or with the backbone alone; see `evaluate_tracking`."""
    if trained is None and chosen_supervision(builder, supervision or "first_frame") == "none":
        raise UserError(
            "mode.supervision=none needs a model that finds objects without masks: set resume=RUN of one with "
            "head=slots. Without resume, masks of first frames are propagated (mode.supervision=first_frame)."
        )
    if metrics := builder.value("metric"):
        raise UserError(f"metric=[{','.join(metrics)}] scores images, not tracked objects. Leave it out.")
    data = benchmark_videos(builder, split, supervision or ("first_frame" if trained is None else None))
    if trained is not None and trained.model.head.slots is not None:
        num_slots = trained.model.head.slots.num_slots
        lock_on = bool(builder.value("slots.lock_on"))
        check_slots(data, num_slots, lock_on=lock_on, official=options.official)
    engine = builder.engine() if trained is None else trained.engine
    make_tracker = tracker_maker(builder, engine, trained, batch_size=engine.images_at_once())
    return evaluate_videos(data, make_tracker, engine, out_dir, options, provenance_of(builder, out_dir))
