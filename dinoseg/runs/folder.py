"""The run folder of a job: claimed or entered, locked, and removed again if the job has done nothing."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from omegaconf import DictConfig, OmegaConf

from dinoseg.utils import locks
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular, is_sweep_folder

LOG = "run.log"  # created by the job that claims a folder, and locked by the one that writes to it
WORDS_FILE = "overrides.txt"  # in the config folders of a run: the words of a command, one per line
_new_folders: set[Path] = set()  # created by this process, Hydra's included: it may remove them again


class RunFolder:
    """Folder that a job writes to, and that no other process writes to until the job ends.

    A job claims a new folder, or enters one to resume its run. As a context manager, it releases the lock at the end.
    After a UserError it removes what the job has created if that did nothing else, and folders that are empty. Files
    of others and folders that existed before the process are never removed.

    Args:
        planned: the folder that the config names, which Hydra may have created.

    Attributes:
        path: where the job writes: `planned`, until it moves to another folder.
    """

    def __init__(self, planned: Path) -> None:
        self.path = self._planned = planned
        self._lock: IO[str] | None = None
        self._log: Path | None = None  # if this job has created it
        self._config: Path | None = None  # folder of this job's config

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            self._remove_unused()
        if error is not None:
            remove_empty(self.path)
        self.release()

    def claim(self, path: Path) -> None:
        """Create and lock a new folder; if another run or a sweep has claimed its name, try `_2`, `_3`, ... instead."""
        for number in count(1):
            folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
            if is_sweep_folder(folder):
                continue
            _create(folder)
            try:
                (folder / LOG).touch(exist_ok=False)
            except FileExistsError:
                continue
            self._log = folder / LOG
            self.enter(folder)
            return

    def enter(self, folder: Path, *, wait: float = 0.0, remedy: str = "start a new run without resume") -> None:
        """Write to a folder of exactly this name, and to the run that it may hold; see `try_to_enter`.

        Args:
            folder: created if missing.
            wait: seconds to wait for another process.
            remedy: what the user can do instead of waiting, for the message.

        Raises:
            UserError: another process is writing to it.
        """
        if not self.try_to_enter(folder, wait=wait):
            raise UserError(f"Another process is writing to {folder.resolve()}. Wait for it, or {remedy}.")

    def try_to_enter(self, folder: Path, *, wait: float = 0.0) -> bool:
        """Lock a folder; return False if another process holds it.

        Args:
            folder: created if missing.
            wait: seconds to wait for another process.
        """
        if self._lock is not None and folder.resolve() == self.path.resolve():
            return True
        self.release()  # a job holds one folder
        _create(folder)
        log = folder / LOG
        if log.exists():
            check_regular(log)
        else:
            self._log = log
        lock = locks.acquire(log, wait=wait)
        if lock is None:
            return False
        self._lock = lock
        self.move_to(folder)
        return True

    def move_to(self, folder: Path) -> None:
        """Write to a folder, which another rank may have locked; remove the planned one if it is another and empty."""
        self.path = folder
        if folder != self._planned:
            remove_empty(self._planned)

    def write_config(
        self, cfg: DictConfig | Mapping[str, Any], words: Sequence[str], *, restarts: bool = False
    ) -> Path:
        """Save config and command line in `config/`, or `config_2/`, ... when a run resumes; return that folder.

        Args:
            cfg: of the job.
            words: of its command line.
            restarts: whether to replace the config of a run that has saved nothing: others read how the run started.
        """
        paths = (self.path.absolute() / name for name in ("config", *(f"config_{each}" for each in range(2, 10_000))))
        folder = next(path for path in paths if not path.exists() or (restarts and (path / WORDS_FILE).is_file()))
        folder.mkdir(exist_ok=True)
        self._config = folder
        OmegaConf.save(cfg, folder / "config.yaml")
        # file names are bytes and need not be valid text
        (folder / WORDS_FILE).write_text("\n".join(words) + "\n", encoding="utf-8", errors="surrogateescape")
        return folder

    def release(self) -> None:
        """Release the lock, if this job holds it."""
        if self._lock is not None:
            locks.release(self._lock)
            self._lock = None

    def _remove_unused(self) -> None:
        """Remove log and config of this job if the folder holds nothing else; of a resumed run, its unused config."""
        with suppress(OSError):
            folder = self.path.absolute()
            created = {path.absolute() for path in (self._log, self._config) if path is not None}
            if set(folder.iterdir()) <= created and not (folder / LOG).stat().st_size:
                shutil.rmtree(folder / "config", ignore_errors=True)
                (folder / LOG).unlink()
            elif self._config is not None and self._config.name != "config" and not self._has_newer_files():
                shutil.rmtree(self._config)

    def _has_newer_files(self) -> bool:
        """Return whether the folder holds files, apart from the log, that are newer than this job's config."""
        assert self._config is not None
        start = self._config.stat().st_mtime_ns
        files = (path for path in self.path.absolute().rglob("*") if path.name != LOG and path.is_file())
        return any(path.stat().st_mtime_ns >= start for path in files if path.parent != self._config)


def command_line(folder: Path) -> list[str]:
    """Return the words of the command that started a run; empty if none is stored."""
    return _read_words(folder / "config" / WORDS_FILE)


def command_lines(folder: Path) -> list[list[str]]:
    """Return the words of the command that started a run, and of those that resumed it, oldest first."""
    files = sorted(folder.glob(f"config*/{WORDS_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    return [_read_words(path) for path in files]


def last_command_line(folder: Path) -> list[str]:
    """Return the words of the newest command in a folder: the one that started or last resumed the run."""
    return next(reversed(command_lines(folder)), [])


def find_typed_keys(folder: Path) -> set[str]:
    """Return the keys and groups that the newest command in a folder sets."""
    return {word.partition("=")[0].lstrip("+") for word in last_command_line(folder)}


def _read_words(path: Path) -> list[str]:
    if not path.is_file():
        return []
    # not splitlines: a word may hold other line separators
    lines = path.read_bytes().decode(errors="replace").split("\n")
    return [word for word in lines if word]


def has_results(folder: Path) -> bool:
    """Return whether a run folder holds more than its log and config."""
    return any(path.name != LOG and not path.name.startswith("config") for path in folder.glob("*"))


def record_new_folders(folder: Path) -> None:
    """Record which folders the creation of `folder` will add: those that existed before are never removed."""
    folder = folder.absolute()
    with suppress(OSError):  # an invalid path: its creation raises the error
        _new_folders.update(path for path in (folder, *folder.parents) if not path.exists())


def remove_empty(folder: Path) -> None:
    """Remove a run folder if it is empty, and its parents that were created for it and are empty now."""
    folder = folder.absolute()
    with suppress(OSError):  # not empty, or already removed
        for path in (folder, *folder.parents):
            if _new_folders.isdisjoint((path, *path.parents)):
                return
            path.rmdir()


def _create(folder: Path) -> None:
    record_new_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
