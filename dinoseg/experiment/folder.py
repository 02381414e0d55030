"""Run folders: claiming, locking, saved configs and command lines, and removal of empty ones."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from omegaconf import DictConfig, OmegaConf

from dinoseg.utils import locks
from dinoseg.utils.atomic import remove_dead, remove_parts
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular

LOG = "run.log"
_TYPED = "overrides.txt"
_LONGEST = 2**18  # maximum bytes of a command: twice Linux's limit of one word; the folder may be untrusted
_run_locks: dict[Path, IO[str]] = {}  # locks are held until the process ends
_made_paths: set[Path] = set()  # folders and logs created by this process, which it may remove again


def will_make(folder: Path) -> None:
    """Record which folders the creation of `folder` will add; folders that existed before are never removed."""
    folder = folder.absolute()
    with suppress(OSError):  # an invalid path: its creation raises the error
        _made_paths.update(path for path in (folder, *folder.parents) if not path.exists())


def claim(out_dir: Path) -> Path:
    """Create and lock a new run folder; if another run has claimed it, try `_2`, `_3`, ... instead."""
    for number in range(1, 1000):
        folder = out_dir if number == 1 else out_dir.with_name(f"{out_dir.name}_{number}")
        will_make(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / LOG).touch(exist_ok=False)
        except FileExistsError:
            remove_dead(folder)  # partial files of a killed export may be as large as its model
            continue
        _made_paths.add((folder / LOG).absolute())
        lock(folder)
        return folder
    raise UserError(f"{out_dir} and its 998 numbered variants exist. Remove old runs.")


def enter_within(folder: Path) -> None:
    """Create or reuse a run folder within a run folder, and lock it."""
    will_make(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).touch()
    lock(folder, instead="train the other heads separately")
    drop_parts(folder)


def lock(folder: Path, *, instead: str = "start a new run without resume") -> None:
    """Make this process the only one that writes to a run folder, until it ends.

    Args:
        folder: the run folder.
        instead: what the user can do instead of waiting, for the message.

    Raises:
        UserError: another process is writing to it.
    """
    folder = folder.resolve()
    if folder in _run_locks:
        return
    with suppress(FileNotFoundError):
        check_regular(folder / LOG)
    file = locks.acquire(folder / LOG)
    if file is None:
        raise UserError(f"Another process is writing to {folder}. Wait for it, or {instead}.")
    _run_locks[folder] = file


def release(folder: Path) -> None:
    """Release the locks of a run folder and of those within it."""
    for held in [path for path in _run_locks if path.is_relative_to(folder.resolve())]:
        locks.release(_run_locks.pop(held))


def is_locked(folder: Path) -> bool:
    """Return whether another process is writing to a run folder."""
    if folder.resolve() in _run_locks or not (folder / LOG).is_file():
        return False
    file = locks.acquire(folder / LOG)
    if file is not None:
        locks.release(file)
    return file is None


def drop_empty(folder: Path) -> None:
    """Remove a run folder if it is empty, and its parents that were created for it and are empty now."""
    folder = folder.absolute()
    with suppress(OSError):  # not empty, or already removed
        for path in (folder, *folder.parents):
            if _made_paths.isdisjoint((path, *path.parents)):
                return
            path.rmdir()


def first_ranks(folder: Path, share: Callable[[str], str]) -> Path:
    """Return the run folder of rank 0, in which all ranks work, and remove this rank's own if it is another.

    Hydra creates a folder for each rank of an external launcher, named by the second in which the rank starts.

    Args:
        folder: the run folder of this rank.
        share: broadcasts a value from rank 0.
    """
    first = Path(share(str(folder)))
    if first != folder:
        drop_empty(folder)
    return first


def drop_bare(folder: Path) -> None:
    """Remove the folder of a run that ended before it did anything: it holds only an empty log and its config."""
    folder = folder.absolute()
    with suppress(OSError):
        contents = set(folder.iterdir())
        if contents <= _made_paths and not (folder / LOG).stat().st_size:
            for path in contents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    drop_empty(folder)


def has_results(folder: Path) -> bool:
    """Return whether a run folder holds more than its log and config."""
    return any(path.name != LOG and not path.name.startswith("config") for path in folder.glob("*"))


def write_config(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> None:
    """Save the composed config and the command line in `config/`, or in `config_2/`, ... when a run resumes."""
    names = ("config", *(f"config_{number}" for number in range(2, 10_000)))
    folder = next(out_dir.absolute() / name for name in names if not (out_dir / name).exists())
    folder.mkdir()
    _made_paths.add(folder)
    OmegaConf.save(cfg, folder / "config.yaml")
    # file names are bytes and need not be valid text
    (folder / _TYPED).write_text("\n".join(overrides) + "\n", encoding="utf-8", errors="surrogateescape")


def command_line(folder: Path) -> list[str]:
    """Return the words of the command that started a run; empty if none is stored or its file is too large."""
    return _words(folder / "config" / _TYPED)


def last_command_line(folder: Path) -> list[str]:
    """Return the words of the newest command in a folder: the one that started or last resumed the run."""
    newest = max(folder.glob(f"config*/{_TYPED}"), key=lambda path: path.stat().st_mtime_ns, default=None)
    return [] if newest is None else _words(newest)


def _words(path: Path) -> list[str]:
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return []
    # not splitlines: a word may hold other line separators
    lines = path.read_bytes().decode(errors="replace").split("\n")
    return [word for word in lines if word]


def drop_parts(folder: Path) -> None:
    """Remove partial files that a killed process left in a run folder; the folder must be locked."""
    remove_parts(folder, ".*.part", "checkpoints/.*.part", "checkpoints/.tmp??????")  # .tmp: written by safetensors
