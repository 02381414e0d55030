"""Results and inputs of the doctor's checks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dinoseg.data.classes.masks import Masks
from dinoseg.data.scan.measure import Record

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Result of a check that a user should know about.

    There is one scale of severity. An error makes training impossible or its scores worthless, and mode=doctor ends
    with exit status 1. Training stops on an error too, unless only the user can judge it (`stops` is False): an
    official split may share videos between its sides. Training warns of such errors if it detects them; it scans masks
    only.

    Args:
        severity: `error`, `warning` (needs a check by the user) or `note` (information).
        code: short name that does not change between versions.
        message: the finding, with its number.
        files: all files, or pairs of files, that it concerns.
        remedy: how to fix it.
        look: split and name of some pairs for which a figure is helpful.
        reasons: fault of each of `files`, if they differ; each names its file.
        stops: of an error: whether training stops on it.
    """

    severity: str
    code: str
    message: str
    files: tuple[str, ...] = ()
    remedy: str = ""
    look: tuple[tuple[str, str], ...] = ()
    reasons: tuple[str, ...] = ()
    stops: bool = True

    @property
    def lines(self) -> tuple[str, ...]:
        """Return one line per file."""
        return self.reasons or self.files


@dataclass(frozen=True)
class ScannedSplit:
    """Records of a split, with the classes and mask rules of its reader.

    `check_labels` maps all scanned splits to errors of their labels that only their reader can know.
    """

    split: str
    records: Sequence[Record]
    classes: Sequence[str]
    palette: Sequence[tuple[int, int, int]]
    ignore_index: int
    masks: Masks
    split_local_names: bool = False  # see `PairDataset`
    has_layers: bool = False  # see `PairDataset`
    check_labels: Callable[[Sequence["ScannedSplit"]], Iterable[Finding]] | None = None

    @property
    def counts(self) -> np.ndarray:
        """Return labelled pixels (K,) int64 of each class."""
        return self._all_counts()[: len(self.classes)] * self._is_class()

    @property
    def void(self) -> int:
        """Return the number of ignored pixels."""
        return int(self._all_counts()[self.ignore_index])

    @property
    def num_labelled(self) -> int:
        """Return the number of labelled pixels; of layers, of those of all classes together."""
        return sum(self.count_labelled(record) for record in self.records if record.mask_digest)

    def count_labelled(self, record: Record) -> int:
        """Return the number of labelled pixels of a mask that was read."""
        ignored = record.pixels.get(self.ignore_index, 0)
        if not self.has_layers:
            return sum(record.pixels.values()) - ignored
        # masks with problems are counted as they are, others at the size of their image
        height, width = (not record.problems and record.image_size) or record.mask_size or (0, 0)
        return len(self.classes) * height * width - ignored

    def _all_counts(self) -> np.ndarray:
        return sum((record.counts for record in self.records), np.zeros(256, dtype=np.int64))

    def _is_class(self) -> np.ndarray:
        return (np.arange(len(self.classes)) != self.ignore_index).astype(np.int64)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return errors first, then warnings, then notes, each in their original order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def share(part: float, whole: float) -> str:
    """Return a share in percent with one decimal."""
    return f"{100 * part / whole:.1f} %" if whole else "none"
