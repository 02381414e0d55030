"""Files and folders that appear whole or not at all: written beside their place under a hidden name, then renamed.

What a killed process leaves behind under such a name ends in `.part` (of a folder that was being replaced, `.old`).
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path, in a folder that is made if need be; it takes the name `path` at the end.

    On an exception it vanishes, and an older file of that name stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process alone: a killed run's process may live on for a moment, and write to its own
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name `folder` at the end, or vanishes on an exception."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        yield part
        if folder.exists():
            os.replace(folder, old)  # a folder that holds something cannot be replaced at once
        os.replace(part, folder)
    finally:
        if old.exists() and not folder.exists():  # something came between
            os.replace(old, folder)
        for left in (old, part):
            shutil.rmtree(left, ignore_errors=True)


def remove_parts(folder: Path, *patterns: str) -> None:
    """Remove what killed processes have left half-written in a folder that no other one writes to, as far as it can be.

    Args:
        folder: searched.
        patterns: of the hidden names, such as `.*.part`.
    """
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


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
