"""Masks of tracked objects scored against a data set's own files, where it has such."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoseg.data.clips.videos import Video
from dinoseg.evaluation.score_report import report, write_problems
from dinoseg.evaluation.scoring.folders import Unscorable, score_cases
from dinoseg.metrics.protocols.contract import Case, Cases, ScoreProtocol
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, listed

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
    """Print and write to `out_dir`/scores.json what mode=score gives of the masks `folder`/<video>/<frame>.png.

    Returns the scores. Without a protocol, or where no video has more masks than those of the frames in which objects
    appear, there are none, and it says so.

    Args:
        protocol: by which they are scored.
        videos: of the data set.
        folder: of the masks.
        out_dir: the run folder.
        problems: folder and reason of videos that were left out.
        skip: files that cannot be scored are left out.

    Raises:
        UserError: there are files that cannot be scored.
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
    if protocol.annotations is None:  # DAVIS scores in the order of its list, the others in that of the names
        known.sort(key=lambda video: video.name)
    left_out = {path for path, _ in problems}
    listing = Cases([_case(video, folder) for video in known if folder / video.name not in left_out], list(problems))
    if bare := [video.name for video in videos if video not in known]:
        listing.notes.append(f"{count_of(bare, 'video')} without references not scored: {listed(bare)}")
    advice = f"The masks are kept: mode.restart={out_dir} takes them over."
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
    "These videos come with first masks at most: only the benchmark's server scores them. Hand in the masks."
)
_NO_PROTOCOL = "The data set has no protocol for them, or mode.official=false leaves it out."


def _case(video: Video, folder: Path) -> Case:
    masks = sorted(video.masks.items())
    files = tuple((mask, folder / video.name / f"{video.frame_name(position)}.png") for position, mask in masks)
    return Case(video.name, video.name, files)
