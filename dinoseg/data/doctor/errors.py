"""Errors of a dataset, which stop a training; they are found by its masks and the headers of its images."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.masks import Masks
from dinoseg.data.custom import CustomDataset
from dinoseg.data.doctor.checks.classes import check_classes
from dinoseg.data.doctor.checks.files import check_files
from dinoseg.data.doctor.checks.splits import check_groups, check_same_files
from dinoseg.data.doctor.findings import Finding, Scanned, by_severity
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.measure import Record
from dinoseg.data.scan.scan import scan
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names, one_line, printable

log = logging.getLogger(__name__)

_FULL = "mode=doctor with the same data= shows the full report."
_SHOWN = 20  # most files listed per error, each with its reason


def scanned(split: str, dataset: PairDataset | CustomDataset, records: Sequence[Record]) -> Scanned:
    """Return a split's records together with the classes and mask rules of its reader."""
    masks = dataset.reader.masks if isinstance(dataset, PairDataset) else Masks()
    return Scanned(
        *(split, records, dataset.classes, dataset.palette, dataset.ignore_index, masks),
        split_local_names=dataset.split_local_names,
    )


def find_errors(splits: Sequence[Scanned], *, data_name: str = "", group: str | None = None) -> list[Finding]:
    """Return what stops a training or makes its scores worthless, errors first.

    Args:
        splits: one or more splits with the same class table.
        data_name: the option of `data=`.
        group: regular expression on the name that gives an image's group; None: the name's first folder.
    """
    findings = [*check_files(splits), *check_classes(splits, data_name)]
    return by_severity([*findings, *check_same_files(splits), *check_groups(splits, group)])


def check_for_errors(
    train: SegmentationData,
    val: SegmentationData,
    *,
    cache_dir: str | Path,
    workers: int = 2,
    group: str | None = None,
    data_name: str = "",
) -> list[Scanned]:
    """Refuse data with errors; return the records of both splits' masks, which are cached in `cache_dir`.

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
