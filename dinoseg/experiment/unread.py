"""Warnings of typed keys whose effect depends on the checkpoint: a mode composes no other keys without effect."""

import logging
from collections.abc import Collection
from pathlib import Path

from dinoseg.experiment.folder import last_command_line
from dinoseg.utils.wording import join_names, printable

logger = logging.getLogger(__name__)


def warn_unread(out_dir: Path, unread: Collection[str], reason: str) -> None:
    """Warn once of typed groups or keys without effect; settings of a recipe for other modes are no mistake.

    Args:
        out_dir: the run folder, which stores its command line.
        unread: groups such as `slots`, with all of their keys, and keys such as `tracker.short_side`.
        reason: sentence on who does not read them.
    """
    idle = [word for word in last_command_line(out_dir) if _is_below(_key(word), unread)]
    if idle:
        logger.warning("No effect here: %s. %s", printable(join_names(idle)), reason)


def _key(word: str) -> str:
    return word.lstrip("+~").split("=")[0].replace("/", ".")  # a nested group fills the key of its path


def _is_below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
