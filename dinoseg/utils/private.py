"""Folders whose content is read back without question: their owner has to be the user, and nobody else may write."""

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
_LEVELS = 2  # below the folder, that are checked


def check_private(folder: Path, key: str) -> None:
    """Refuse a folder that other users may write to; a group that has the user's own name holds nobody else.

    A missing folder is created for its user alone where the umask would let others write to it. A folder that nobody
    else can enter, by its own permissions or by those of a folder above it, is private whatever it holds. Where the
    file system stores neither owners nor permissions (a mounted Windows disk), this is printed and the run continues.

    Args:
        folder: root may own it, too.
        key: the config key that names it.

    Raises:
        UserError: others may write to it or to an entry one or two levels below, naming the remedy.
    """
    if sys.platform == "win32":  # permissions there are lists that Python does not read
        return
    with suppress(OSError):  # what cannot be made or read here fails where it is used, or is optional there
        if not folder.exists():
            if _umask() & _WRITABLE != _WRITABLE:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return
        if _is_shielded(folder):
            return
        trusted = _trusted(folder)
        for path in (folder, *_entries(folder, _LEVELS)):
            if others := _writers(path, trusted):
                break
        else:
            return
        if not _stores_permissions(folder):
            said = f"{key}={folder}: its file system does not tell who may write there. Only you should be able to."
            print(printable(f"{said} shared_cache=true confirms it."), file=sys.stderr)
            return
        below = "" if path == folder else f" (to {path.relative_to(folder)})"
        raise UserError(
            f"{key}={folder}: {others} may write there{below}, and so choose what this run reads back. Take that right "
            f"away (chmod -R go-w, or chmod 700), give a folder of your own ({key}=~/.cache/dinoseg), or say "
            "shared_cache=true if you trust everybody who may write there."
        )


def _is_shielded(folder: Path) -> bool:
    """Return whether nobody else can enter a folder or one of those above it."""
    own = folder.resolve()
    trusted = _trusted(folder)
    return any(
        not _others(path, _ENTERABLE) for path in (own, *own.parents) if path.is_dir() and path.stat().st_uid in trusted
    )


def _entries(folder: Path, levels: int) -> Iterator[Path]:
    """Yield what so many levels below a folder hold; links are not followed."""
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return
    for path in paths:
        if not path.is_symlink():
            yield path
            if levels > 1:
                yield from _entries(path, levels - 1)


def _trusted(folder: Path) -> set[int]:
    """Return the owners whose folder it may be; for root the owner of the project too, as in a container."""
    user = _user()
    return {0, user} if user else {0, folder.resolve().parent.stat().st_uid}


def _writers(path: Path, trusted: set[int]) -> str:
    """Return who beside this user and root may write to a path; "" for nobody."""
    try:
        owner = path.lstat().st_uid
        return f"user {_user_name(owner)}, who owns it," if owner not in trusted else _others(path, _WRITABLE)
    except FileNotFoundError:  # a temporary file of another run
        return ""


def _others(path: Path, rights: int) -> str:
    """Return who beside the owner has one of these rights to a path; "" for nobody."""
    status = path.lstat()
    if status.st_mode & rights & stat.S_IRWXO:
        return "every user of this machine"
    if not status.st_mode & rights & stat.S_IRWXG:
        return ""
    if _has_list(path):
        return "whoever its access control list names (getfacl)"
    group, user = _group(status.st_gid), _user_name(_user())
    is_own = group[0] in ("root", user) and not set(group[1]) - {"root", user}
    return "" if is_own else f"the group {group[0]}"


def _has_list(path: Path) -> bool:
    """Return whether an access control list of POSIX names further users or groups."""
    if sys.platform != "linux":
        return False
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _stores_permissions(folder: Path) -> bool:
    """Return whether a file that is made in a folder has the owner and the permissions that it is made with."""
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
    """Return the name of a group and the users that are listed as its members."""
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
