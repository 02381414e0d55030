"""Files and folders that appear whole or not at all: written beside their place under a hidden name, then renamed.

The name tells the process: `.NAME.PROCESS-MACHINE-RANDOM.part`, and `.old` of a folder that is being replaced. What a
killed process leaves so is removed by the next one that writes to the same folder; what a living one writes stays.
The random digits and the exclusive creation keep other users of a shared folder from laying a link at that name.
"""

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

_HIDDEN = re.compile(
    r"\.(?P<name>.+)\.(?P<process>\d+)-(?P<machine>[0-9a-f]{6})-[0-9a-f]{8}\.(?P<kind>part|old)", re.DOTALL
)
_looked_at: set[Path] = set()  # folders that this process has written to


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path, in a folder that is made if need be; it takes the name `path` at the end.

    On an exception it vanishes, and an older file of that name stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = new_part(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name `folder` at the end, or vanishes on an exception."""
    with scratch_folder(folder.parent, folder.name) as part:
        old = part.with_suffix(".old")
        try:
            yield part
            if folder.exists():
                os.replace(folder, old)  # a folder that holds something cannot be replaced at once
            os.replace(part, folder)
        finally:
            if old.exists() and not folder.exists():  # something came between
                os.replace(old, folder)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give an empty hidden folder of this process's own in `parent`, made if need be; it is removed at the end.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    part = _hidden_name(parent / name)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def new_part(path: Path) -> Path:
    """Create an empty file of a hidden name beside `path`, for this process alone to write and rename.

    Raises:
        OSError: it cannot be created.
    """
    part = _hidden_name(path)
    with open(part, "xb", opener=open_no_link):
        return part


def open_no_link(path: str, flags: int) -> int:
    """Open a file for `open(opener=)`; refuse a symbolic link and wait for no pipe in its place, where that can be."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def _hidden_name(path: Path) -> Path:
    """Return a new hidden name beside `path`; the first time in a folder, remove what killed processes left there."""
    folder = path.parent.absolute()
    if folder not in _looked_at:
        _looked_at.add(folder)
        remove_dead(folder)
    return path.with_name(f".{path.name}.{os.getpid()}-{_machine()}-{secrets.token_hex(4)}.part")


def remove_dead(folder: Path) -> None:
    """Remove what killed processes of this machine have left half-written in a folder, as far as it can be.

    A folder that one had put aside to replace it gets its name back where nothing has that.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _HIDDEN.fullmatch(name)
            if found and found["machine"] == _machine() and not _is_alive(int(found["process"])):
                if found["kind"] == "old" and not os.path.lexists(folder / found["name"]):
                    os.replace(folder / name, folder / found["name"])
                else:
                    _remove(folder / name)


def remove_parts(folder: Path, *patterns: str) -> None:
    """Remove what killed processes have left half-written in a folder that no other one writes to, as far as it can be.

    Args:
        folder: searched.
        patterns: of the hidden names, such as `.*.part`.
    """
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        _remove(path)


def sync_to_disk(path: Path) -> None:
    """Flush a written file to the disk.

    Raises:
        OSError: the disk does not take it.
    """
    with open(path, "r+b") as file:  # Windows flushes through a writable handle only
        os.fsync(file.fileno())


def write_whole(file: RawIOBase, data: memoryview) -> None:
    """Write all bytes; a disk that fills up takes the first of them before it refuses."""
    while data:
        data = data[file.write(data) :]


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, what is none (a file's name may be) as escapes."""
    with whole_file(Path(path)) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON.

    Raises:
        ValueError: a number is not finite, which JSON cannot say.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_alive(process: int) -> bool:
    """Return whether a process of this machine runs; a number that no process can have counts as running."""
    import psutil

    with suppress(OverflowError):
        return psutil.pid_exists(process)
    return True


@functools.cache
def _machine() -> str:
    """Return a word for where a process's number means what it means here: the host, and Linux's space of numbers."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")  # of a container another one
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:6]
