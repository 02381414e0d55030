"""Warnings of words on the command line that the chosen mode or tracker does not read."""

import logging
import sys
from collections.abc import Collection
from pathlib import Path

from dinoseg.experiment.folder import last_command_line
from dinoseg.utils.wording import join_names, printable

logger = logging.getLogger(__name__)
# read by every mode, or settings of the machine
_FOR_ALL = ("mode", "hparam", "hydra", "local", "trust", "shared_cache", "engine")


def warn_unread(out_dir: Path, unread: Collection[str], reason: str) -> None:
    """Warn once of typed groups or keys without effect; settings of a recipe for other modes are no mistake.

    Args:
        out_dir: the run folder, which stores its command line.
        unread: groups such as `slots`, with all of their keys, and keys such as `tracker.short_side`.
        reason: sentence on who does not read them.
    """
    idle = [word for word in last_command_line(out_dir) if _within(_key(word), unread)]
    if idle:
        logger.warning("No effect here: %s. %s", join_names(idle), reason)


def warn_not_read(out_dir: Path, mode: str, reads: Collection[str] | None) -> None:
    """Warn once of typed keys that a mode never reads.

    Args:
        out_dir: the run folder, which stores its command line.
        mode: for the message, such as `mode=score`.
        reads: groups and keys that it reads in addition to its own; None: unknown, so there is no warning.
    """
    if reads is None:
        return
    idle = [
        word.removeprefix("++")  # added before keys of a checkpoint
        for word in last_command_line(out_dir)
        if not is_read(_key(word).partition("@")[0], (*_FOR_ALL, *reads))
    ]
    if idle:
        reason = f"In addition to its own keys, {mode} reads {', '.join(reads)}."
        # printed, not logged: a line in the log would preserve the folder of a run that fails at once
        print(printable(f"warning: No effect here: {join_names(idle)}. {reason}"), file=sys.stderr)


def _key(word: str) -> str:
    return word.lstrip("+~").split("=")[0].replace("/", ".")  # a nested group fills the key of its path


def is_read(key: str, names: Collection[str]) -> bool:
    """Return whether a key is one of these groups and keys, is below one, or is the group of one."""
    return _within(key, names) or any(name.startswith(f"{key}.") for name in names)


def _within(key: str, unread: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in unread)
