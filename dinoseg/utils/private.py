"""Permission check of folders that are trusted when read back: the user owns them, and no other user may write."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import printable

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_ENTERABLE = stat.S_IXGRP | stat.S_IXOTH
_LEVELS = 2  # levels below the folder that are checked


def check_private(folder: Path, key: str) -> None:
    """Refuse a folder that other users may write to.

    A group with the user's own name and no other members is allowed. A missing folder is created with mode 700 where
    the umask would let others write to it. A folder that other users cannot enter, by its own permissions or those of
    a folder above it, is private whatever it holds. On file systems that store neither owners nor permissions (a
    mounted Windows disk), a warning is printed and the run continues.

    Args:
        folder: root may own it, too.
        key: the config key that names it.

    Raises:
        UserError: if others may write to the folder or to an entry one or two levels below; the message gives a remedy.
    """
    if sys.platform == "win32":  # Windows has access control lists, which Python does not read
        return
    with suppress(OSError):  # an inaccessible folder fails where it is used, or is optional there
        if not folder.exists():
            if _umask() & _WRITABLE != _WRITABLE:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return
        if _is_shielded(folder):
            return
        trusted = _trusted_owners(folder)
        for path in (folder, *_entries(folder, _LEVELS)):
            if others := _writers(path, trusted):
                break
        else:
            return
        if not _stores_permissions(folder):
            message = (
                f"{key}={folder}: its file system does not store permissions. Only you should be able to write there."
            )
            print(printable(f"{message} shared_cache=true confirms it."), file=sys.stderr)
            return
        below = "" if path == folder else f" (to {path.relative_to(folder)})"
        raise UserError(
            f"{key}={folder}: {others} may write there{below}, and could change the data that this run reads back. "
            "Remove the write permission (chmod -R go-w, or chmod 700), use a private folder "
            f"({key}=~/.cache/dinoseg), or set shared_cache=true if you trust everyone who may write there."
        )


def _is_shielded(folder: Path) -> bool:
    """Return whether other users cannot enter a folder or one of those above it."""
    resolved = folder.resolve()
    trusted = _trusted_owners(folder)
    return any(
        not _others(path, _ENTERABLE)
        for path in (resolved, *resolved.parents)
        if path.is_dir() and path.stat().st_uid in trusted
    )


def _entries(folder: Path, levels: int) -> Iterator[Path]:
    """Yield the entries down to `levels` levels below a folder, without following links."""
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return
    for path in paths:
        if not path.is_symlink():
            yield path
            if levels > 1:
                yield from _entries(path, levels - 1)


def _trusted_owners(folder: Path) -> set[int]:
    """Return the user ids that may own a folder; for root also the owner of its parent folder, as in a container."""
    user = _user()
    return {0, user} if user else {0, folder.resolve().parent.stat().st_uid}


def _writers(path: Path, trusted: set[int]) -> str:
    """Return who may write to a path, apart from this user and root; "" for no one."""
    try:
        owner = path.lstat().st_uid
        return f"user {_user_name(owner)}, who owns it," if owner not in trusted else _others(path, _WRITABLE)
    except FileNotFoundError:  # a temporary file of another run
        return ""


def _others(path: Path, rights: int) -> str:
    """Return who has one of these rights to a path, apart from its owner; "" for no one."""
    status = path.lstat()
    if status.st_mode & rights & stat.S_IRWXO:
        return "every user of this machine"
    if not status.st_mode & rights & stat.S_IRWXG:
        return ""
    if _has_list(path):
        return "every user in its access control list (getfacl)"
    group, user = _group(status.st_gid), _user_name(_user())
    is_trusted = group[0] in ("root", user) and not set(group[1]) - {"root", user}
    return "" if is_trusted else f"the group {group[0]}"


def _has_list(path: Path) -> bool:
    """Return whether a POSIX access control list names further users or groups."""
    if sys.platform != "linux":
        return False
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _stores_permissions(folder: Path) -> bool:
    """Return whether a new file in a folder has the owner and the permissions with which it is created."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            status = os.fstat(file.fileno())
    except OSError:
        return True
    return status.st_uid == _user() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _user() -> int:
    if sys.platform == "win32":
        return 0
    return os.geteuid()


def _user_name(number: int) -> str:
    if sys.platform == "win32":
        return str(number)
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> tuple[str, list[str]]:
    """Return the name of a group and its listed members."""
    if sys.platform == "win32":
        return str(number), []
    import grp

    try:
        found = grp.getgrgid(number)
    except KeyError:
        return str(number), []
    return found.gr_name, found.gr_mem


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
