"""Finished units of work: a note, written last, says what each was made from; it is taken over, made anew, or refused.

A unit is a video's masks, its frames or pseudo-labels, a packed data set, a count. "Unit" and not "cache": most are
results, of which nothing may be mixed with what was made otherwise.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dinoseg.utils.forms import Misshapen

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
