"""A run's own folder: claimed, locked while it is written to, with its log and its config."""

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TextIO, cast

from omegaconf import DictConfig, OmegaConf

from dinoseg.errors import UserError
from dinoseg.wording import Printable, printable

LOG = "run.log"
_held: dict[Path, IO[str]] = {}  # locks last as long as the process


def claim(out_dir: Path) -> Path:
    """Make a new run folder this process's own; one that another run has claimed is left alone, and `_2`, ... taken."""
    for number in range(1, 1000):
        folder = out_dir if number == 1 else out_dir.with_name(f"{out_dir.name}_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / LOG).touch(exist_ok=False)
        except FileExistsError:
            continue
        lock(folder)
        return folder
    raise UserError(f"{out_dir} and 998 folders beside it are taken. Remove old runs.")


def lock(folder: Path) -> None:
    """Make this process the only one that writes to a run folder, until it ends.

    Raises:
        UserError: another process does.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    file = open(folder / LOG, "a")
    if not _try_lock(file):
        file.close()
        raise UserError(
            f"Another process is writing to {folder}. Wait for it, or start a run of its own without resume."
        )
    _held[folder] = file


def release(folder: Path) -> None:
    """Let others write to a run folder again."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def is_locked(folder: Path) -> bool:
    """Return whether another process writes to a run folder."""
    if folder.resolve() in _held or not (folder / LOG).exists():
        return False
    with open(folder / LOG, "a") as file:
        return not _try_lock(file)


def _try_lock(file: IO[str]) -> bool:
    if os.name != "posix":
        return True  # no advisory locks there: nothing is checked
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def configure_log(folder: Path | None) -> None:
    """Send the log to the terminal and the run folder's `run.log`; without a folder (other ranks) only warnings."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / LOG, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: not every terminal shows every letter
    if not isinstance(sys.stdout, Printable):
        sys.stdout = cast(TextIO, Printable(sys.stdout))  # what is printed names files, too
    logging.basicConfig(
        level=logging.WARNING if folder is None else logging.INFO,
        handlers=handlers,
        force=True,
    )
    for noisy in ("httpx", "accelerate", "transformers", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def drop_empty(folder: Path) -> None:
    """Remove a run folder that nothing was written to, and the two above it if that leaves them empty."""
    for path in (folder, *folder.parents[:2]):
        if not path.is_dir() or any(path.iterdir()):
            return
        path.rmdir()


def drop_bare(folder: Path) -> None:
    """Remove the folder of a run that ended before it did anything: an empty log and its config are all there is."""
    log = folder / LOG
    if {path.name for path in folder.iterdir()} <= {LOG, "config"} and log.is_file() and log.stat().st_size == 0:
        shutil.rmtree(folder / "config", ignore_errors=True)
        log.unlink()
        drop_empty(folder)


def write_config(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> None:
    """Keep the composed config and the command line in `config/`, those of a continuation in `config_2/`, ..."""
    number = len(list(out_dir.glob("config*"))) + 1
    folder = out_dir / ("config" if number == 1 else f"config_{number}")
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml")
    (folder / "overrides.txt").write_text("\n".join(overrides) + "\n")


def command_line(folder: Path) -> list[str]:
    """Return the words of the command that began a run; none where the folder keeps no config."""
    path = folder / "config" / "overrides.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
