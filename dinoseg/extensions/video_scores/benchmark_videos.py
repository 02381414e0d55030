"""Builder of a benchmark's videos, with the masks that prompt a tracker and the protocol that scores it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinoseg.config.nodes import expect_type, instantiate
from dinoseg.config.plain import to_container
from dinoseg.core.channels import check_rgb
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.clips.videos import Video, select_split
from dinoseg.extensions.protocols.contract import ScoreProtocol
from dinoseg.utils.errors import UserError

SUPERVISION = ("none", "first_frame")


@dataclass(frozen=True)
class BenchmarkVideos:
    """Videos of a split, with the supervision of a tracker and the protocol that scores it.

    Args:
        name: option of the config group `data`.
        split: train, val or test.
        source: files and split of the videos, as plain values: masks of other sources are not reused.
        videos: the videos.
        supervision: `first_frame` or `none`.
        prompts: which masks prompt a tracker, see `dinoseg.extensions.video_scores.videos.prompted_frames`.
        protocol: scores the masks; None without one.
        folder: folder of the masks in a run folder.
        written: names of the frames whose masks are written, by video; None for all. Benchmarks want fewer frames than
            are tracked: their servers accept masks of annotated frames only.
        skip: whether to leave out videos that cannot be tracked or scored.
    """

    name: str
    split: str
    source: Mapping[str, Any]
    videos: Sequence[Video]
    supervision: str
    prompts: str
    protocol: ScoreProtocol | None
    folder: str
    written: Mapping[str, set[str]] | None
    skip: bool


def chosen_supervision(builder: Builder, supervision: str | None) -> str:
    """Return the supervision of a tracker: `supervision` if given, else the default of the data set.

    Raises:
        UserError: the supervision is unknown, or the data set has no masks.
    """
    tracking = builder.value("data.tracking")
    if tracking is None:
        raise UserError(
            f"data={builder.options['data']} has no masks of objects, which mode=eval needs as prompts and references. "
            "Choose data=davis2016, davis2017, youtube_vos or movi; mode=track follows objects through videos of your "
            "own."
        )
    supervision = supervision or str(tracking.supervision)
    if supervision not in SUPERVISION:
        raise UserError(f"mode.supervision={supervision} is unknown. Choose one of {', '.join(SUPERVISION)}, or null.")
    return supervision


def benchmark_videos(builder: Builder, split: str, supervision: str | None) -> BenchmarkVideos:
    """Return the videos of a split for tracking.

    Args:
        builder: of the whole config; `data` is read.
        split: train, val or test.
        supervision: `first_frame`, `none`, or None for the data set's default.

    Raises:
        UserError: split or supervision are unknown, the data set has no masks, or the split has no videos or no masks
            for the supervision.
    """
    supervision = chosen_supervision(builder, supervision)
    data = builder.value("data")
    protocol = None
    tracking = data.tracking
    if (node := tracking.protocols[supervision]) is not None:
        key = f"data.tracking.protocols.{supervision}"
        protocol = expect_type(ScoreProtocol, instantiate(node), key)  # type: ignore[type-abstract]
    annotations = {} if protocol is None or protocol.annotations is None else {"annotations": protocol.annotations}
    videos = _videos(builder.with_changes({"data": annotations}), split)
    prompts = "none"
    if supervision != "none":
        if not any(video.masks for video in videos):
            raise UserError(
                f"mode.supervision={supervision}: the videos of split {split} have no masks to start from. Add them; "
                "or track without masks: resume=RUN of a slot model and mode.supervision=none."
            )
        prompts = "appearing" if tracking.later else "first"
    written = None
    annotated = to_container(tracking.written)
    if any(data[key] != value for key, value in annotated.items()):
        annotated_videos = _videos(builder.with_changes({"data": annotated}), split)
        written = {video.name: set(video.frame_names) for video in annotated_videos}
    source = {key: to_container(data.clips[key], resolve=True) for key in ("layout", "partition")}
    if (side := builder.value("data.clips.eval_square")) is not None:
        source["eval_square"] = side
    source["layout"]["root"] = str(Path(source["layout"]["root"]).expanduser().resolve())  # the same from any folder
    return BenchmarkVideos(
        name=builder.options["data"],
        split=split,
        source={"split": split, **source},
        videos=videos,
        supervision=supervision,
        prompts=prompts,
        protocol=protocol,
        folder=tracking.folder,
        written=written,
        skip=builder.skips_faulty_files,
    )


def _videos(builder: Builder, split: str) -> list[Video]:
    check_rgb(builder.pixels, f"data={builder.options['data']}")
    videos = select_split(builder.part("data.clips.layout"), split, builder.part("data.clips.partition"))
    side = None if split == "train" else builder.value("data.clips.eval_square")
    return videos if side is None else [replace(video, square=side) for video in videos]
