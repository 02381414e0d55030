"""A run's own folder: claimed, locked while it is written to, with its config; and removed where it stayed empty."""

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
_LONGEST = 2**18  # bytes of a command: twice what one word may have on Linux; the folder may be a stranger's
_run_locks: dict[Path, IO[str]] = {}  # locks last as long as the process
_made_paths: set[Path] = set()  # folders and logs that this process has made, and so may remove again


def will_make(folder: Path) -> None:
    """Note which folders come into being with `folder`: what was there before is never removed."""
    folder = folder.absolute()
    with suppress(OSError):  # a path that cannot be: making it will say so
        _made_paths.update(path for path in (folder, *folder.parents) if not path.exists())


def claim(out_dir: Path) -> Path:
    """Make a new run folder this process's own; one that another run has claimed is left alone, and `_2`, ... taken."""
    for number in range(1, 1000):
        folder = out_dir if number == 1 else out_dir.with_name(f"{out_dir.name}_{number}")
        will_make(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / LOG).touch(exist_ok=False)
        except FileExistsError:
            remove_dead(folder)  # which may be as large as the model that a killed export was writing
            continue
        _made_paths.add((folder / LOG).absolute())
        lock(folder)
        return folder
    raise UserError(f"{out_dir} and 998 folders beside it are taken. Remove old runs.")


def enter_within(folder: Path) -> None:
    """Make a folder within a run folder a run folder of its own, or take it as it is, and lock it."""
    will_make(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).touch()
    lock(folder, instead="go on with the other heads by themselves")
    drop_parts(folder)


def lock(folder: Path, *, instead: str = "start a run of its own without resume") -> None:
    """Make this process the only one that writes to a run folder, until it ends.

    Args:
        folder: of the run.
        instead: what its user can do beside waiting.

    Raises:
        UserError: another process does.
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
    """Let others write again to a run folder, and to those within it."""
    for held in [path for path in _run_locks if path.is_relative_to(folder.resolve())]:
        locks.release(_run_locks.pop(held))


def is_locked(folder: Path) -> bool:
    """Return whether another process writes to a run folder."""
    if folder.resolve() in _run_locks or not (folder / LOG).is_file():
        return False
    file = locks.acquire(folder / LOG)
    if file is not None:
        locks.release(file)
    return file is None


def drop_empty(folder: Path) -> None:
    """Remove a run folder that nothing was written to, and those above it that were made for it and are empty now."""
    folder = folder.absolute()
    with suppress(OSError):  # it is not empty, or not there any more
        for path in (folder, *folder.parents):
            if _made_paths.isdisjoint((path, *path.parents)):
                return
            path.rmdir()


def first_ranks(folder: Path, share: Callable[[str], str]) -> Path:
    """Return the run folder of the first rank, in which all work, and drop this rank's own, if it is another.

    Hydra names and makes one for each rank that others have started, by the second in which it starts.

    Args:
        folder: as this rank knows it.
        share: returns what the first rank gives it.
    """
    first = Path(share(str(folder)))
    if first != folder:
        drop_empty(folder)
    return first


def drop_bare(folder: Path) -> None:
    """Remove the folder of a run that ended before it did anything: an empty log and its config are all there is."""
    folder = folder.absolute()
    with suppress(OSError):
        contents = set(folder.iterdir())
        if contents <= _made_paths and not (folder / LOG).stat().st_size:
            for path in contents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    drop_empty(folder)


def has_results(folder: Path) -> bool:
    """Return whether a run folder holds more than its log and the config."""
    return any(path.name != LOG and not path.name.startswith("config") for path in folder.glob("*"))


def write_config(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> None:
    """Keep the composed config and the command line in `config/`, those of a continuation in `config_2/`, ..."""
    names = ("config", *(f"config_{number}" for number in range(2, 10_000)))
    folder = next(out_dir.absolute() / name for name in names if not (out_dir / name).exists())
    folder.mkdir()
    _made_paths.add(folder)
    OmegaConf.save(cfg, folder / "config.yaml")
    # names on a disk are bytes, which need be no text
    (folder / _TYPED).write_text("\n".join(overrides) + "\n", encoding="utf-8", errors="surrogateescape")


def command_line(folder: Path) -> list[str]:
    """Return the words of the command that began a run; none where the folder keeps none, or what no command is."""
    return _words(folder / "config" / _TYPED)


def last_command_line(folder: Path) -> list[str]:
    """Return the words of the command that is at work in a folder: the first one's, or those by which it goes on."""
    newest = max(folder.glob(f"config*/{_TYPED}"), key=lambda path: path.stat().st_mtime_ns, default=None)
    return [] if newest is None else _words(newest)


def _words(path: Path) -> list[str]:
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return []
    lines = path.read_bytes().decode(errors="replace").split("\n")  # a word may hold other characters that end lines
    return [word for word in lines if word]


def drop_parts(folder: Path) -> None:
    """Remove what a killed process has left half-written in a run folder that is locked, and so nobody else's."""
    remove_parts(folder, ".*.part", "checkpoints/.*.part", "checkpoints/.tmp??????")  # .tmp: by safetensors
