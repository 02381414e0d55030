"""mode=eval on videos: masks of tracked objects, written in the benchmark's layout and scored by its protocol."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.sizes import evenly_spaced
from dinoseg.data.clips.videos import Video
from dinoseg.evaluation.about import about_run
from dinoseg.evaluation.restart import RECORD, earlier_run, tell_taken
from dinoseg.evaluation.score_report import report, write_problems
from dinoseg.evaluation.scoring.folders import Unscorable, score_cases
from dinoseg.evaluation.video_tracking import VideoTracking
from dinoseg.experiment.benchmark_videos import BenchmarkVideos
from dinoseg.experiment.folder import first_ranks
from dinoseg.experiment.provenance import Provenance
from dinoseg.experiment.unread import warn_unread
from dinoseg.metrics.protocols.contract import Cases, ScoreProtocol, ScoringCase
from dinoseg.report.html.tracking import TrackingReport, tracking_page
from dinoseg.report.overlay import reduced
from dinoseg.tracking.tracker import Tracker
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.forms import as_read_back
from dinoseg.utils.images import IMAGE_SUFFIXES, read_image
from dinoseg.utils.natural_order import natural_order
from dinoseg.utils.wording import count_of, listed

BLENDS = "blends"


@dataclass(frozen=True)
class TrackingOptions:
    """Options of an evaluation of tracked videos.

    Args:
        metrics_only: write no blends.
        official: score the masks.
        restart: run folder whose masks of finished videos are reused; None without one.
        report: write report.html.
    """

    metrics_only: bool = False
    official: bool = True
    restart: str | None = None
    report: bool = True


def check_slots(data: BenchmarkVideos, num_slots: int, *, lock_on: bool, official: bool) -> None:
    """Refuse slots that cannot be tracked or scored, before any video is tracked.

    Args:
        data: videos of a benchmark.
        num_slots: number of slots of the model.
        lock_on: whether slots are created for the objects of the first mask.
        official: whether the masks will be scored.

    Raises:
        UserError: there are more slots than the protocol accepts, or the slots need masks that are not given.
    """
    limit = None if data.protocol is None else data.protocol.max_proposals
    if official and limit is not None and num_slots > limit:
        raise UserError(
            f"The model has {num_slots} slots, but the unsupervised protocol of data={data.name} allows {limit} "
            f"segments. Set head.num_slots={limit} or fewer, also for a trained model; or raise the limit (not "
            f"official): data.tracking.protocols.none.max_proposals={num_slots}."
        )
    if lock_on and data.supervision == "none":
        raise UserError(
            "slots.lock_on=true creates slots from the masks of first frames, which mode.supervision=none does not "
            "provide. Set mode.supervision=first_frame, or slots=free."
        )


def evaluate_videos(
    data: BenchmarkVideos,
    make_tracker: Callable[[], Tracker],
    engine: Engine,
    out_dir: Path,
    options: TrackingOptions,
    provenance: Provenance,
) -> dict[str, Any]:
    """Track the objects of all videos of a split and score their masks; return the scores.

    Masks go to `out_dir`/<data.tracking.folder>/<video>/<frame>.png, blends to `out_dir`/blends. `scores.json` equals
    that of mode=score for the same masks; it is not written if the split has only first masks as references.

    Args:
        data: videos of a benchmark.
        make_tracker: creates a tracker for a video.
        engine: device and ranks; each rank takes every n-th video.
        out_dir: the run folder.
        options: what is written and scored.
        provenance: the run and its model.

    Raises:
        UserError: prompt masks are missing, files cannot be read or scored, or the disk is full.
    """
    out_dir = first_ranks(out_dir, engine.share)
    first_tracker = make_tracker()  # only for the settings that all trackers share
    record = as_read_back({"data": data.source, "given": data.prompts, "tracker": first_tracker.settings})
    tracking = VideoTracking(
        make_tracker=make_tracker,
        out_dir=out_dir,
        masks=out_dir / data.folder,
        blends=None if options.metrics_only else out_dir / BLENDS,
        prompts=data.prompts,
        written=data.written,
        batch_size=engine.images_at_once(),
        skip=data.skip,
        earlier=earlier_run(options.restart, record),
    )
    if engine.is_main:
        warn_unread(out_dir, first_tracker.unread, first_tracker.unread_because)
        write_json(out_dir / RECORD, record)
    tracked = engine.gather(tracking.track(data.videos[engine.rank :: engine.world]))
    problems = [video.problem for video in tracked if video.problem is not None]
    result: dict[str, Any] = {"videos": len(data.videos) - len(problems)}
    if engine.is_main:
        tell_taken(options.restart, [video.taken_over for video in tracked if video.taken_over is not None])
        print(f"masks:        {tracking.masks}/<video>/<frame>.png, indexed, with the palette of DAVIS")
        print(f"blends:       {tracking.blends or 'none'}")
        scored_by = data.protocol if options.official else None
        result |= score_masks(scored_by, data.videos, tracking.masks, out_dir, problems=problems, skip=tracking.skip)
        if options.report:
            report_videos(provenance, out_dir, tracking.blends, split=data.split)
    engine.close()
    return {**result, "run": str(out_dir)}


PAGE = "report.html"  # in a run folder
_SHOWN = 6  # worst videos
_FRAMES = 4  # per video
_LONGEST = 480  # pixels of an image's longer side
_SERIES = "J&F_per_frame"  # key of per-frame scores, if the protocol has them


def report_videos(provenance: Provenance, out_dir: Path, blends: Path | None, *, split: str) -> None:
    """Write report.html from scores.json and some blended frames; a no-op without scores.

    Args:
        provenance: the run and its model.
        out_dir: the run folder.
        blends: folder with one blend folder per video; None without blends.
        split: split of the data.
    """
    scores = out_dir / "scores.json"
    if not scores.is_file():
        return
    result = json.loads(scores.read_text(encoding="utf-8"))
    key = next(iter(result["scores"]))
    rows = [row for row in result["per_video"] if row[key] is not None]
    worst = [row["name"] for row in sorted(rows, key=lambda row: row[key])[:_SHOWN]]
    curves = {row["name"]: row[_SERIES] for row in rows if _SERIES in row}
    model = "labels propagated without training" if provenance.training is None else provenance.model
    choices = provenance.choices
    report = TrackingReport(
        title=f"{choices['data']}, split {split}: {result['protocol']}",
        subtitle=f"backbone={choices['backbone']}, {model}",
        result=result,
        per_frame=(_SERIES.partition("_")[0], curves),
        shown=[] if blends is None else [(name, _frames(blends / name)) for name in worst],
        about=about_run(provenance.folder, provenance.config, {"model": model}),
    )
    write_text(out_dir / PAGE, tracking_page(report))
    print(f"report:       {out_dir}/{PAGE}")


def _frames(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Return some evenly spaced blended frames of a video, with their names."""
    found = [path for path in entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted(found, key=lambda path: natural_order(path.name))
    places = evenly_spaced(len(paths), _FRAMES)
    return [(paths[index].stem, reduced(read_image(paths[index]), _LONGEST)) for index in places]


logger = logging.getLogger(__name__)


def score_masks(
    protocol: ScoreProtocol | None,
    videos: Sequence[Video],
    folder: Path,
    out_dir: Path,
    *,
    problems: Sequence[tuple[Path, str]] = (),
    skip: bool = False,
) -> dict[str, Any]:
    """Print the scores of the masks `folder`/<video>/<frame>.png, as in mode=score, and write `out_dir`/scores.json.

    Returns the scores. They are empty, with the reason printed, without a protocol. They are also empty if no video has
    masks beyond those of the frames in which objects appear.

    Args:
        protocol: scores the masks; None without one.
        videos: videos of the data set.
        folder: folder of the masks.
        out_dir: the run folder.
        problems: folder and reason of each video that was left out.
        skip: whether to leave out files that cannot be scored.

    Raises:
        UserError: some files cannot be scored.
    """
    known = [
        video for video in videos if video.dense and video.masks and (len(video.masks) > 1 or len(video.frames) == 1)
    ]
    if protocol is None or not known:
        if problems:
            path = write_problems(out_dir, {folder: problems})
            logger.warning("%s left out, with reasons in %s.", count_of(problems, "video"), path)
        print(f"scores:       none. {_NO_PROTOCOL if known else _NO_REFERENCES}")
        return {}
    if protocol.annotations is None:  # DAVIS scores in the order of its list, other protocols by name
        known.sort(key=lambda video: video.name)
    left_out = {path for path, _ in problems}
    listing = Cases([_case(video, folder) for video in known if folder / video.name not in left_out], list(problems))
    if bare := [video.name for video in videos if video not in known]:
        listing.notes.append(f"{count_of(bare, 'video')} without references not scored: {listed(bare)}")
    advice = f"The masks are saved: mode.restart={out_dir} reuses them."
    try:
        where, on_error = f"the data set and {folder}", "skip" if skip else "stop"
        scored = score_cases(protocol, listing, where=where, on_error=on_error, remedy=advice)
    except Unscorable as error:
        write_problems(out_dir, {folder: error.problems})
        raise UserError(f"{error}\n{advice}") from error
    scores = report(protocol, scored, out_dir / "scores.json")["scores"]
    print(f"\nscores:       {out_dir}/scores.json")
    return scores


_NO_REFERENCES = (
    "These videos have public masks of first frames only: submit the predicted masks to the benchmark's server."
)
_NO_PROTOCOL = "The data set has no protocol for them, or mode.official=false leaves it out."


def _case(video: Video, folder: Path) -> ScoringCase:
    masks = sorted(video.masks.items())
    files = tuple((mask, folder / video.name / f"{video.frame_name(position)}.png") for position, mask in masks)
    return ScoringCase(video.name, video.name, files)
