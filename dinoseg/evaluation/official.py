"""Official scores of mode=eval predictions, by the protocol of the data set's benchmark."""

import logging
import shlex
from pathlib import Path
from typing import Any

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.annotation.drawing import mask_file
from dinoseg.data.packed.read import reduced_size
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import find_groups
from dinoseg.evaluation.score_report import report, write_problems
from dinoseg.evaluation.scoring.folders import Unscorable, score_cases
from dinoseg.metrics.protocols.contract import BadFile, Cases, DatasetProtocol, ScoringCase
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_size
from dinoseg.utils.ranges import OnError

OFFICIAL_FOLDER = "official"  # in the run folder: predictions in the benchmark's layout
SCORES = "official_scores.json"  # in the run folder: their scores

logger = logging.getLogger(__name__)


def usable(protocol: DatasetProtocol, data: SegmentationData, out_dir: Path, *, on_error: OnError, tells: bool) -> bool:
    """Return whether a protocol can score a data set's predictions before any is made; if not, log why.

    Args:
        protocol: protocol of the benchmark.
        data: pairs of image and mask files.
        out_dir: the run folder.
        on_error: `stop`: every image must be scorable; `skip`: one image is enough.
        tells: whether this process warns and writes `problems.json`.
    """
    try:
        problems = _problems(protocol, _of_files(data), out_dir / OFFICIAL_FOLDER)
    except UserError as error:
        problems, enough = [(out_dir / OFFICIAL_FOLDER, str(error))], False
    else:
        enough = len(problems) < len(data) if on_error == "skip" else not problems
    if tells and not enough:
        _log_error(Unscorable(problems, "this data set"), out_dir)
    return enough


def official_scores(
    protocol: DatasetProtocol, data: SegmentationData, out_dir: Path, on_error: OnError, group: str | None = None
) -> dict[str, Any] | None:
    """Score the predictions in `out_dir`/official against the original reference files; write official_scores.json.

    `group` is the regular expression of `data.group`, whose groups are the units of the intervals.
    If that fails, log the reason and return None, so that the scores computed so far are not lost.
    """
    folder = out_dir / OFFICIAL_FOLDER
    words = f"mode=score {shlex.quote(f'prediction={folder}')} mode.workers=1"
    remedy = f"Score these predictions separately: {words}, with their reference."
    listing = Cases([])
    for pair in _of_files(data).pairs:
        try:
            listing.cases.append(_case(protocol, pair, folder))
        except BadFile as error:
            listing.problems.append((error.path, error.reason))
    groups, notes = find_groups(group, [case.name for case in listing.cases], "data.group")
    listing.notes += notes
    where = f"the data set and {folder}"
    try:
        scored = score_cases(protocol, listing, where=where, groups=groups, on_error=on_error, remedy=remedy)
    except UserError as error:
        _log_error(error, out_dir)
        return None
    result = report(protocol, scored, out_dir / SCORES)
    print(f"official:     {out_dir}/{SCORES}, predictions for submission in {folder}")
    return result["scores"]


def _of_files(data: SegmentationData) -> PairDataset:
    """Return a data set of files, from which official scores are read; refuse any other."""
    if not isinstance(data, PairDataset):
        raise UserError(
            "data.official needs a dataset of image and mask files, but data.reader reads its samples itself. Set "
            "data.official=null."
        )
    return data


def _problems(protocol: DatasetProtocol, data: PairDataset, folder: Path) -> list[tuple[Path, str]]:
    """Return the file and the reason for each image whose prediction could not be scored."""
    problems = []
    for pair in data.pairs:
        try:
            _case(protocol, pair, folder)
            if not protocol.any_size:
                _check_size(data, pair)
        except BadFile as error:
            problems.append((error.path, error.reason))
    return problems


def _case(protocol: DatasetProtocol, pair: Pair, folder: Path) -> ScoringCase:
    return protocol.case(pair.name, mask_file(pair.mask), folder / protocol.target(pair.name))


def _check_size(data: PairDataset, pair: Pair) -> None:
    """Refuse a mask whose size differs from the loaded image, since classes are predicted at the image's size.

    File headers are read only if the data set may resize: a mask to its image, or both when they are packed.
    """
    longest = data.longest
    resizes_masks = data.reader.masks.on_size_mismatch == "resize_mask"
    if not resizes_masks and longest is None:
        return
    size = stored = read_size(mask_file(pair.mask))
    if resizes_masks:
        size = read_size(pair.image) if isinstance(pair.image, Path) else pair.image.read().shape[:2]
    size = reduced_size(size, longest)
    if size != stored:
        raise BadFile(
            mask_file(pair.mask),
            f"is {stored[1]} x {stored[0]} (width x height), the size of the benchmark, but data.cache=packed or "
            f"data.reader.masks.on_size_mismatch=resize_mask sets its prediction to {size[1]} x {size[0]}.",
        )


def _log_error(error: UserError, out_dir: Path) -> None:
    problems = error.problems if isinstance(error, Unscorable) else [(out_dir / OFFICIAL_FOLDER, str(error))]
    path = write_problems(out_dir, {out_dir / OFFICIAL_FOLDER: problems})
    logger.warning("No official scores (all reasons in %s; mode.official=false skips them): %s", path, error)
