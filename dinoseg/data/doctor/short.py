"""Check of the data before a training: scans masks only, and raises the errors that mode=doctor reports."""

import logging
from pathlib import Path

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.doctor.examine import find_errors, scanned
from dinoseg.data.doctor.findings import Finding, Scanned
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.scan import scan
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names, one_line, printable

log = logging.getLogger(__name__)

_FULL = "mode=doctor with the same data= shows the full report."
_SHOWN = 20  # most files listed per error, each with its reason


def check(
    train: SegmentationData,
    val: SegmentationData,
    *,
    cache_dir: str | Path,
    workers: int = 2,
    group: str | None = None,
    data_name: str = "",
) -> list[Scanned]:
    """Scan the masks of both splits and return the records, which are cached in `cache_dir`.

    Errors that only the user can judge, such as a video in both splits, are logged as warnings. Datasets other than
    `PairDataset` are not checked.

    Raises:
        UserError: a problem would stop the run later, or leaves no labels to train on.
    """
    splits: list[Scanned] = []
    for split, data in (("train", train), ("val", val)):
        if not isinstance(data, PairDataset):
            return []
        records = scan(data.pairs, data.reader, images=False, workers=workers, cache_dir=cache_dir)
        splits.append(scanned(split, data, records))
    errors = []
    for finding in find_errors(splits, data_name=data_name, group=group):
        if finding.severity == "error" and finding.stops:
            errors.append(finding)
            continue
        files = f" ({join_names(finding.files, 3)})" if finding.files else ""
        log.warning("data: %s", printable(f"{finding.message}{files} {finding.remedy}".rstrip()))
    if errors:
        messages = "".join(f"\n- {error.message}{_each(error)}\n  {error.remedy}".rstrip() for error in errors)
        raise UserError(printable(f"The dataset has errors that stop a training:{messages}\n{_FULL}"))
    return splits


def _each(finding: Finding) -> str:
    lines = "".join(f"\n    {one_line(line)}" for line in finding.lines[:_SHOWN])
    more = len(finding.lines) - _SHOWN
    return lines + (f"\n    and {more} more" if more > 0 else "")
