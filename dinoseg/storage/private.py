"""Folders whose content is read back without question: their owner has to be the user, and nobody else may write."""

import os
import stat
import sys
from pathlib import Path

from dinoseg.errors import UserError

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def check_private(folder: Path, key: str) -> None:
    """Refuse a folder that other users may write to; a group that has the user's own name holds nobody else.

    A folder that is not there is made for its user alone where the umask would let others write to it.

    Args:
        folder: root may own it, too.
        key: the config key that names it.

    Raises:
        UserError: others may write to it, naming the remedy.
    """
    if not folder.exists():
        if _umask() & _WRITABLE != _WRITABLE:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    if others := _writers(folder.stat()):
        raise UserError(
            f"{key}={folder}: {others} may write there, and so choose what this run reads back. Give a folder of your "
            f"own ({key}=~/.cache/dinoseg), take that right away (chmod go-w), or say shared_cache=true if you trust "
            "everybody who may write there."
        )


def _writers(status: os.stat_result) -> str:
    """Return who beside this user and root may write to a folder; "" for nobody."""
    if sys.platform == "win32":
        return ""  # permissions there are lists that Python does not read
    if status.st_uid not in (0, os.geteuid()):
        return f"user {_user_name(status.st_uid)}, who owns it,"
    if status.st_mode & stat.S_IWOTH:
        return "every user of this machine"
    group = _group_name(status.st_gid)
    if status.st_mode & stat.S_IWGRP and group not in ("root", _user_name(os.geteuid())):
        return f"the group {group}"
    return ""


def _user_name(number: int) -> str:
    if sys.platform == "win32":
        return str(number)
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group_name(number: int) -> str:
    if sys.platform == "win32":
        return str(number)
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
