"""mode=eval of slot models: the objects of a split's videos are tracked by the slots."""

from pathlib import Path
from typing import Any

from dinoseg.checkpoints.trained import load_trained
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.slots.contract import slots_of
from dinoseg.extensions.video_scores.benchmark_videos import BenchmarkVideos, benchmark_videos
from dinoseg.extensions.video_scores.track_split import track_videos
from dinoseg.extensions.video_scores.videos import TrackingOptions
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError


def evaluate_slots(
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
    """Track the objects of a split's videos by the slots of a trained model, and return the scores of their masks.

    Args:
        builder: of the whole config.
        out_dir: the run folder, for all files.
        split: train, val or test.
        supervision: `first_frame`, `none`, or None for the data set's default.
        metrics_only: see `TrackingOptions`.
        official: score the masks.
        restart: see `TrackingOptions`.
        report: write report.html.

    Raises:
        UserError: the config does not fit, see `check_slots` and `track_videos`.
    """
    trained = load_trained(builder)
    data = benchmark_videos(builder, split, supervision)
    check_slots(builder, trained.model, data, official=official)
    options = TrackingOptions(metrics_only, official, restart, report)
    return track_videos(builder, trained, data, out_dir, options)


def check_slots(builder: Builder, model: SegmentationModel, data: BenchmarkVideos, *, official: bool) -> None:
    """Refuse slots that cannot be tracked or scored, before any video is tracked.

    Args:
        builder: of the whole config.
        model: with a slot head.
        data: videos of a benchmark.
        official: whether the masks will be scored.

    Raises:
        UserError: there are more slots than the protocol accepts, or the slots need masks that are not given.
    """
    num_slots = slots_of(model).num_slots
    limit = None if data.protocol is None else data.protocol.max_proposals
    if official and limit is not None and num_slots > limit:
        raise UserError(
            f"The model has {num_slots} slots, but the unsupervised protocol of data={data.name} allows {limit} "
            f"segments. Set head.num_slots={limit} or fewer, also for a trained model; or raise the limit (not "
            f"official): data.tracking.protocols.none.max_proposals={num_slots}."
        )
    if builder.value("slots.lock_on") and data.supervision == "none":
        raise UserError(
            "slots.lock_on=true creates slots from the masks of first frames, which mode.supervision=none does not "
            "provide. Set mode.supervision=first_frame, or slots=free."
        )
