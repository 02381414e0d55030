"""Results of a sweep's jobs, each in a file of the sweep's folder, since jobs may run on other machines."""

import atexit
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from dinoseg.utils import forms, locks
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

_NOTE: dict[str, forms.Form] = {
    "words": forms.table(forms.text),
    "job": forms.whole(),
    "process": forms.whole(),
    "note": forms.text,
}
_ROW = forms.object_with(**_NOTE, returned=forms.table(forms.number()), further=forms.list_of(forms.text))
_LOCK = "sweep.own"
_held: dict[Path, IO[str]] = {}  # locks of this process, by folder


def describe_runs(sweep: Path, best: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line with the folder of the jobs, and one with how to use those of the best row."""
    folders = {str(job["job"]): Path(job["run"]) for job in jobs if job.get("run")}
    # as short as the sweep's own folder was given
    runs = {
        number: str(sweep / path.name if path.parent.resolve() == sweep.resolve() else path)
        for number, path in folders.items()
    }
    of_best = [runs[number] for number in str(best["job"]).split(",") if number in runs]
    value = f"[{','.join(of_best)}]" if len(of_best) > 1 else "".join(of_best)
    return [f"runs: {sweep}/JOB", *([f"best: {shlex.quote(f'resume={value}')}"] if of_best else [])]


def find_swept_keys(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of the command line that differ between jobs."""
    words = [job["words"] for job in jobs]
    return [key for key in dict.fromkeys(chain(*words)) if len({of_job.get(key) for of_job in words}) > 1]


def list_runs(jobs: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> list[tuple[dict[str, str], Path]]:
    """Return the values of the swept keys, and the run folder, of each job that has ended well."""
    return [({key: job["words"].get(key, "") for key in swept}, Path(job["run"])) for job in jobs if job.get("run")]


class JobResults:
    """Store for the jobs' files in a sweep's folder.

    Args:
        sweep: the folder.
    """

    def __init__(self, sweep: str | Path) -> None:
        self.folder = Path(sweep).absolute() / ".jobs"

    def claim(self, *, keep: bool) -> bool:
        """Lock the folder until `release`; return False if another sweep uses it.

        Args:
            keep: whether to reuse the results of earlier jobs; else they are removed.

        Raises:
            UserError: the folder is a link, which may lead to files of others.
        """
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a symbolic link. Remove it, or choose another hydra.sweep.dir.")
        # an interrupted sweep of this process keeps its lock
        lock = _held.get(self.folder) or locks.acquire(self.folder / _LOCK)
        if lock is None:
            return False
        _held[self.folder] = lock
        for path in [] if keep else self._files():
            path.unlink()
        return True

    def release(self, *, keep: bool) -> None:
        """Unlock the folder, and remove it unless a later search reads its results."""
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        if lock := _held.pop(self.folder, None):
            locks.release(lock)

    def store(self, number: int, row: Mapping[str, Any]) -> None:
        """Store the result of a job."""
        write_json(self.folder / f"{number}.json", row)

    def rows(self) -> list[dict[str, Any]]:
        """Return the stored results in the order of job numbers, without damaged files, which are reported."""
        rows = []
        for path in self._files():
            try:
                rows.append(forms.read_json(path, _ROW))
            except forms.SchemaError as error:
                print(f"{path} is damaged ({error}): the result of this job is left out.", file=sys.stderr)
        return sorted(rows, key=lambda row: row["job"])

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.json") if path.stem.isdecimal()]


@atexit.register
def _release_all() -> None:
    """Release the locks of this process, and remove the folders of sweeps that end before their first job."""
    for folder, lock in _held.items():
        if [path.name for path in folder.glob("*")] == [_LOCK]:
            shutil.rmtree(folder, ignore_errors=True)
        locks.release(lock)
