"""File of the names of a run's training and validation samples."""

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.units import read_valid_note
from dinoseg.utils.wording import join_names

logger = logging.getLogger(__name__)
OUTSIDE = "unlabelled/"  # begins the names of images without masks that are not of the data set


def write_split(out_dir: Path, split: Mapping[str, Sequence[str]]) -> None:
    """Write split.json; if the names differ from before, warn and save the former list as split_1.json and so on."""
    path = out_dir / "split.json"
    before = _read_split(path) if path.exists() else None
    if before is not None and before != split:
        former = next(name for name in map("split_{}.json".format, count(1)) if not (out_dir / name).exists())
        os.replace(path, out_dir / former)
        changes = "; ".join(_change(side, before.get(side, []), split.get(side, [])) for side in {**before, **split})
        logger.warning(
            "The data has changed since this run started (%s). The resumed run differs from an uninterrupted one, and "
            "scores on other validation data are not comparable. The previous list is saved in %s.",
            changes,
            out_dir / former,
        )
    write_json(path, split)


def _read_split(path: Path) -> dict[str, list[str]] | None:
    return read_valid_note(
        path,
        lambda path: forms.read_json(path, forms.table(forms.list_of(forms.text))),
        damaged="%s is damaged (%s): cannot check whether the data has changed since this run started.",
    )


def _change(side: str, before: Sequence[str], now: Sequence[str]) -> str:
    added, removed = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    if not added and not removed:
        return f"{side}: {'the same' if list(before) == list(now) else 'the same in another order'}"
    named = [
        f"{len(names)} {what} ({join_names(names, 3)})"
        for what, names in (("added", added), ("removed", removed))
        if names
    ]
    return f"{side}: {', '.join(named)}"
