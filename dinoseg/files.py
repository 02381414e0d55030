"""Folders searched for files, without going in circles; imports the standard library alone."""

import os
from collections.abc import Iterator
from pathlib import Path


def visible_files(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield `top` and every folder below it, each with the names of its files in order; hidden ones are left out.

    Links to folders are followed, unless they lead into a folder that lies above them: its files would be found
    again without end.
    """
    place = top.resolve()
    above = {str(top): frozenset(_identity(folder) for folder in (place, *place.parents))}
    for parent, folders, files in os.walk(top, followlinks=True):
        trail = above.pop(parent)
        kept = []
        for name in sorted(folders):
            path = os.path.join(parent, name)
            if not name.startswith(".") and (identity := _identity(path)) not in trail:
                above[path] = trail | {identity}
                kept.append(name)
        folders[:] = kept
        yield Path(parent), sorted(name for name in files if not name.startswith("."))


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
