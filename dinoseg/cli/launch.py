"""Launch of a mode from a composed config: checkpoint to resume, run folder and ranks."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dinoseg.checkpoints.auto_resume import Action, StartPoint
from dinoseg.cli.job_checks import AUTO, CHOOSER, check_job, check_paths
from dinoseg.cli.joined_ranks import has_other_ranks, is_first_rank, join_ranks
from dinoseg.cli.ranks import run_ranks
from dinoseg.cli.run_mode import run_mode, shortages_as_user_errors
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.runs.folder import LOG, RunFolder, has_results, remove_empty
from dinoseg.runs.location import RunLocation, has_default_name, move_below_recipe
from dinoseg.runs.log_file import configure_log
from dinoseg.utils.cores import limit_threads_to_quota
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.interrupt import Interrupted
from dinoseg.utils.wording import printable


class Job(NamedTuple):
    """A composed job.

    Attributes:
        cfg: the whole config.
        location: where the job writes, and where `resume=auto` searches.
        words: of a command line that composes it.
        new_folder: whether to write next to a folder that holds a run, and never to resume there without `resume`.
    """

    cfg: DictConfig
    location: RunLocation
    words: Sequence[str]
    new_folder: bool = False


class PreparedJob(NamedTuple):
    """Remaining work in the run folder of a job.

    Attributes:
        cfg: the whole config, merged with that of the checkpoint to resume from.
        result: that of a finished run; None: the mode is to be run.
    """

    cfg: DictConfig
    result: Any = None


def launch(job: Job) -> Any:
    """Run the chosen mode and return its result: in this process for one device, else in ranks started from here.

    A mode with `resume_from: last` resumes in the checkpoint's own run folder; with `best` it uses a new one. A mode
    with `resumes_with` resumes in the given run folder if that holds the file of this name or no results.
    A mode with `devices` above 1 runs in that many ranks. If torchrun (WORLD_SIZE is set) or Slurm has started them,
    this process is one of them: the first chooses config and run folder, and broadcasts them.

    Raises:
        UserError: any error that the user can fix.
    """
    cfg, typed = job.cfg, OverridesParser.create().parse_overrides([*job.words])
    with (
        RunFolder(job.location.folder) as run,
        _note_on_interrupt(job, run),
        file_errors_as_user_errors(run.path),
        shortages_as_user_errors(),
    ):
        check_job(cfg, typed)
        check_paths(cfg, typed)
        devices = cfg.mode.get("devices", 1)
        if "devices" in cfg.mode:
            join_ranks()
        if devices == 1:  # ranks started from here set their own limits
            limit_threads_to_quota()
        if not cfg.mode.get("keeps_folder", True):
            remove_empty(run.path)
            return run_mode(cfg, run.path)
        is_shared = has_other_ranks()
        if is_shared and "devices" not in cfg.mode:  # each rank would do all the work, in the same folder
            raise UserError(f"mode={cfg.choices.mode} uses one device, and several ranks were started. Start it alone.")
        prepared = _prepare_on_first_rank(job, typed, run) if is_shared else _prepare(job, typed, run)
        if prepared.result is not None:
            return prepared.result
        if devices == 1 or "WORLD_SIZE" in os.environ:
            return run_mode(prepared.cfg, run.path)
        return run_ranks(prepared.cfg, run.path, devices)


def _prepare_on_first_rank(job: Job, typed: Sequence[Override], run: RunFolder) -> PreparedJob:
    """Prepare a job on the first of the ranks that torchrun or Slurm has started, and return it on all.

    Raises:
        UserError: on every rank, if the first one raises it.
    """
    from dinoseg.cli.shared import compose_shared, describe_job
    from dinoseg.training.rendezvous import share_from_rank0

    def as_text() -> str:
        with file_errors_as_user_errors(run.path):
            prepared = _prepare(job, typed, run)
        # YAML keeps the types of keys, which JSON would turn into text
        config = OmegaConf.to_yaml(OmegaConf.create(describe_job(prepared.cfg)))
        return json.dumps([config, str(run.path), prepared.result])

    engine = job.cfg.engine
    text = share_from_rank0(as_text, connect=engine.rendezvous_timeout, wait=engine.rank_timeout)
    config, folder, result = json.loads(text)
    run.move_to(Path(folder))
    return PreparedJob(compose_shared(to_container(OmegaConf.create(config)), to_container(job.cfg)), result)


def _prepare(job: Job, typed: Sequence[Override], run: RunFolder) -> PreparedJob:
    """Choose the recipe, find the checkpoint, enter the run folder and write the config; see `launch`."""
    cfg, location = job.cfg, job.location
    recipe = _choose_recipe(cfg, job.words)
    composed = cfg if recipe is None else recipe.cfg
    whole, start, folder = composed, StartPoint(Action.START), location.folder
    if composed.resume is not None and "resume_from" in composed.mode:
        from dinoseg.checkpoints import members

        if members.names_ensemble(composed):
            whole = members.compose_ensemble(composed, job.words)
        else:
            start = _find_start(composed, typed, location, run)
            if start.action is Action.NOTHING:
                from dinoseg.checkpoints.past_runs import read_result

                return PreparedJob(composed, read_result(run.path))
            whole = _take_checkpoint(composed, job.words, start, run)
        folder = start.folder or move_below_recipe(folder, composed.choices.hparam, whole.choices.hparam)
    if CHOOSER in whole:  # records and ranks need the choices alone
        whole = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != CHOOSER])
    if start.folder is None:
        _claim_folder(whole, folder, run, new_folder=job.new_folder)
    restarts = start.folder is not None and start.checkpoint is None
    config_folder = run.write_config(whole, job.words, restarts=restarts)
    if recipe is not None and start.checkpoint is None:
        recipe.write(config_folder)
    return PreparedJob(whole)


def _choose_recipe(cfg: DictConfig, overrides: Sequence[str]) -> Any:
    """Return what the function of `chooser` returns, with `cfg` and `write`; None without it and for resumed runs.

    Raises:
        UserError: nothing can be chosen.
    """
    if CHOOSER not in cfg or cfg.resume not in (None, AUTO):  # a resumed run has its choices
        return None
    if "trainer" not in cfg:
        given = f"hparam={cfg.choices.hparam}"
        raise UserError(f"{given} chooses a training, which mode={cfg.choices.mode} does not read. Leave it out.")
    return instantiate(cfg[CHOOSER])(cfg, overrides)


def _find_start(cfg: DictConfig, typed: Sequence[Override], location: RunLocation, run: RunFolder) -> StartPoint:
    """Return where a job with `resume` starts: its folder is that of the checkpoint if the mode resumes in place."""
    from dinoseg.cli import resuming
    from dinoseg.training import checkpoint

    prefer = cfg.mode.resume_from
    if not isinstance(cfg.resume, str):
        raise UserError(f"resume={cfg.resume}: give one run folder or checkpoint. -m runs a mode for each of several.")
    if cfg.resume != AUTO:
        path = checkpoint.find(cfg.resume, prefer)
        in_place = prefer == "last" and path.parent.name == checkpoint.CHECKPOINT_FOLDER
        return StartPoint(Action.RESUME, path.parent.parent if in_place else None, path)
    if prefer == "best":
        raise UserError(f"resume=auto resumes trainings. For mode={cfg.choices.mode}, name the run: resume=RUN.")
    return resuming.find_start(cfg, typed, location, run)


def _take_checkpoint(cfg: DictConfig, words: Sequence[str], start: StartPoint, run: RunFolder) -> DictConfig:
    """Return the config of a job that starts from a checkpoint, or from none."""
    from dinoseg.checkpoints import resume
    from dinoseg.training import checkpoint

    if start.checkpoint is None:
        return resume.without_resume(cfg)
    info = checkpoint.describe(start.checkpoint)
    tells = is_first_rank() and start.folder is not None
    if start.folder is not None and tells:
        run.enter(start.folder)
        configure_log(start.folder)  # for the changes
    merged = resume.compose_resumed(cfg, words, start.checkpoint, info, tell=tells)
    return resume.to_evaluation(merged, start.step) if start.action is Action.EVALUATE else merged


def _claim_folder(cfg: DictConfig, folder: Path, run: RunFolder, *, new_folder: bool) -> None:
    """Claim a new folder, or enter an existing one in which the mode resumes; report another name than typed."""
    if not new_folder and resumes_in_folder(cfg, folder):
        run.enter(folder, remedy="choose another run folder")
        return
    run.claim(folder)
    if run.path != folder and not has_default_name(folder):  # a typed name; default names may collide
        print(printable(f"{folder} holds another run: this one is written to {run.path}"), file=sys.stderr)


def resumes_in_folder(cfg: DictConfig, folder: Path) -> bool:
    """Return whether a mode with `resumes_with` resumes in its existing run folder instead of using a new one."""
    record = cfg.mode.get("resumes_with")
    claimed = (folder / LOG).exists()
    return record is not None and claimed and ((folder / record).is_file() or not has_results(folder))


@contextmanager
def _note_on_interrupt(job: Job, run: RunFolder) -> Iterator[None]:
    """Add to an interruption of the first rank what the run has left on disk, and how to resume it.

    Raises:
        Interrupted: instead of a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        note = _interrupt_note(job.cfg, run.path, job.location) if is_first_rank() else ""
        raise Interrupted(number, note=note) from None


def _interrupt_note(cfg: DictConfig, folder: Path, location: RunLocation) -> str:
    """Return a note on what an interrupted run has left on disk."""
    if cfg.mode.get("resume_from") != "last":
        return f"finished results are in {folder}" if has_results(folder) else ""
    last = folder / "checkpoints" / "last.safetensors"
    if not last.exists():
        return "this run has saved nothing"
    from safetensors import safe_open

    from dinoseg.training.description import read_description

    # without torch: its import may have been interrupted, and cannot be repeated in this process
    with safe_open(last, framework="np") as file:
        step = read_description(file.metadata()["dinoseg"], str(last))["progress"]["step"]
    remedy = shlex.quote(f"resume={folder}")
    if location.in_sweep:
        remedy = f"resume=auto {shlex.quote(f'hydra.sweep.dir={location.root}')}"
    elif not location.is_given or folder == location.folder:  # in FOLDER_2, resume=auto would resume FOLDER
        remedy = f"resume=auto or {remedy}"
    return f"{last} holds step {step}. To resume, add {remedy} to the same command or call"
