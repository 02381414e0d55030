"""Run folders: claiming, locking, saved configs and command lines, and removal of empty ones."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.plain import to_container
from dinoseg.utils import forms, locks
from dinoseg.utils.atomic import create_cache_dir, remove_dead, remove_parts, write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular

LOG = "run.log"
SWEEP = "multirun.yaml"  # in the folder of a sweep
_TYPED = "overrides.txt"
ORIGIN = "origin.json"  # in a config folder: what the command was part of
_SHIPPED = Path(__file__).parents[1] / "cfg/hydra/run.yaml"
_POLL = 0.1  # seconds between two attempts to lock a folder
_LONGEST = 2**18  # maximum bytes of a command: twice Linux's limit of one word; the folder may be untrusted
_run_locks: dict[Path, IO[str]] = {}  # locks are held until the process ends
_made_paths: set[Path] = set()  # folders and logs created by this process, which it may remove again


class RunLocation(NamedTuple):
    """Where a command writes its run, and where earlier runs are.

    Attributes:
        folder: the run folder that the config names.
        root: folder of all runs, `outputs` by default; in a multirun the sweep's folder.
        is_given: whether a user's command line or config file names this very folder (a multirun: the sweep's).
        in_sweep: whether the command is a multirun.
    """

    folder: Path
    root: Path
    is_given: bool = False
    in_sweep: bool = False


def locate_runs(hydra: Any, folder: Path) -> RunLocation:
    """Return where a command writes its run, by Hydra's own config.

    Args:
        hydra: the config's node of that name, of which nothing is resolved yet.
        folder: the run folder.
    """
    in_sweep = hydra.get("mode") == RunMode.MULTIRUN
    kind = "sweep" if in_sweep else "run"
    default = to_container(OmegaConf.load(_SHIPPED))[kind]["dir"]
    text = to_container(hydra[kind])["dir"]
    # a name with the time is another folder for each command: the user chose where runs lie, not which one this is
    is_given = text != default and "${now:" not in text
    if in_sweep:
        root = Path(hydra.sweep.dir)
    else:
        root = Path((default if is_given else text).partition("${")[0].rpartition("/")[0] or folder.parent)
    return RunLocation(folder.absolute(), Path(os.path.abspath(root)), is_given, in_sweep)


def will_make(folder: Path) -> None:
    """Record which folders the creation of `folder` will add; folders that existed before are never removed."""
    folder = folder.absolute()
    with suppress(OSError):  # an invalid path: its creation raises the error
        _made_paths.update(path for path in (folder, *folder.parents) if not path.exists())


def claim(out_dir: Path) -> Path:
    """Create and lock a new run folder; if another run or a sweep has claimed it, try `_2`, `_3`, ... instead."""
    for number in range(1, 1000):
        folder = out_dir if number == 1 else out_dir.with_name(f"{out_dir.name}_{number}")
        if (folder / SWEEP).exists():
            continue
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


def enter(folder: Path, *, seconds: float = 0.0, instead: str) -> None:
    """Create or reuse a run folder under exactly this name, and lock it.

    Args:
        folder: the run folder.
        seconds: see `lock`.
        instead: see `lock`.

    Raises:
        UserError: another process is writing to it.
    """
    will_make(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LOG).exists():
        _made_paths.add((folder / LOG).absolute())
    lock(folder, seconds=seconds, instead=instead)
    drop_parts(folder)


def lock(folder: Path, *, seconds: float = 0.0, instead: str = "start a new run without resume") -> None:
    """Make this process the only one that writes to a run folder, until it ends.

    Args:
        folder: the run folder.
        seconds: how long to wait for another process.
        instead: what the user can do instead of waiting, for the message.

    Raises:
        UserError: another process is writing to it.
    """
    if not lock_within(folder, seconds):
        raise UserError(f"Another process is writing to {folder.resolve()}. Wait for it, or {instead}.")


def lock_within(folder: Path, seconds: float) -> bool:
    """Lock a run folder for this process, waiting up to some seconds; return whether it is locked."""
    folder, deadline = folder.resolve(), time.monotonic() + seconds
    while folder not in _run_locks:
        with suppress(FileNotFoundError):
            check_regular(folder / LOG)
        file = locks.acquire(folder / LOG)
        if file is not None:
            _run_locks[folder] = file
        elif time.monotonic() >= deadline:
            return False
        else:
            time.sleep(_POLL)
    return True


def release(folder: Path) -> None:
    """Release the lock of a run folder, if this process holds it."""
    file = _run_locks.pop(folder.resolve(), None)
    if file is not None:
        locks.release(file)


def release_all() -> None:
    """Release the locks of all run folders that this process holds."""
    for held in [*_run_locks]:
        locks.release(_run_locks.pop(held))


def drop_empty(folder: Path) -> None:
    """Remove a run folder if it is empty, and its parents that were created for it and are empty now."""
    folder = folder.absolute()
    with suppress(OSError):  # not empty, or already removed
        for path in (folder, *folder.parents):
            if _made_paths.isdisjoint((path, *path.parents)):
                return
            path.rmdir()


def drop_bare(folder: Path) -> None:
    """Remove the folder of a run that ended before it did anything: it holds only an empty log and its config.

    Of a run that was to be resumed, the new config is removed.
    """
    folder = folder.absolute()
    with suppress(OSError):
        contents = set(folder.iterdir())
        if contents <= _made_paths and not (folder / LOG).stat().st_size:
            for path in contents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files = [path for path in folder.rglob("*") if path.name != LOG and path.is_file()]
        newest = max((path.stat().st_mtime_ns for path in files if path.parent not in _made_paths), default=0)
        for path in [path for path in _made_paths if path.parent.is_relative_to(folder)]:
            if path.name.startswith("config_") and path.is_dir() and path.stat().st_mtime_ns > newest:
                shutil.rmtree(path)
    drop_empty(folder)


def has_results(folder: Path) -> bool:
    """Return whether a run folder holds more than its log and config."""
    return any(path.name != LOG and not path.name.startswith("config") for path in folder.glob("*"))


def write_config(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> Path:
    """Save config and command line in `config/`, or in `config_2/`, ... when a run resumes; return that folder."""
    names = ("config", *(f"config_{number}" for number in range(2, 10_000)))
    folder = next(out_dir.absolute() / name for name in names if not (out_dir / name).exists())
    folder.mkdir()
    _made_paths.add(folder)
    OmegaConf.save(cfg, folder / "config.yaml")
    # file names are bytes and need not be valid text
    (folder / _TYPED).write_text("\n".join(overrides) + "\n", encoding="utf-8", errors="surrogateescape")
    return folder


def write_origin(config_folder: Path, job: str | None, plan: Mapping[str, Any] | None, *, in_sweep: bool) -> None:
    """Record what the command whose config is stored in a folder was part of.

    Args:
        config_folder: `config`, `config_2`, ... in the run folder.
        job: identifier of the scheduler job, by which a requeued job finds the run.
        plan: recipe and length, by which it finds a run without a checkpoint.
        in_sweep: whether the command was a job of a multirun.
    """
    write_json(config_folder / ORIGIN, {"job": job, "sweep": in_sweep, "plan": plan})


def remember_folder(cache_dir: Path, folder: Path) -> None:
    """Record a run folder that the user named, so that the same command finds it from this folder without the name."""
    path, line = _folder_list(cache_dir), json.dumps(str(folder.absolute())) + "\n"
    with suppress(OSError):  # a cache that cannot be written to is no reason not to train
        create_cache_dir(cache_dir)
        if not path.exists() or line.encode() not in path.read_bytes():
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # a full disk may have cut the line before


def remembered_folders(cache_dir: Path) -> Iterator[Path]:
    """Yield the run folders that commands in the current folder have named and that still exist."""
    with suppress(OSError, UserError, forms.SchemaError):
        for line in forms.read_regular(_folder_list(cache_dir), 2**24).splitlines():
            with suppress(forms.SchemaError):
                folder = Path(forms.parse_json(line, forms.text))
                if folder.is_dir():
                    yield folder


def _folder_list(cache_dir: Path) -> Path:
    here = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()
    return cache_dir / f"runs_{here[:16]}.jsonl"


def command_line(folder: Path) -> list[str]:
    """Return the words of the command that started a run; empty if none is stored or its file is too large."""
    return _words(folder / "config" / _TYPED)


def command_lines(folder: Path) -> list[list[str]]:
    """Return the words of the command that started a run, and of those that resumed it, oldest first."""
    files = sorted(folder.glob(f"config*/{_TYPED}"), key=lambda path: path.stat().st_mtime_ns)
    return [_words(path) for path in files]


def last_command_line(folder: Path) -> list[str]:
    """Return the words of the newest command in a folder: the one that started or last resumed the run."""
    return next(reversed(command_lines(folder)), [])


def find_typed_keys(folder: Path) -> set[str]:
    """Return the keys and groups that the newest command in a folder sets."""
    return {word.partition("=")[0].lstrip("+") for word in last_command_line(folder)}


def _words(path: Path) -> list[str]:
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return []
    # not splitlines: a word may hold other line separators
    lines = path.read_bytes().decode(errors="replace").split("\n")
    return [word for word in lines if word]


def drop_parts(folder: Path) -> None:
    """Remove partial files that a killed process left in a run folder; the folder must be locked."""
    remove_parts(folder, ".*.part", "checkpoints/.*.part", "checkpoints/.tmp??????")  # .tmp: written by safetensors
