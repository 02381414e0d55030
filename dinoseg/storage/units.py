"""Finished units of work: a note, written last, says what each was made from; it is taken over, made anew, or refused.

A unit is a video's masks, its frames or pseudo-labels, a packed data set, a count. "Unit" and not "cache": most are
results, of which nothing may be mixed with what was made otherwise.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dinoseg.errors import UserError
from dinoseg.storage.forms import Misshapen, as_read_back

T = TypeVar("T")
logger = logging.getLogger(__name__)


def finished(
    note: Path,
    read: Callable[[Path], T],
    fits: Callable[[T], bool] = lambda content: True,
    *,
    damaged: str = "",
    unfit: str = "",
) -> T | None:
    """Return what the note of a unit says where the unit is taken over, None where it is to be made.

    One without a note was never finished, which needs no word: the note is written last, and at once.

    Args:
        note: the file.
        read: gives what it says, held against its form.
        fits: whether the unit is whole, and made from what it would be made from now.
        damaged: warning of a unit that cannot be read, with `%s` for the note and `%s` for the reason; empty: none.
        unfit: warning of a unit that does not fit; empty: none.
    """
    try:
        content = read(note)
        if fits(content):
            return content
    except FileNotFoundError:
        return None
    except (OSError, Misshapen) as error:
        if damaged:
            logger.warning(damaged, note, error)
        return None
    if unfit:
        logger.warning("%s", unfit)
    return None


def check_same_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings than it was begun with: its results would be of two kinds.

    Args:
        folder: of the run.
        before: its settings, as they were read back.
        now: those of this run.

    Raises:
        UserError: naming each setting that differs.
    """
    were, are = dict(_flat(before)), dict(_flat(as_read_back(now)))
    differing = [
        f"{name} was {were.get(name, 'not set')} and is {are.get(name, 'not set')}"
        for name in sorted(were.keys() | are.keys())
        if were.get(name) != are.get(name)
    ]
    if differing:
        raise UserError(
            f"mode.restart={folder}: other settings than that run's: {'; '.join(differing)}. Give what it had (its "
            f"command line is in {folder / 'config' / 'overrides.txt'}), or begin anew without mode.restart."
        )


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
