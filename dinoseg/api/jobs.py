"""Jobs of the command line in the caller's process: modes by name, with overrides as words or as Python values."""

import gc
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dinoseg.api.compose import Job, compose, compose_job, words_of
from dinoseg.api.options import config_folders
from dinoseg.api.session import isolated
from dinoseg.cli.typos import misplaced
from dinoseg.cli.words import FILES
from dinoseg.config.plain import at, texts_of, to_container
from dinoseg.experiment.folder import LOG, command_line, lock, release, will_make
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.interrupt import Interrupted, raised
from dinoseg.utils.wording import format_value

Folder = str | PathLike[str]
_READ = (*FILES, "init", "teacher", "runs")  # keys of files and folders that a mode reads


class OutDir(NamedTuple):
    """The run folder of a call, and what to do where it holds a run.

    Attributes:
        folder: None: as on the command line, below the current folder.
        exist_ok: write to a new folder next to it.
        overwrite: delete it first.
    """

    folder: Folder | None = None
    exist_ok: bool = False
    overwrite: bool = False


_DEFAULT = OutDir()


def run_mode(
    mode: str,
    words: Sequence[str],
    overrides: Mapping[str, Any],
    *,
    out_dir: OutDir = _DEFAULT,
    config_dir: Folder | None = None,
) -> dict[str, Any]:
    """Run a mode as the command line does, and return its result; the caller's process is left as it was.

    Args:
        mode: option of the group `mode`.
        words: overrides as typed on the command line.
        overrides: values by key, see `words_of`.
        out_dir: the run folder.
        config_dir: folder of further config groups, as `--config-dir` names it.

    Raises:
        UserError: any error that the user can fix.
        KeyboardInterrupt: on Ctrl-C; its message states how to resume.
    """
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(f"{flags[0]} is for the command line. Python runs one job per call: write a loop for several.")
    if out_dir.exist_ok and out_dir.overwrite:
        raise UserError("exist_ok=True and overwrite=True exclude each other. Give one of them.")
    try:
        folder = {} if out_dir.folder is None else {"hydra.run.dir": Path(out_dir.folder).expanduser()}
    except RuntimeError as error:  # the home folder of an unknown user
        raise UserError(f"out_dir={format_value(out_dir.folder)}: {error} Choose another folder.") from None
    stopped: Interrupted | None = None
    try:
        with isolated():
            try:
                typed = [f"mode={mode}", *words]
                typed += words_of({**overrides, **folder}, _tables(typed, overrides, config_dir))
                job = compose_job(typed, config_dir=config_dir)
                is_run = bool(folder) and not out_dir.exist_ok and _holds_run(job, config_dir, out_dir.overwrite)
                with _set_aside(job.location.folder) if is_run else nullcontext():
                    return _launch(job, config_dir)
            finally:
                gc.collect()  # models are in reference cycles
    except UserError as error:
        # its frames hold the model, and a notebook stores the last error
        error.__context__ = error.__cause__ = None
        failed: UserError = error.with_traceback(None)
    except Interrupted as error:
        stopped = Interrupted(error.number, note=error.note, folder=error.folder)
    # raised here, errors have no context, whose frames would hold the model
    if stopped is None:
        raise failed
    if stopped.number != signal.SIGINT and threading.current_thread() is threading.main_thread():
        signal.raise_signal(stopped.number)
    raise KeyboardInterrupt(_how_to_resume(stopped))


def _holds_run(job: Job, config_dir: Folder | None, overwrite: bool) -> bool:
    """Return whether the run folder holds a run to replace; False for a job that resumes there.

    Raises:
        UserError: the folder holds a run that must not be replaced, or files that no run has written.
    """
    from dinoseg.cli.launch import resumes_in_folder

    folder = job.location.folder
    mode = job.cfg.mode
    resumes = job.cfg.resume is not None and mode.get("resume_from") == "last"
    if resumes or (not overwrite and resumes_in_folder(job.cfg, folder)):
        return False
    if not (folder / LOG).exists():
        if folder.is_dir() and any(folder.iterdir()):  # overwrite=True would delete them with the run
            raise UserError(
                f"out_dir={folder} holds files that no run has written. Choose a new folder, or write next to them by "
                "exist_ok=True."
            )
        return False
    if not overwrite:
        raise UserError(
            f"out_dir={folder} holds a run. Choose another folder, replace the run by overwrite=True, or keep it by "
            f"exist_ok=True, which writes to a folder next to it, such as {folder.name}_2."
        )
    if reason := _find_reason_to_keep(folder.resolve(), job.cfg, config_dir):
        raise UserError(f"out_dir={folder} with overwrite=True: {reason}. Choose another out_dir.")
    return True


@contextmanager
def _set_aside(folder: Path) -> Iterator[None]:
    """Move the contents of a run folder aside; delete them after the block, or put them back if it leaves no run.

    Raises:
        UserError: another process is writing to the folder, or it cannot be moved.
    """
    lock(folder, instead="choose another out_dir")
    release(folder)  # Windows moves no open file
    folder = folder.resolve()  # the folder itself may be a link
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}_replaced_", dir=folder.parent))
        _move_contents(folder, aside)
    except OSError as error:
        raise UserError(f"out_dir={folder} cannot be replaced ({error}). Choose another out_dir.") from error
    try:
        yield
    finally:
        if not (folder / LOG).exists():  # the call has failed before its run began
            folder.mkdir(exist_ok=True)
            _move_contents(aside, folder)
        shutil.rmtree(aside)


def _move_contents(source: Path, target: Path) -> None:
    for path in [*source.iterdir()]:
        path.rename(target / path.name)


def _find_reason_to_keep(folder: Path, cfg: DictConfig, config_dir: Folder | None) -> str | None:
    """Return why a folder with a log must not be deleted; None if it holds one run of dinoseg that nobody needs."""
    if not command_line(folder):
        return "its contents were not written by dinoseg"
    if Path(os.path.expanduser("~")).resolve().is_relative_to(folder):  # not Path.home, which may raise
        return "it holds your home folder"
    config = to_container(cfg)
    read: list[str] = [path for key in _READ for path in texts_of(at(config, key.split(".")))]
    read += [text for text in texts_of(config) if os.path.isabs(text)]
    read += [] if config_dir is None else [os.fspath(config_dir)]
    if any(Path(path).expanduser().resolve().is_relative_to(folder) for path in (os.getcwd(), *read)):
        return "the run there is read, too"
    other = next((log.parent for log in folder.glob(f"**/{LOG}") if log.parent != folder and not _is_head(log)), None)
    return None if other is None else f"it also holds the run {other}"


def _is_head(log: Path) -> bool:
    return log.parents[1].name == checkpoint.HEADS


def _launch(job: Job, config_dir: Folder | None) -> dict[str, Any]:
    from dinoseg.cli.launch import launch  # its import registers resolvers, which `isolated` removes

    out_dir = job.location.folder
    will_make(out_dir)
    try:
        with raised(), file_errors_as_user_errors(out_dir):
            return launch(job.cfg, out_dir, job.words, job.location)
    except UserError:
        raise
    except Exception as error:
        if message := misplaced(job.words, config_folders(config_dir), error):
            raise UserError(message) from error
        raise


def _tables(
    words: Sequence[str], overrides: Mapping[str, Any], config_dir: Folder | None
) -> Callable[[str], bool] | None:
    """Return the function that states whether the config has a table at a key, with the options of the overrides."""
    if not any(isinstance(value, Mapping) for value in overrides.values()):
        return None
    options = {key: value for key, value in overrides.items() if not isinstance(value, Mapping)}
    cfg: DictConfig = compose([*words, *words_of(options)], config_dir=config_dir)
    return lambda key: isinstance(at(cfg, key.split(".")), DictConfig)


def _how_to_resume(stop: Interrupted) -> str:
    last = stop.folder and stop.folder / checkpoint.FOLDER / "last.safetensors"
    if not last or not last.is_file():
        return stop.note
    step = checkpoint.describe(last)["progress"]["step"]
    return f"{last} holds step {step}. To resume, call dinoseg.Run({str(stop.folder)!r}).resume()."
