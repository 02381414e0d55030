"""What a benchmark's official scores are made of: cases to measure, sums over units, scores from sums; no torch."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.utils.errors import UserError


class BadFile(UserError):
    """A file that cannot be scored, and `more` of its case with their reasons; the run goes on to name them all."""

    def __init__(self, path: Path, reason: str, more: Sequence[tuple[Path, str]] = ()) -> None:
        super().__init__("\n".join(f"{file}: {why}" for file, why in ((path, reason), *more)))
        self.path, self.reason, self.more = path, reason, tuple(more)

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross from a worker process as it was raised."""
        return type(self), (self.path, self.reason, self.more)


@dataclass(frozen=True)
class Case:
    """What one worker measures at a time: the files of an image, or of a whole sequence where frames belong together.

    Args:
        name: unique among the cases, a relative path without suffix.
        unit: what it belongs to, a video, drive or image: units are resampled for the intervals.
        files: reference and prediction of each frame in order; None where there is no prediction.
    """

    name: str
    unit: str
    files: tuple[tuple[Path, Path | None], ...]


@dataclass
class Cases:
    """The cases below two folders, and what does not fit between these.

    Args:
        cases: in the order of their names.
        problems: file or folder and what is wrong with it: scoring stops, unless told to leave these out.
        notes: what is odd but changes no score, such as predictions without reference.
    """

    cases: list[Case]
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Measured:
    """What one case adds to its unit.

    Args:
        sums: (d,) int64 or float64, the protocol's own layout.
        details: plain numbers for the case's row of `per_image` or `per_video`, may be empty.
    """

    sums: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)


class ScoreProtocol(ABC):
    """A benchmark's official way of scoring, as a picklable object whose constructor takes its options.

    Every score must be a function of sums over units, so that resampling units gives intervals.
    """

    name: str
    unit: str  # video | sequence | drive | image
    keys: Sequence[str]  # of the scores, in the order of the table
    signed: Collection[str] = ()  # of the scores those that may lie outside 0..1
    highest: Mapping[str, float] = {}  # that a signed score can be, where it has a bound: its interval ends there
    rules: Mapping[str, Any]  # absent_class, resolution, ignore, version, and where the official script is wrong
    # of DAVIS, which scores in the order of its list: the folder of the masks that it scores against
    annotations: str | None = None
    max_proposals: int | None = None  # segments that a prediction may hold; None: any number

    @abstractmethod
    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return the cases of two folders laid out as the official tool expects.

        Raises:
            UserError: a folder is missing or holds nothing of the kind.
        """

    @abstractmethod
    def measure(self, case: Case) -> Measured:
        """Measure one case, in any process.

        Raises:
            BadFile: a file is unreadable, of another size than its reference, or holds ids that have no meaning.
        """

    def join(self, measured: Sequence[Measured]) -> np.ndarray:
        """Return a unit's sums (d,) from those of its cases in order: added up, for one count over the whole data."""
        return np.sum([one.sums for one in measured], axis=0)

    @abstractmethod
    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d) over units; nan where it is undefined."""

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return a row for each class from sums (d,) over all units, with `id` and `name`; empty without classes."""
        return []


class DatasetProtocol(ScoreProtocol):
    """A protocol that mode=eval can use too: it knows where a data set's prediction belongs, and its ids."""

    any_size: bool = False  # a prediction may have another size than its reference
    ending: str = ".png"  # of a prediction, after the data set's name of the image

    def unit_of(self, name: str) -> str:
        """Return what an image of a data set belongs to: by itself, a unit of its own."""
        return name

    def target(self, name: str) -> str:
        """Return the path of a prediction below its folder, for a data set's name of an image.

        Raises:
            UserError: the name is none of the benchmark's.
        """
        return f"{name}{self.ending}"

    def case(self, name: str, reference: Path, prediction: Path) -> Case:
        """Return the case of one image of a data set, whose prediction need not be there yet.

        Raises:
            BadFile: a file that belongs to the reference is missing.
        """
        return Case(name, self.unit_of(name), ((reference, prediction),))

    def file_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return predicted class ids 0..K-1 (H, W) uint8 as the ids that the benchmark's files hold."""
        return ids.astype(np.uint8, copy=False)
