"""The exception for mistakes that the user can fix, and the translation of file-system errors into it."""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dinoseg.utils.wording import printable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # `errno` of an OSError where freeing space and running again helps
_REMEDIES = {  # for errors of files and disks; others, such as a network's, pass unchanged
    DISK_FULL: "Free some space and run it again: complete files are unchanged.",
    (errno.EFBIG,): "Raise the limit of a file's size (`ulimit -f`), or choose a folder on another file system.",
    (errno.EACCES, errno.EPERM, errno.EROFS): "Give your user read and write permission, or choose another folder.",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ESTALE): (
        "Check that path: another program may have removed or replaced it, or it is another kind of file."
    ),
    (errno.ENAMETOOLONG,): "Choose a shorter path.",
    (errno.EIO, errno.ENXIO, errno.ENODEV): "Check that disk.",
    (errno.EMFILE, errno.ENFILE): "Raise the limit of open files (`ulimit -n`) or use fewer workers.",
}
_NO_HOME = "Could not determine home directory."  # message of pathlib's expanduser, which names no path


class UserError(ValueError):
    """A mistake in the input that the user can fix: shown as one message, without a traceback.

    The message names the value, the rule that it breaks and the remedy. Its text is `printable`, whatever a file is
    called.

    Examples:
        >>> import dinoseg
        >>> try:
        ...     dinoseg.list_heads(config_dir="nowhere")
        ... except dinoseg.UserError as error:
        ...     print(error)
        config_dir=nowhere is not a folder. Give the folder that holds your config groups.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class Unfit(Exception):
    """Error for an image that cannot be used; the text continues a sentence that begins with its name."""


class NoMode(UserError):
    """A command line without a mode."""


class UnknownOption(UserError):
    """An option that a config group lacks.

    Attributes:
        group: the config group.
        option: as given.
    """

    def __init__(self, message: str, *, group: str = "", option: str = "") -> None:
        super().__init__(message)  # alone, since an error that is sent to another process is made of it
        self.group = group
        self.option = option


class KeyMistake(UserError):
    """A mistake in one key of the config.

    Attributes:
        key: its full name.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class UnknownKey(KeyMistake):
    """A key that the composed config lacks."""


class KeyNotSet(KeyMistake):
    """A key without a value that the job needs."""


@contextmanager
def name_parameters(names: Mapping[str, str]) -> Iterator[None]:
    """Replace names of parameters in the message of a UserError, such as `rank=0` by the config key `adapter.rank=0`.

    A name is replaced at the start of the message, and anywhere before `=`; in `arch.depth=3` only the first part is a
    parameter.

    Args:
        names: maps each parameter to what the reader sets.
    """
    try:
        yield
    except UserError as error:
        known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))  # `cut.stride` before `cut`
        found = rf"(?<![\w.])({known})(?=(?:\.\w+)*=)|^({known})(?!\w)"
        if names:
            error.args = (re.sub(found, lambda match: names[match[1] or match[2]], str(error)),)
        raise


class KilledProcess(UserError):
    """Error that a process which worked for this one was killed."""


class WaitEnded(UserError):
    """Error that a wait has reached its limit, or has ended because a stop was requested."""


@contextmanager
def file_errors_as_user_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors about files and disks into messages; other errors pass unchanged.

    Args:
        folder: the run folder, named where the system names no file.

    Raises:
        UserError: if a file or disk fails; the message names the file, the problem and the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error) != _NO_HOME:
            raise
        raise UserError("A path starts with ~ and the name of an unknown user. Write the full path.") from error
    except OSError as error:
        remedy = next((remedy for numbers, remedy in _REMEDIES.items() if error.errno in numbers), None)
        if remedy is None:
            raise
        name = error.filename2 or error.filename
        file = name if isinstance(name, str) else f"a file (the folder of the run is {folder})"
        reason = error.strerror
        if error.errno in DISK_FULL:
            reason = f"{reason}; {free_space(Path(file) if error.filename else folder)} there"
        raise UserError(f"Cannot read or write {file}: {reason}. {remedy}") from error


def free_space(path: Path) -> str:
    """Return the free space on the disk of a path, in words; the path need not exist."""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return f"{shutil.disk_usage(there).free / 2**20:.0f} MiB are free"
