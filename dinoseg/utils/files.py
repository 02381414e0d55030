"""Folders searched for files: nothing that may not be read is left out; imports the standard library alone."""

import glob
import os
import stat
import sys
from collections.abc import Collection, Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NoReturn

from dinoseg.utils.errors import UserError
from dinoseg.utils.natural_order import natural_order

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, in the order of the names, without what is hidden; nothing where there is none.

    Raises:
        UserError: the folder may not be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _refuse(error)


def found(source: str | PathLike[str], kinds: Collection[str]) -> list[Path]:
    """Return the files of some kinds directly in a folder, or those that a pattern matches: x2 before x10.

    What is hidden is left out.

    Args:
        source: a folder, or a pattern such as `a/**/*.png`; `~` is the user's home.
        kinds: suffixes in lower case, with their dot.

    Raises:
        UserError: the folder may not be read.
    """
    path = Path(source).expanduser()
    paths = entries(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = [each for each in paths if each.suffix.lower() in kinds and each.name[0] != "." and not each.is_dir()]
    return sorted(files, key=lambda each: natural_order(each.as_posix()))


def is_pattern(source: str | PathLike[str]) -> bool:
    """Return whether a text is a pattern of names, and not the very name of what is there."""
    return isinstance(source, str) and glob.has_magic(source) and not Path(source).expanduser().exists()


def is_name(text: str) -> bool:
    """Return whether a text names something in a folder itself, and nothing above or below it."""
    separators = "/\\:\0" if sys.platform == "win32" else "/\0"
    return text not in ("", ".", "..") and not {*separators} & {*text}


def check_regular(path: str | Path) -> None:
    """Refuse what is no file but, say, a named pipe: reading one may wait for ever.

    Raises:
        UserError: it is none.
        OSError: nothing is there, or it may not be looked at.
    """
    _check_kind(path, os.stat(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, and check that what was opened is one: it may have been replaced since a check.

    Raises:
        UserError: it is no file but, say, a pipe.
        OSError: nothing is there, or it cannot be read.
    """
    check_regular(path)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    try:
        _check_kind(path, os.fstat(file.fileno()))
    except UserError:
        file.close()
        raise
    return file


def _check_kind(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise UserError(f"{path} is a {kind}. Put a file there, or remove it.")


def visible_files(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield `top` and every folder below it, each with the names of its files in order; hidden ones are left out.

    Links to folders are followed, unless they lead into a folder that lies above them: its files would be found
    again without end.

    Raises:
        UserError: a folder may not be read.
    """
    real_top = top.resolve()
    above = {str(top): frozenset(_identity(folder) for folder in (real_top, *real_top.parents))}
    for parent, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        trail = above.pop(parent)
        followed = []
        for name in sorted(folders):
            path = os.path.join(parent, name)
            if not name.startswith(".") and (identity := _identity(path)) not in trail:
                above[path] = trail | {identity}
                followed.append(name)
        folders[:] = followed  # what os.walk goes into
        yield Path(parent), sorted(name for name in files if not name.startswith("."))


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        _refuse(error)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"Cannot read the folder {error.filename} ({error.strerror}), and nothing in it shall be left out unsaid. Let "
        "your user read it, or move it away."
    ) from error
