"""What jobs of a sweep tell of themselves, each in a file of the sweep's folder: they may run on other machines.

A job holds a lock from its start until it has told, so that one which outlives its sweep is known.
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


class Told:
    """The files in a sweep's folder.

    Args:
        sweep: the folder.
    """

    def __init__(self, sweep: str | Path) -> None:
        self.folder = Path(sweep).absolute() / ".jobs"

    def take(self, *, takes_over: bool) -> bool:
        """Make the folder this process's own; False: another one sweeps there.

        Args:
            takes_over: whether what earlier jobs have told is kept, and they may still be at work.

        Raises:
            UserError: the folder is a link, behind which files of others may lie.
        """
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link to another folder. Remove it, or give another hydra.sweep.dir.")
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
        """Let others sweep there."""
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        _let_go(self.folder / _SWEEP)

    def begin(self, number: int) -> None:
        """Say that a job is at work; one that another has taken the place of ends here."""
        _hold(self._own(number))  # where it cannot be, another rank of the job does
        if self._given_up(number).exists():
            print("another job of the search has taken the place of this one, which waited too long", file=sys.stderr)
            sys.exit(0)

    def tell(self, number: int, row: Mapping[str, Any]) -> None:
        """Keep what a job says at its end."""
        write_json(self.folder / f"{number}.json", row)
        _let_go(self._own(number))

    def returned(self, number: int) -> dict[str, Any] | None:
        """Return the numbers of a job's result, or its `error`, once it has ended; None: it never told.

        One that is not at work will not begin any more.
        """
        held = locks.acquire(self._own(number), wait=True)
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
        """Return what jobs have told, by their numbers."""
        rows = [self._read(path) for path in self.folder.glob("*.json")]
        return sorted((row for row in rows if row is not None), key=lambda row: row["job"])

    def _own(self, number: int) -> Path:
        return self.folder / f"{number}.own"

    def _given_up(self, number: int) -> Path:
        return self.folder / f"{number}.given_up"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return forms.read_json(path, _ROW)
        except FileNotFoundError:
            return None
        except forms.Misshapen as error:
            print(f"{path} is damaged ({error}): what this job told is left out.", file=sys.stderr)
            return None


def _hold(path: Path) -> bool:
    """Lock a file until this process lets go or ends; False: another one has it."""
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
    """Let go of what this process has when it ends; a sweep that came to no job leaves no folder."""
    for path, file in [*_held.items()]:
        empty = path.name == _SWEEP and not file.closed and [*path.parent.iterdir()] == [path]
        if empty:  # of a process that was forked it is closed
            shutil.rmtree(path.parent, ignore_errors=True)
        _let_go(path)
