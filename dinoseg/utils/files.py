"""File search that raises on unreadable folders instead of skipping them, and checks of paths."""

import errno
import glob
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol, TextIO

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import suggest_nearest

Stamp = tuple[int, int, int, int]
PACKAGED = "dinoseg:"  # in front of the name of a file that ships inside the package
PICKLED = (".pth", ".pt", ".bin")  # PyTorch's own format; other files of weights are read as safetensors
WEIGHT_SUFFIXES = (".safetensors", *PICKLED)  # other names of weights may be those of a hub
ROOT_REMEDY = "Give the folder that holds the dataset."
RUN_REMEDY = "Give a run folder or a checkpoint file; your runs are below outputs/."
# natsort, called folder by folder, sorts ASCII names in the same way and no faster; it sorts whole paths
# and other scripts' digits differently, and the order of frames must not depend on a library's version
_NUMBER = re.compile(r"([0-9]+)")
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def entries(folder: Path) -> list[Path]:
    """Return the visible entries of a folder, sorted by name; an empty list if there is no folder.

    Raises:
        UserError: if the folder may not be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _refuse(error)


def expand_path(source: str | PathLike[str], suffix: str) -> Path:
    """Return a path with `~` expanded; `dinoseg:NAME` is a file of the package with this suffix, such as `.jpg`."""
    name = os.fspath(source)
    if name.startswith(PACKAGED):
        # a checkpoint of strangers may name such a file, and no other one
        return Path(__file__).parents[1] / "assets" / f"{Path(name.removeprefix(PACKAGED)).name}{suffix}"
    return Path(name).expanduser()


def find_files(source: str | PathLike[str], kinds: Collection[str]) -> list[Path]:
    """Return the files with some suffixes in a folder or matched by a pattern, in natural order: x2 before x10.

    Hidden files are left out.

    Args:
        source: a folder, or a pattern such as `a/**/*.png`; `~` is the user's home.
        kinds: suffixes in lower case, with their dot.

    Raises:
        UserError: if the folder may not be read.
    """
    path = Path(source).expanduser()
    paths = entries(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = [each for each in paths if each.suffix.lower() in kinds and each.name[0] != "." and not each.is_dir()]
    return sorted(files, key=lambda each: natural_order(each.as_posix()))


def natural_order(name: str) -> tuple:
    """Return a key for natural order, frame2 before frame10: folder by folder, with runs of digits as numbers."""
    parts = tuple(
        tuple(int(piece) if index % 2 else piece for index, piece in enumerate(_NUMBER.split(part)))
        for part in name.split("/")
    )
    return parts, name  # tie-break: 01 and 1 are the same number


def is_pattern(source: str | PathLike[str]) -> bool:
    """Return whether a text is a glob pattern, and not the name of an existing file or folder."""
    return isinstance(source, str) and glob.has_magic(source) and not Path(source).expanduser().exists()


def is_name(text: str) -> bool:
    """Return whether a text names an entry directly in a folder, without any folder above or below it."""
    separators = "/\\:\0" if sys.platform == "win32" else "/\0"
    return text not in ("", ".", "..") and not {*separators} & {*text}


def path_exists(text: str) -> bool:
    """Return whether a text is the path of a file or folder that exists."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown home directory, or invalid characters
        return False


def check_exists(source: str | PathLike[str], key: str, remedy: str, *, suffix: str = "") -> None:
    """Refuse a path at which nothing exists.

    Args:
        source: the path as given, see `expand_path`.
        key: the config key of the path, for the message.
        remedy: last sentence of the message.
        suffix: of packaged files.

    Raises:
        UserError: nothing is there; the message suggests similar entries of its folder.
        PermissionError: its folder is closed to this user.
    """
    path = expand_path(source, suffix)
    try:
        path.stat()
        return
    except PermissionError:
        raise
    except (OSError, ValueError):  # missing, too long, or with invalid characters
        pass
    word, there = str(path), [str(each) for each in path.parent.glob("*")]
    if str(source).startswith(PACKAGED):
        word, there = str(source), [f"{PACKAGED}{each.stem}" for each in path.parent.glob(f"*{suffix}")]
    nearest = suggest_nearest(word, there, f"{key}=")
    raise UserError(f"{key}={source}: file or folder not found.{nearest} {remedy}")


def check_file(path: Path, key: str) -> None:
    """Refuse a path that is no file.

    Raises:
        UserError: if there is no file; the message names `key`, the config key of the path.
    """
    if not path.is_file():
        raise UserError(f"{key}={path}: file not found. Check the path.")


def is_sweep_folder(folder: Path) -> bool:
    """Return whether Hydra has written the jobs of a sweep to a folder."""
    return (folder / "multirun.yaml").is_file()


def check_regular(path: str | Path) -> None:
    """Refuse a path that is no regular file: reading a named pipe, for example, may block forever.

    Raises:
        UserError: if it is no regular file.
        OSError: if the file is missing or its status cannot be read.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise UserError(f"{path} is a {kind}. Put a file there, or remove it.")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        UserError: if it is no regular file, but a pipe, for example.
        OSError: if the file is missing or cannot be read.
    """
    check_regular(path)
    return open(path, "rb")


def open_to_append(path: Path) -> TextIO:
    """Open a regular file for appending text, created if missing; a link is refused.

    In a shared folder, a link may lead to a file of the user that nobody meant to change.

    Raises:
        OSError: if it is a link or no regular file, or cannot be written.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | no_link, 0o666))


def visible_files(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield `top` and every folder below it, each with the sorted names of its files; hidden ones are left out.

    Links to folders are followed, unless they lead to a folder above them: its files would be found again and again.

    Raises:
        UserError: if a folder may not be read.
    """
    real_top = top.resolve()
    above = {str(top): frozenset([real_top, *real_top.parents])}
    for parent, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        trail = above.pop(parent)
        followed = []
        for name in sorted(folders):
            path = os.path.join(parent, name)
            real_path = Path(path).resolve()
            if not name.startswith(".") and real_path not in trail:
                above[path] = trail | {real_path}
                followed.append(name)
        folders[:] = followed  # the folders that os.walk enters
        yield Path(parent), sorted(name for name in files if not name.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"Cannot read the folder {error.filename} ({error.strerror}), and its files must not be skipped silently. Give "
        "your user read permission, or move it away."
    ) from error


class HasStatus(Protocol):
    """A path, or another object with the status of a file."""

    def stat(self) -> os.stat_result:
        """Return the file's status."""
        ...


def stamp(file: HasStatus) -> Stamp | None:
    """Return size, modification time, status-change time and inode of a file; None if it does not exist.

    Size and modification time are equal for files that were unpacked or copied with their times; the other two are not.
    """
    try:
        status = file.stat()
    except (OSError, ValueError):  # also of a name that no file can have
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
