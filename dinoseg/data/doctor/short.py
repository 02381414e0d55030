"""The short form, before training: masks only, what stops a run as one error, the rest in a few lines."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoseg.data.doctor.checks_classes import check_classes
from dinoseg.data.doctor.checks_files import check_files
from dinoseg.data.doctor.checks_splits import check_groups
from dinoseg.data.doctor.examine import scanned
from dinoseg.data.doctor.findings import Finding, Scanned, by_severity
from dinoseg.data.scan import reasons, scan, unreadable
from dinoseg.data.wording import listed
from dinoseg.errors import UserError

log = logging.getLogger(__name__)

_FULL = "mode=doctor with the same data= shows all of it."


def check(
    train: Any,
    val: Any,
    *,
    cache_dir: str | Path,
    workers: int = 2,
    group: str | None = None,
    data_name: str = "",
) -> None:
    """Scan the masks of both splits (kept in `cache_dir`) and warn of what looks wrong.

    A data set that is no pairs of files is left alone.

    Raises:
        UserError: what would stop the run later, or leave nothing to learn.
    """
    splits = []
    for split, data in (("train", train), ("val", val)):
        if not hasattr(data, "pairs") or not hasattr(data, "reader"):
            return
        records = scan(data.pairs, data.reader, images=False, workers=workers, cache_dir=cache_dir)
        splits.append(scanned(split, data, records))
    found = brief(splits, group=group, data_name=data_name)
    for finding in found:
        if finding.severity == "warning":
            log.warning("data: %s%s", finding.message, _some(finding))
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:
        lines = "".join(f"\n- {error.message}{_some(error)} {error.remedy}" for error in errors)
        bad = {name: reason for part in splits for name, reason in unreadable(part.records).items()}
        files = f"\nPair by pair:{reasons(bad)}" if bad else ""
        raise UserError(f"The data cannot be trained on as they are:{lines}{files}\n{_FULL}")


def brief(splits: list[Scanned], *, group: str | None = None, data_name: str = "") -> list[Finding]:
    """Return what the quick checks find, errors first.

    A video on both sides is a warning here: it spoils the score, but some official splits are like that.
    """
    groups = [replace(finding, severity="warning") for finding in check_groups(splits, group)]
    return by_severity([*check_files(splits), *check_classes(splits, data_name), *groups])


def _some(finding: Finding) -> str:
    return f" ({listed(finding.files, 3)})" if finding.files else ""
