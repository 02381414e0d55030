"""Building blocks of official scores: cases to measure, and scores from sums over units or from rows; no torch."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import Counts, RowMetric
from dinoseg.utils.errors import UserError


class BadFile(UserError):
    """A file that cannot be scored; its case is left out, and the run continues to name those of other cases."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with all its arguments, so that a worker process can pass it on unchanged."""
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class ScoringCase:
    """Unit of work: the files of an image, or of a whole sequence if its frames belong together.

    Args:
        name: relative path without suffix, unique among the cases.
        unit: the video, drive or image of the case, whose sums the protocol joins.
        files: reference and prediction of each frame in order; None for a missing prediction.
    """

    name: str
    unit: str
    files: tuple[tuple[Path, Path | None], ...]


@dataclass
class Cases:
    """Cases of two folders, and everything that does not fit between the folders.

    Args:
        cases: in the order of their names.
        problems: file or folder and its defect: scoring stops, unless these are to be left out.
        notes: oddities that change no score, such as predictions without reference.
    """

    cases: list[ScoringCase]
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Measured:
    """Contribution of one case to its unit.

    Args:
        sums: (d,) int64 or float64, in the protocol's own layout.
        details: plain numbers for the case's row of `per_image` or `per_video`; may be empty.
        rows: of a `RowProtocol`.
    """

    sums: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)
    rows: Counts = field(default_factory=dict)


class ScoreProtocol(ABC):
    """Base class of official scoring protocols: picklable objects whose constructors take the options.

    Inherit `SumProtocol` or `RowProtocol`, which say what the scores are computed from.
    """

    name: str
    unit: str  # video | sequence | drive | image
    group: str | None = None  # regular expression of names whose units vary together; None: each unit varies alone
    keys: Sequence[str]  # names of the scores, in the order of the table
    unbounded: Collection[str] = ()  # names of scores that may lie outside 0..1
    highest: Mapping[str, float] = {}  # upper bounds of unbounded scores, where their intervals end
    rules: Mapping[str, Any]  # absent_class, resolution, ignore, version, and errors of the official script
    # DAVIS only, which scores in the order of its list: folder of the reference masks
    annotations: str | None = None
    max_proposals: int | None = None  # maximum segments of a prediction; None: unlimited
    has_layers: bool = False  # whether each class has masks of its own, as with task=multilabel

    @abstractmethod
    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return the cases of two folders laid out as the official tool expects.

        Raises:
            UserError: a folder is missing or has no suitable file.
        """

    @abstractmethod
    def measure(self, case: ScoringCase) -> Measured:
        """Measure one case, in any process.

        Raises:
            BadFile: a file is unreadable, of another size than its reference, or holds invalid ids.
        """

    def join(self, measured: Sequence[Measured]) -> np.ndarray:
        """Return a unit's sums (d,) from those of its cases in order; by default their sum, for pooled counts."""
        return np.sum([one.sums for one in measured], axis=0)


class SumProtocol(ScoreProtocol):
    """Base class of protocols whose scores are functions of sums over units: leaving out units gives intervals."""

    @abstractmethod
    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d) over units; nan where undefined."""

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return a row per class, with `id` and `name`, from sums (d,) over all units; empty without classes."""
        return []


class RowProtocol(ScoreProtocol):
    """Base class of protocols whose scores no sums determine, such as AP. Each case is a unit, and returns `rows`.

    The sums of a unit only state whether it counts: units whose sums are 0 say nothing about a score.

    Attributes:
        metric: computes the scores from the rows of all units.
    """

    metric: RowMetric

    @abstractmethod
    def per_class(self, rows: Sequence[Counts]) -> list[dict[str, Any]]:
        """Return a row per class, with `id` and `name`, from the rows of all units; empty without classes."""


class DatasetProtocol(SumProtocol):
    """Base class of protocols that mode=eval supports: they map image names and class ids to the benchmark's files."""

    any_size: bool = False  # whether a prediction may differ in size from its reference
    ending: str = ".png"  # suffix of a prediction file, after the image name

    def unit_of(self, name: str) -> str:
        """Return the unit of an image of a data set; by default, each image is its own unit."""
        return name

    def target(self, name: str) -> str:
        """Return the path of a prediction below its folder, for an image name of the data set.

        Raises:
            UserError: the name does not follow the benchmark's scheme.
        """
        return f"{name}{self.ending}"

    def case(self, name: str, reference: Path, prediction: Path) -> ScoringCase:
        """Return the case of one image of a data set, whose prediction need not exist yet.

        Raises:
            BadFile: a file that belongs to the reference is missing.
        """
        return ScoringCase(name, self.unit_of(name), ((reference, prediction),))

    def file_ids(self, ids: np.ndarray) -> np.ndarray:
        """Convert predicted class ids 0..K-1 (H, W) uint8 to the ids of the benchmark's files."""
        return ids.astype(np.uint8, copy=False)
