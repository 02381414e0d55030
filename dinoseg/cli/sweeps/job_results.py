"""Results of a sweep's jobs, each in a file of the sweep's folder, since jobs may run on other machines.

A job holds a lock from its start until its result is stored, so that jobs which outlive their sweep are detected.
"""

import atexit
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dinoseg.utils import forms, locks
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

_NOTE = {"words": forms.table(forms.text), "job": forms.whole(), "process": forms.whole(), "note": forms.text}
_ROW = forms.holding(**_NOTE, returned=forms.table(forms.number()))
_SWEEP = "sweep.own"
_OF_JOB = re.compile(r"\d+\.(json|own|given_up)")
_held: dict[Path, IO[str]] = {}


class JobResults:
    """Store for the jobs' files in a sweep's folder.

    Args:
        sweep: the folder.
    """

    def __init__(self, sweep: str | Path) -> None:
        self.folder = Path(sweep).absolute() / ".jobs"

    def take(self, *, takes_over: bool) -> bool:
        """Claim the folder for this process; return False if another sweep uses it.

        Args:
            takes_over: whether results of earlier jobs are reused, and these jobs may still be running.

        Raises:
            UserError: the folder is a link, which may lead to files of others.
        """
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a symbolic link. Remove it, or choose another hydra.sweep.dir.")
        if not _hold(self.folder / _SWEEP):
            return False
        jobs = [] if takes_over else [path for path in self.folder.iterdir() if _OF_JOB.fullmatch(path.name)]
        if not all(_hold(path) for path in jobs if path.suffix == ".own"):
            return False
        for path in jobs:
            path.unlink()
            _let_go(path)
        return True

    def leave(self, *, keep: bool) -> None:
        """Release the folder for other sweeps."""
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        _let_go(self.folder / _SWEEP)

    def begin(self, number: int) -> None:
        """Record that a job is running; exit if another job has replaced it."""
        _hold(self._lock_path(number))  # if this fails, another rank of the job holds the lock
        if self._given_up(number).exists():
            print("another job of the search has replaced this one, which waited too long", file=sys.stderr)
            sys.exit(0)

    def store(self, number: int, row: Mapping[str, Any]) -> None:
        """Store the result of a job and release its lock."""
        write_json(self.folder / f"{number}.json", row)
        _let_go(self._lock_path(number))

    def returned(self, number: int) -> dict[str, Any] | None:
        """Return a job's numbers, or its `error`, once it has ended; None if it stored no result.

        A job that is not running by then is marked as given up, and will not start.
        """
        held = locks.acquire(self._lock_path(number), wait=True)
        assert held is not None
        try:
            row = self._read(self.folder / f"{number}.json")
            if row is None:
                self._given_up(number).touch()
                return None
            return row["returned"] | ({"error": row["note"]} if row["note"] else {})
        finally:
            locks.release(held)

    def rows(self) -> list[dict[str, Any]]:
        """Return the stored results in the order of job numbers."""
        rows = [self._read(path) for path in self.folder.glob("*.json")]
        return sorted((row for row in rows if row is not None), key=lambda row: row["job"])

    def _lock_path(self, number: int) -> Path:
        return self.folder / f"{number}.own"

    def _given_up(self, number: int) -> Path:
        return self.folder / f"{number}.given_up"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return forms.read_json(path, _ROW)
        except FileNotFoundError:
            return None
        except forms.SchemaError as error:
            print(f"{path} is damaged ({error}): the result of this job is left out.", file=sys.stderr)
            return None


def _hold(path: Path) -> bool:
    """Lock a file until it is released or this process ends; return False if another process holds it."""
    if path not in _held:
        file = locks.acquire(path)
        if file is None:
            return False
        _held[path] = file
    return True


def _let_go(path: Path) -> None:
    if file := _held.pop(path, None):
        locks.release(file)


@atexit.register
def _end() -> None:
    """Release all locks when this process ends; remove the folder of a sweep without jobs."""
    for path, file in [*_held.items()]:
        empty = path.name == _SWEEP and not file.closed and [*path.parent.iterdir()] == [path]
        if empty:  # closed in a forked process
            shutil.rmtree(path.parent, ignore_errors=True)
        _let_go(path)
