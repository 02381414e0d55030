"""Jobs of the command line in the caller's process: modes by name, with overrides as words or as Python values."""

import gc
import signal
import threading
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from dinoseg.api.compose import CallOverrides, compose_job, read_call
from dinoseg.api.objects import refuse_modules, split_datasets, split_modules
from dinoseg.api.session import preserve_process_state
from dinoseg.cli.launch import Job, launch, resumes_in_folder
from dinoseg.cli.typos import explain_errors
from dinoseg.config.composition import Value
from dinoseg.config.plain import flatten
from dinoseg.experiment.objects import lend_objects
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Interrupted, raise_on_signal
from dinoseg.utils.ranges import check_annotations
from dinoseg.utils.wording import format_value

Folder = str | PathLike[str]


@check_annotations
def run_mode(
    mode: str,
    words: Sequence[Any],
    overrides: Mapping[str, Any],
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a mode as the command line does, and return its result; the caller's process is left as it was.

    Args:
        mode: option of the group `mode`.
        words: overrides as typed on the command line.
        overrides: values by key, see `read_call`.
        out_dir: the run folder; None: as on the command line, below the current folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it.
        config_dir: folder of further config groups, as `--config-dir` names it.
        given: values by key that the arguments of the caller's function set.

    Raises:
        UserError: any error that the user can fix.
        KeyboardInterrupt: on Ctrl-C; its message states how to resume.
    """
    stopped: Interrupted | None = None
    try:
        with preserve_process_state():
            try:
                refuse_modules(overrides, "backbone", "head")
                given, datasets = split_datasets(given or {})
                overrides, more = split_datasets(overrides)
                overrides, modules = split_modules(overrides, "loss")
                fixed = read_call((), {"mode": mode, **given}, config_dir)
                call = read_call(words, overrides, config_dir)
                _check_fixed(fixed, call)
                run_folder = [] if out_dir is None else [Value("hydra.run.dir", str(Path(out_dir).expanduser()))]
                values = [*fixed.values, *call.values, *run_folder]
                job = compose_job(CallOverrides({**fixed.options, **call.options}, values, call.folders))
                if job.location.is_given and not exist_ok:
                    _check_unused(job)
                explain = explain_errors(job.words, call.folders)
                with lend_objects({**modules, **datasets, **more}), raise_on_signal(), explain:
                    return launch(job._replace(new_folder=exist_ok))
            finally:
                gc.collect()  # models are in reference cycles
    except UserError as error:
        # its frames hold the model, and a notebook stores the last error
        error.__context__ = error.__cause__ = None
        failed: UserError = error.with_traceback(None)
    except Interrupted as error:
        stopped = Interrupted(error.number, note=error.note)
    # raised here, errors have no context, whose frames would hold the model
    if stopped is None:
        raise failed
    if stopped.number != signal.SIGINT and threading.current_thread() is threading.main_thread():
        signal.raise_signal(stopped.number)
    raise KeyboardInterrupt(stopped.note)


def _check_fixed(fixed: CallOverrides, call: CallOverrides) -> None:
    """Refuse a key, or an option of a group, that the function or its arguments set already."""
    given = _keys_of(call)
    for key, value in _keys_of(fixed).items():
        if key in given:
            remedy = "Call the function of the other mode." if key == "mode" else "Leave it out."
            raise UserError(f"{key} is set to {format_value(value)} by this function and its arguments. {remedy}")


def _keys_of(call: CallOverrides) -> dict[str, Any]:
    return {**call.options, **dict(flatten({value.key: value.value for value in call.values}))}


def _check_unused(job: Job) -> None:
    """Refuse a run folder that holds files already, unless the job resumes there."""
    folder = job.location.folder
    resumes = job.cfg.resume is not None and job.cfg.mode.get("resume_from") == "last"
    if resumes or resumes_in_folder(job.cfg, folder) or not folder.is_dir() or not any(folder.iterdir()):
        return
    raise UserError(
        f"out_dir={folder} holds files already. Choose another folder; or set exist_ok=True to keep the run there and "
        f"write the new one to a folder next to it, such as {folder.name}_2."
    )
