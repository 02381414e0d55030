"""Label maps of IDD by a faulty conversion of its polygons, which lost road: how they are found, and the advice."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dinoseg.data.checks.findings import Finding, ScannedSplit
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

_NAMES, _MAX_FILES = "*_gtFine_labelIds.png", 200  # the spelling of Cityscapes; files checked at most
_LOST = {0, 3}  # road and rail track at level 3


def check_home_made(splits: Sequence[ScannedSplit], *, on_purpose: bool) -> Iterator[Finding]:
    """Yield a finding of label maps of level 3 that are all without road and rail track.

    Args:
        splits: the scanned splits.
        on_purpose: whether such labels were chosen, so that training does not stop.
    """
    records = [record for part in splits for record in part.records]
    values = {value for record in records for value in record.raw}  # of the files, before `data.reader.masks.ids`
    if values and not values & set(map(str, _LOST)):
        yield report_home_made([record.mask for record in records], on_purpose=on_purpose)


def report_home_made(files: Sequence[str], *, on_purpose: bool) -> Finding:
    """Return the finding that a faulty conversion has removed road from label maps."""
    return Finding(
        "error",
        "home_made_idd",
        "No label map holds 0 (road) or 3 (rail track): these labels look home-made or remapped. In IDD 255 is void "
        "(unlabelled, ego vehicle, out of the region), not road, and road is 0. A model trained on these labels never "
        "predicts road; with 255 read as road, it learns void as road.",
        tuple(files),
        "Make the label maps again from the polygon files: mode=prepare data=idd.",
        stops=not on_purpose,
    )


def home_made_files(root: Path) -> list[str]:
    """Return the label maps of a faulty conversion in an IDD tree: named otherwise, and without any 0 or 3."""
    files = list(islice(sorted(root.rglob(_NAMES)), _MAX_FILES))
    values: set[int] = set()
    for path in files:
        try:
            values |= set(np.unique(read_ids(path)).tolist())
        except UserError:
            continue
    return [str(path) for path in files] if values and not values & _LOST else []
