"""mode=eval of videos: the objects of a split are tracked, by a backbone alone or by a trained model."""

from pathlib import Path
from typing import Any

from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import provenance_of
from dinoseg.extensions.tracking.trackers import tracker_maker
from dinoseg.extensions.video_scores.benchmark_videos import BenchmarkVideos, benchmark_videos, chosen_supervision
from dinoseg.extensions.video_scores.videos import TrackingOptions, evaluate_videos
from dinoseg.utils.errors import UserError


def evaluate_tracking(
    builder: Builder,
    out_dir: Path,
    split: str,
    supervision: str | None,
    *,
    metrics_only: bool = False,
    official: bool = True,
    restart: str | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Track the objects of a split's videos by the backbone alone, and return the scores of their masks.

    Args:
        builder: of the whole config.
        out_dir: the run folder, for all files.
        split: train, val or test.
        supervision: `first_frame`, or None for it.
        metrics_only: see `TrackingOptions`.
        official: score the masks.
        restart: see `TrackingOptions`.
        report: write report.html.

    Raises:
        UserError: the config does not fit, see `track_videos`.
    """
    if chosen_supervision(builder, supervision or "first_frame") == "none":
        raise UserError(
            "mode.supervision=none needs a model that finds objects without masks: set resume=RUN of one with "
            "head=slots. Without resume, masks of first frames are propagated (mode.supervision=first_frame)."
        )
    data = benchmark_videos(builder, split, supervision or "first_frame")
    options = TrackingOptions(metrics_only, official, restart, report)
    return track_videos(builder, None, data, out_dir, options)


def track_videos(
    builder: Builder, trained: TrainedModel | None, data: BenchmarkVideos, out_dir: Path, options: TrackingOptions
) -> dict[str, Any]:
    """Track the objects of videos and return the scores of their masks.

    Args:
        builder: of the whole config.
        trained: the model that tracks; None: the backbone of the config.
        data: the videos.
        out_dir: the run folder, for all files.
        options: what is scored and written.

    Raises:
        UserError: the config does not fit, see `evaluate_videos`.
    """
    if metrics := builder.value("metric"):
        raise UserError(f"metric=[{','.join(metrics)}] scores images, not tracked objects. Leave it out.")
    engine = builder.engine() if trained is None else trained.engine
    make_tracker = tracker_maker(builder, engine, trained, batch_size=engine.images_at_once())
    return evaluate_videos(data, make_tracker, engine, out_dir, options, provenance_of(builder, out_dir))
