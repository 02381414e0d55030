"""Words of a command line that the chosen way of tracking does not read."""

import logging
from collections.abc import Collection
from pathlib import Path

from dinoseg.run_folder import command_line
from dinoseg.wording import listed

logger = logging.getLogger(__name__)


def warn_unread(out_dir: Path, unread: Collection[str], reason: str) -> None:
    """Warn once of what was typed for groups or keys without effect; what a recipe says for other modes is no mistake.

    Args:
        out_dir: the run folder, which keeps its command line.
        unread: groups such as `slots`, which stand for all of their keys, and keys such as `tracker.short`.
        reason: who does not read them.
    """
    idle = [word for word in command_line(out_dir) if _within(word.lstrip("+~").split("=")[0], unread)]
    if idle:
        logger.warning("No effect here: %s. %s", listed(idle), reason)


def _within(key: str, unread: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in unread)
