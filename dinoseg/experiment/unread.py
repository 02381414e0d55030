"""Words of a command line that the chosen mode, or its way of tracking, does not read."""

import logging
import sys
from collections.abc import Collection
from pathlib import Path

from dinoseg.experiment.folder import last_command_line
from dinoseg.utils.wording import listed, printable

logger = logging.getLogger(__name__)
# what every mode reads, and facts of the machine
_FOR_ALL = ("mode", "hparam", "hydra", "local", "trust", "shared_cache", "engine")


def warn_unread(out_dir: Path, unread: Collection[str], reason: str) -> None:
    """Warn once of what was typed for groups or keys without effect; what a recipe says for other modes is no mistake.

    Args:
        out_dir: the run folder, which keeps its command line.
        unread: groups such as `slots`, which stand for all of their keys, and keys such as `tracker.short`.
        reason: who does not read them.
    """
    idle = [word for word in last_command_line(out_dir) if _within(_key(word), unread)]
    if idle:
        logger.warning("No effect here: %s. %s", listed(idle), reason)


def warn_not_read(out_dir: Path, mode: str, reads: Collection[str] | None) -> None:
    """Warn once of what was typed for keys that a mode never reads.

    Args:
        out_dir: the run folder, which keeps its command line.
        mode: for the message, such as `mode=score`.
        reads: groups and keys that it reads beside its own; None: it does not say.
    """
    if reads is None:
        return
    idle = [
        word for word in last_command_line(out_dir) if not _is_read(_key(word).partition("@")[0], (*_FOR_ALL, *reads))
    ]
    if idle:
        said = f"No effect here: {listed(idle)}. Beside its own keys {mode} reads {', '.join(reads)}."
        # printed: a line in the log would keep the folder of a run that fails at once
        print(printable(f"warning: {said}"), file=sys.stderr)


def _key(word: str) -> str:
    return word.lstrip("+~").split("=")[0]


def _is_read(key: str, names: Collection[str]) -> bool:
    # a group that is typed is read where one of its keys is
    return _within(key, names) or any(name.startswith(f"{key}.") for name in names)


def _within(key: str, unread: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in unread)
