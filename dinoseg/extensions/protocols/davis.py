"""Official DAVIS scores of video object segmentation: 2017 semi-supervised and unsupervised, and 2016."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, ScoringCase, SumProtocol
from dinoseg.extensions.protocols.davis_layout import DavisLayout
from dinoseg.extensions.protocols.trees import read_labels, read_pair, refuse_ids
from dinoseg.metrics.region_boundary import match_proposals, object_scores, pair_scores, statistics
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids
from dinoseg.utils.ranges import UpTo255, check_annotations

KEYS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
VOID = 255
_LATER_SETS = ("test-dev", "test-challenge")  # sets with new sequences for the unsupervised task
MAX_OBJECTS = 254

_RESOLUTION = "as annotated; another size is an error"
_STATISTICS = (
    "per object over its frames: mean, share of frames above 0.5 (recall), mean of the first quarter less that of the "
    "last (decay); J&F-Mean is the mean of J-Mean and F-Mean"
)
_LONG = "from 256 evaluated frames on, the official decay is wrong or nan (8-bit indices, numpy 2.4); ours is not"
_MISSING = "a missing or unreadable prediction is an error that names the file; the official script crashes"
_UNROUNDED = "nothing is rounded or read from tables of an earlier run; the official script rounds to 3 decimals"
_SHORT = "a sequence of one or two frames has none to score and adds no object; the official script crashes"


class Sequences(SumProtocol):
    """Base class of DAVIS scores: each statistic summed over the objects of a sequence, and the number of objects.

    Args:
        layout: layout of the sequences on disk.
    """

    unit = "sequence"
    keys = KEYS
    unbounded = ("J-Decay", "F-Decay")

    def __init__(self, layout: DavisLayout) -> None:
        self.layout, self.annotations = layout, layout.annotations

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each sequence of the split."""
        return self.layout.find(reference, prediction)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores (...) from sums (..., 7); nan without objects."""
        count = sums[..., -1:]
        means = np.divide(sums[..., :-1], count, out=np.full(sums[..., :-1].shape, np.nan), where=count > 0)
        scores = dict(zip(KEYS[1:], np.moveaxis(means, -1, 0), strict=True))
        return {KEYS[0]: (scores["J-Mean"] + scores["F-Mean"]) / 2, **scores}


class Davis2017(Sequences):
    """Semi-supervised DAVIS-2017: objects are given in the first frame and tracked under their ids.

    Args:
        split: list of sequences below ImageSets/2017.
        resolution: folder below Annotations.
    """

    name = "davis2017"

    def __init__(self, split: str = "val", resolution: str = "480p") -> None:
        super().__init__(DavisLayout("Annotations", ("2017",), split, resolution, skip_ends=True))
        self.rules: dict[str, Any] = {
            "absent_class": "an object in neither mask of a frame: J = F = 1; in one of them: 0",
            "resolution": _RESOLUTION,
            "ignore": "255 in the reference is background; the first and the last frame are not scored",
            "aggregation": f"{_STATISTICS}; mean over the objects of all sequences together",
            "objects": "1 to the largest id of the first annotated frame, absent ids between included",
            "version": "davis2017-evaluation, semi-supervised",
            "differs": [
                _LONG,
                _MISSING,
                _SHORT,
                _UNROUNDED,
                "predicted ids above the objects are an error that names file and ids; the official script stops "
                "without either",
            ],
        }

    def measure(self, case: ScoringCase) -> Measured:
        """Return the summed statistics of the objects, and their number: (7,) float64."""
        count = _largest_id(case)
        rule = _allowed_ids(count, "the objects of the first annotated frame")
        scores = []
        for file, reference, prediction in _frames(case, skip_ends=True):
            refuse_ids(prediction, prediction > count, file, rule)
            scores.append(np.stack(object_scores(reference, prediction, count)))
        return _measure_sequence(scores, count)


class Davis2017Unsupervised(Sequences):
    """Unsupervised DAVIS-2017: proposals with arbitrary ids, matched to the objects of a sequence.

    Args:
        split: list of sequences below ImageSets/2017, or of test-dev and test-challenge below ImageSets/2019.
        resolution: folder below Annotations_unsupervised.
        max_proposals: largest valid id of a prediction; official: 20.

    Raises:
        UserError: the number of proposals is out of range.
    """

    name = "davis2017_unsupervised"
    max_proposals: int

    @check_annotations
    def __init__(self, split: str = "val", resolution: str = "480p", max_proposals: UpTo255 = 20) -> None:
        years = ("2019",) if split in _LATER_SETS else ("2017",)
        super().__init__(DavisLayout("Annotations_unsupervised", years, split, resolution, skip_ends=False))
        self.max_proposals = max_proposals
        official = "" if max_proposals == 20 else " (not official, which is 20)"
        self.rules: dict[str, Any] = {
            "absent_class": "in neither mask of a frame: J = F = 1; in one of them: 0",
            "resolution": _RESOLUTION,
            "ignore": "255 in the reference is void and belongs to no mask; all frames are scored",
            "aggregation": f"{_STATISTICS}; mean over the objects of all sequences together",
            "objects": "1 to the largest id of the first annotated frame, absent ids between included",
            "proposals": f"up to {max_proposals}{official}, matched one to one over a whole sequence where the mean of "
            "J and F is greatest; unmatched proposals cost nothing, missing ones are empty masks",
            "version": "davis2017-evaluation, unsupervised",
            "differs": [
                _LONG,
                _MISSING,
                _UNROUNDED,
                "objects are listed by their reference ids; the official table lists them in the order of the "
                "proposals",
                "predicted ids above the limit are an error that names file and ids; the official script stops "
                "without either",
            ],
        }

    def measure(self, case: ScoringCase) -> Measured:
        """Return the summed statistics of the matched objects, and their number: (7,) float64."""
        objects = _largest_id(case)
        proposals = 0
        rule = _allowed_ids(self.max_proposals, "proposals")
        if self.max_proposals < MAX_OBJECTS:
            rule += f" To score more, set protocol.max_proposals={MAX_OBJECTS}, which is not official."
        scores = []
        for file, reference, prediction in _frames(case, skip_ends=False):
            refuse_ids(prediction, prediction > self.max_proposals, file, rule)
            proposals = max(proposals, int(prediction.max()))
            void = reference == VOID
            pairs = pair_scores(reference, prediction, objects, max(self.max_proposals, objects), void)
            scores.append(np.stack(pairs))
        # empty masks beyond the largest id would be free proposals: the official script adds only the missing ones
        series = np.stack(scores, axis=-1)[:, : max(proposals, objects)]  # (2, P, G, T)
        match = match_proposals(*series)
        matched = series[:, match, np.arange(objects)]  # (2, G, T)
        return _measure_sequence(list(np.moveaxis(matched, -1, 0)), objects, (match + 1).tolist())


class Davis2016(Sequences):
    """DAVIS-2016: one foreground object in each sequence, whatever its id.

    Args:
        split: list of sequences below ImageSets/2016, or below ImageSets/480p as in the original DAVIS-2016.
        resolution: folder below Annotations.
    """

    name = "davis2016"

    def __init__(self, split: str = "val", resolution: str = "480p") -> None:
        super().__init__(DavisLayout("Annotations", ("2016", resolution), split, resolution, skip_ends=True))
        self.rules: dict[str, Any] = {
            "absent_class": "no foreground in either mask of a frame: J = F = 1; in one of them only: 0",
            "resolution": _RESOLUTION,
            "ignore": "nothing is void, anything but 0 is foreground; the first and the last frame are not scored",
            "aggregation": f"{_STATISTICS}, where all of a sequence's foreground is one object; mean over sequences",
            "version": "DAVIS-2016 (Perazzi et al., CVPR 2016), J and F; T, the temporal stability, is not counted",
            "differs": [_LONG, _MISSING, _SHORT],
        }

    def measure(self, case: ScoringCase) -> Measured:
        """Return the sequence's statistics, and a count of 1: (7,) float64."""
        scores = [
            np.stack(object_scores(reference, prediction, 1))
            for _, reference, prediction in _frames(case, skip_ends=True, read=_read_foreground)
        ]
        return _measure_sequence(scores, 1)


def _largest_id(case: ScoringCase) -> int:
    """Return the largest id, except void, of a sequence's first annotated frame."""
    first = case.files[0][0]
    ids = read_labels(first)
    objects = ids[ids != VOID]
    refuse_ids(objects, objects > MAX_OBJECTS, first, f"Object ids are 1 to {MAX_OBJECTS}, and {VOID} is void.")
    if not objects.any() and ids.any():
        raise BadFile(first, f"holds only void ({VOID}) and no object. Score masks of DAVIS-2016 with davis2016.")
    return int(objects.max(initial=0))


def _read_foreground(path: Path) -> np.ndarray:
    """Return 1 where a grey, palette or colour file is not 0, as (H, W) uint8."""
    try:
        pixels = read_ids(path)
    except UserError as error:
        raise BadFile(path, str(error)) from None
    held = pixels != 0
    return (held.any(axis=2) if held.ndim == 3 else held).astype(np.uint8)


def _frames(
    case: ScoringCase, *, skip_ends: bool, read: Callable[[Path], np.ndarray] = read_labels
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Yield prediction file, reference and prediction (H, W) of each scored frame, one at a time."""
    for file, predicted in case.files[1:-1] if skip_ends else case.files:
        assert predicted is not None
        yield predicted, *read_pair(file, predicted, read)


def _allowed_ids(count: int, what: str) -> str:
    return f"Only {what} are allowed: {f'1 to {count}' if count else 'none'}, and 0 for the rest."


def _measure_sequence(scores: list[np.ndarray], count: int, proposals: list[int] | None = None) -> Measured:
    """Return a sequence's sums and details from J and F (2, G) of each scored frame."""
    details: dict[str, Any] = {"frames": len(scores), "objects": {}}
    if not scores or not count:
        return Measured(np.zeros(len(KEYS)), details)
    series = np.ascontiguousarray(np.stack(scores, axis=-1))  # (2, G, T)
    details["J&F_per_frame"] = series.mean(axis=(0, 1)).tolist()  # over the objects
    table = np.concatenate(list(statistics(series)), axis=-1)  # (G, 6)
    for index, row in enumerate(table):
        entry: dict[str, Any] = dict(zip(KEYS[1:], row.tolist(), strict=True))
        if proposals is not None:
            entry["proposal"] = proposals[index]
        details["objects"][str(index + 1)] = entry
    return Measured(np.append(table.sum(axis=0), count), details)
