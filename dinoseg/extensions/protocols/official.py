"""Official scores of mode=eval predictions, by the protocol of the data set's benchmark."""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sizes import backbone_size
from dinoseg.core.sources import mask_file
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import find_groups
from dinoseg.extensions.protocols.contract import BadFile, Cases, DatasetProtocol, ScoringCase
from dinoseg.extensions.protocols.folders import Unscorable, score_cases
from dinoseg.extensions.protocols.report import report, write_problems
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_size, write_png
from dinoseg.utils.ranges import OnError

OFFICIAL_FOLDER = "official"  # in the run folder: predictions in the benchmark's layout
SCORES = "official_scores.json"  # in the run folder: their scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialScorer:
    """Scores the predictions of mode=eval by a benchmark's protocol.

    Args:
        protocol: of the benchmark.
        out_dir: the run folder; predictions in the benchmark's layout lie in its folder `official`.
        on_error: `stop`: every image must be scorable; `skip`: one image is enough.
    """

    protocol: DatasetProtocol
    out_dir: Path
    on_error: OnError = "stop"

    @property
    def folder(self) -> Path:
        """The folder of the predictions."""
        return self.out_dir / OFFICIAL_FOLDER

    def can_score(self, data: SegmentationData, *, warns: bool) -> bool:
        """Return whether the protocol can score a data set's predictions before any is made.

        Args:
            data: pairs of image and mask files.
            warns: whether to log why it cannot, and to write `problems.json`.
        """
        try:
            problems = _problems(self.protocol, _of_files(data), self.folder)
        except UserError as error:
            problems, enough = [(self.folder, str(error))], False
        else:
            enough = len(problems) < len(data) if self.on_error == "skip" else not problems
        if warns and not enough:
            _log_error(Unscorable(problems, "this data set"), self.out_dir)
        return enough

    def write_prediction(self, ids: np.ndarray, name: str) -> None:
        """Write the class ids (H, W) of an image as the benchmark expects them."""
        write_png(self.folder / self.protocol.target(name), self.protocol.file_ids(ids))

    def score(self, data: SegmentationData, group: str | None = None) -> dict[str, Any] | None:
        """Score the predictions against the original reference files, and write official_scores.json; return it.

        If that fails, log the reason and return None, so that the scores computed so far are not lost.

        Args:
            data: pairs of image and mask files.
            group: the regular expression of `data.group`, whose groups are the units of the intervals.
        """
        words = f"mode=score {shlex.quote(f'prediction={self.folder}')} mode.workers=1"
        remedy = f"Score these predictions separately: {words}, with their reference."
        listing = Cases([])
        for pair in _of_files(data).pairs:
            try:
                listing.cases.append(_case(self.protocol, pair, self.folder))
            except BadFile as error:
                listing.problems.append((error.path, error.reason))
        groups, notes = find_groups(group, [case.name for case in listing.cases], "data.group")
        listing.notes += notes
        where = f"the data set and {self.folder}"
        try:
            scored = score_cases(
                self.protocol, listing, where=where, groups=groups, on_error=self.on_error, remedy=remedy
            )
        except UserError as error:
            _log_error(error, self.out_dir)
            return None
        result = report(self.protocol, scored, self.out_dir / SCORES)
        print(f"official:     {self.out_dir}/{SCORES}, predictions for submission in {self.folder}")
        return result


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
    size = backbone_size(size, 1.0, longest)
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
