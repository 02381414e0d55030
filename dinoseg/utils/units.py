"""Finished units of work: a note, written last, records the inputs of each; a unit is reused, made again, or refused.

A unit is a video's masks or its frames, a packed data set, a count. It is a "unit" and not a "cache" because most are
results, which must not be mixed with results made otherwise.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dinoseg.utils.forms import SchemaError

T = TypeVar("T")
KEY_LENGTH = 32
logger = logging.getLogger(__name__)


def read_valid_note(
    note: Path,
    read: Callable[[Path], T],
    is_valid: Callable[[T], bool] = lambda content: True,
    *,
    damaged: str = "",
    unfit: str = "",
) -> T | None:
    """Return the content of a unit's note if the unit can be reused, None if it has to be made.

    A unit without a note was never finished and needs no warning: the note is written last, and atomically.

    Args:
        note: the file.
        read: returns the validated content of the note.
        is_valid: whether the unit is complete and was made from the current inputs.
        damaged: warning about a note that cannot be read, with `%s` for the note and `%s` for the reason; empty: none.
        unfit: warning about a unit that does not fit; empty: none.
    """
    try:
        content = read(note)
        if is_valid(content):
            return content
    except FileNotFoundError:
        return None
    except (OSError, SchemaError) as error:
        if damaged:
            logger.warning(damaged, note, error)
        return None
    if unfit:
        logger.warning("%s", unfit)
    return None


def hash_of(*parts: object) -> str:
    """Return a hash of the inputs of a unit: numbers, strings, and tuples of them."""
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:KEY_LENGTH]
