"""Atomic files and folders: written next to their destination under a hidden name, then renamed.

The hidden name identifies the process: `.NAME.PROCESS-MACHINE-RANDOM.part`, or `.old` for a folder that is being
replaced. The next process on the same machine that writes to the same folder removes the leftovers of killed
processes, but not the files of running ones.
"""

import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any

from dinoseg.utils.errors import DISK_FULL

_HIDDEN = re.compile(
    r"\.(?P<name>.+)\.(?P<process>\d+)-(?P<machine>[0-9a-f]{6})-[0-9a-f]{8}\.(?P<kind>part|old)", re.DOTALL
)
_checked: set[Path] = set()  # folders that this process has written to


def create_cache_dir(cache_dir: Path) -> None:
    """Create the folder of cached data for its owner alone (mode 700); an existing folder keeps its permissions.

    Raises:
        OSError: if it cannot be created.
    """
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end; its folder is created if missing.

    On an exception it is removed, and an older file at `path` stays as it was.

    Raises:
        OSError: if it cannot be written; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = new_part(path)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        # a failing write to an open file names none
        if error.filename is None and error.errno in (*DISK_FULL, errno.EFBIG):
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` at the end, or removed on an exception."""
    with scratch_folder(folder.parent, folder.name) as part:
        old = part.with_suffix(".old")
        try:
            yield part
            if folder.exists():
                os.replace(folder, old)  # a non-empty folder cannot be replaced in one step
            os.replace(part, folder)
        finally:
            if old.exists() and not folder.exists():  # the second rename failed
                os.replace(old, folder)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder in `parent`, for this process alone; it is removed at the end.

    `parent` is created if missing.

    Raises:
        OSError: if it cannot be created.
    """
    parent.mkdir(parents=True, exist_ok=True)
    part = _hidden_name(parent / name)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def new_part(path: Path) -> Path:
    """Create an empty file with a hidden name next to `path`, for this process alone to write and rename.

    Raises:
        OSError: if it cannot be created.
    """
    part = _hidden_name(path)
    part.touch(exist_ok=False)
    return part


def _hidden_name(path: Path) -> Path:
    """Return a new hidden name next to `path`; on the first call in a folder, remove leftovers of killed processes."""
    folder = path.parent.absolute()
    if folder not in _checked:
        _checked.add(folder)
        _remove_dead(folder)
    return path.with_name(f".{path.name}.{os.getpid()}-{_machine()}-{secrets.token_hex(4)}.part")


def _remove_dead(folder: Path) -> None:
    """Remove the partial files of this machine's killed processes from a folder; ignore errors.

    A folder that was set aside for its replacement is renamed back, unless its name is taken.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _HIDDEN.fullmatch(name)
            if found and found["machine"] == _machine() and not _is_alive(int(found["process"])):
                if found["kind"] == "old" and not os.path.lexists(folder / found["name"]):
                    os.replace(folder / name, folder / found["name"])
                else:
                    _remove(folder / name)


def sync_to_disk(path: Path) -> None:
    """Flush a written file to the disk.

    Raises:
        OSError: if the disk does not accept it.
    """
    with open(path, "r+b") as file:  # Windows flushes through a writable handle only
        os.fsync(file.fileno())


def write_all(file: RawIOBase, data: memoryview) -> None:
    """Write all bytes, in several writes if needed: a disk that fills up accepts some before it raises an error."""
    while data:
        data = data[file.write(data) :]


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, and characters that UTF-8 cannot encode (of a file's name, for example) as escapes."""
    with atomic_file(Path(path)) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON.

    Raises:
        ValueError: if a number is not finite, which JSON cannot represent.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_alive(process: int) -> bool:
    """Return whether a process of this machine is running; an impossible process number counts as running."""
    import psutil

    with suppress(OverflowError):
        return psutil.pid_exists(process)
    return True


@functools.cache
def _machine() -> str:
    """Return an identifier of the host and, on Linux, the PID namespace in which process numbers are valid."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")  # containers have their own
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:6]
