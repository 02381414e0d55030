"""Launch of a mode from a composed config: checkpoint to resume, run folder and ranks."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoseg.cli.extras import hush_schemas
from dinoseg.cli.ranks import LAUNCH_KEYS, is_first_rank, join_ranks, run_mode, run_ranks, shortages_as_user_errors
from dinoseg.config.credentials import check_credentials
from dinoseg.config.grammar import decode_keys
from dinoseg.config.job import keys_with_values
from dinoseg.config.mistakes import no_mode
from dinoseg.config.nodes import check_partial
from dinoseg.config.plain import BUILDS, below, to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment.auto_resume import Action, Start
from dinoseg.experiment.folder import (
    LOG,
    RunLocation,
    claim,
    drop_bare,
    drop_empty,
    drop_parts,
    has_results,
    lock,
    release_all,
    remember_folder,
    will_make,
    write_config,
    write_origin,
)
from dinoseg.experiment.log_file import configure_log
from dinoseg.utils.cores import limit_spinning, limit_threads_to_quota, limit_threads_to_share
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.interrupt import Interrupted
from dinoseg.utils.ranges import check_value
from dinoseg.utils.wording import printable

AUTO = "auto"  # value of `resume` that looks for a run
_CONFIGS = Path(__file__).parents[1] / "cfg"
_LAUNCH_VALUES = {  # annotations of keys of a mode that are read here
    "resume_from": Literal["best", "last"] | None,
    "keeps_folder": bool | None,
    "resumes_with": str | None,
}
_DEFAULT_NAME = re.compile(r"[a-z]+_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # names of run folders by cfg/hydra/run.yaml

# processes of launcher plug-ins (joblib, Slurm) import only this module, through its callback
register_resolvers()
hush_schemas()


class NotedFolders(Callback):
    """Hydra callback that records which folders Hydra is about to create; older folders are never removed."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Record the folders of a single run."""
        with suppress(OmegaConfBaseException):  # Hydra reports a name that cannot be resolved right after this
            will_make(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Record the folders of a sweep."""
        will_make(Path(config.hydra.sweep.dir))


class JobStart(NamedTuple):
    """What a job has to do, as the first rank decides it.

    Attributes:
        cfg: the whole config, merged with that of the checkpoint to resume from.
        folder: the run folder.
        result: that of a finished run; None: the mode is to be run.
    """

    cfg: DictConfig
    folder: Path
    result: Any = None


def launch(
    cfg: DictConfig,
    out_dir: Path,
    overrides: Sequence[str],
    location: RunLocation | None = None,
    *,
    new_folder: bool = False,
) -> Any:
    """Run the chosen mode and return its result: in this process for one device, else in ranks started from here.

    A mode with `resume_from: last` resumes in the checkpoint's own run folder; with `best` it uses a new one. A mode
    with `resumes_with` resumes in the given run folder if that holds the file of this name or no results.
    A mode with `devices` above 1 runs in that many ranks. If torchrun (WORLD_SIZE is set) or Slurm has started them,
    this process is one of them: the first chooses config and run folder, and broadcasts them.

    Args:
        cfg: as composed.
        out_dir: the run folder that Hydra has created.
        overrides: the words of the command line.
        location: where runs are searched by `resume=auto`; None: next to `out_dir`.
        new_folder: write next to `out_dir` if that holds a run, and never resume there without `resume`.

    Raises:
        UserError: any error that the user can fix.
    """
    typed = OverridesParser.create().parse_overrides(list(overrides))
    location = location or RunLocation(out_dir, out_dir.parent)
    run_folder = out_dir  # removed after an error, unless another one is entered
    try:
        _check_groups(cfg)
        _check_launch_keys(cfg)
        _check_words(cfg, typed)
        check_credentials(cfg.get("logger"))  # before the config is written
        devices = _join_ranks(cfg)
        if devices == 1:  # ranks started from here set their own limits
            limit_threads_to_quota()
        if not cfg.mode.get("keeps_folder", True):
            drop_empty(out_dir)
            _check_mode(cfg, typed)
            return run_mode(cfg, out_dir)
        with file_errors_as_user_errors(out_dir), shortages_as_user_errors():
            prepare = partial(_prepare, cfg, out_dir, overrides, typed, location, new_folder)
            job = _share_job(cfg, out_dir, prepare)
            run_folder = job.folder
            if run_folder != out_dir:
                drop_empty(out_dir)
            if job.result is not None:
                return job.result
            if devices == 1 or "WORLD_SIZE" in os.environ:
                return run_mode(job.cfg, run_folder)
            return run_ranks(job.cfg, run_folder, devices)
    except UserError:
        drop_bare(run_folder)
        raise
    except KeyboardInterrupt as stop:
        drop_empty(out_dir)  # if stopped while the recipe was being chosen
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        note = _interrupt_note(cfg, run_folder, location) if is_first_rank() else ""
        raise Interrupted(number, note=note) from None
    finally:
        release_all()


def _join_ranks(cfg: DictConfig) -> int:
    """Check `cache_dir`, join the ranks of torchrun or Slurm, and return the number of devices."""
    limit_spinning()
    if not isinstance(cfg.get("cache_dir", ""), str):
        raise UserError(f"cache_dir={to_container(cfg)['cache_dir']}: give a folder, such as cache_dir=outputs/.cache.")
    if "devices" in cfg.mode:
        join_ranks()
        if "WORLD_SIZE" in os.environ:
            limit_threads_to_share()
    devices = cfg.mode.get("devices", 1)
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"engine.devices={devices}: give a whole number of at least 1.")
    return devices


def _share_job(cfg: DictConfig, out_dir: Path, prepare: Callable[[], JobStart]) -> JobStart:
    """Call `prepare` on the first of the ranks that torchrun or Slurm has started, and return its result on all.

    Raises:
        UserError: on every rank, if the first one raises it.
    """
    if "devices" not in cfg.mode or os.environ.get("WORLD_SIZE", "1") == "1":
        return prepare()
    from dinoseg.experiment.shared import compose_shared, describe_job
    from dinoseg.training.rendezvous import share_from_rank0

    def as_text() -> str:
        with file_errors_as_user_errors(out_dir):
            job = prepare()
        # YAML keeps the types of keys, which JSON would turn into text
        config = OmegaConf.to_yaml(OmegaConf.create(describe_job(job.cfg)))
        return json.dumps([config, str(job.folder), job.result])

    engine = cfg.engine
    text = share_from_rank0(as_text, connect=engine.rendezvous_timeout, wait=engine.rank_timeout)
    config, folder, result = json.loads(text)
    return JobStart(compose_shared(to_container(OmegaConf.create(config)), to_container(cfg)), Path(folder), result)


def _prepare(
    cfg: DictConfig,
    out_dir: Path,
    overrides: Sequence[str],
    typed: Sequence[Override],
    location: RunLocation,
    new_folder: bool,
) -> JobStart:
    """Choose the recipe, find the checkpoint, enter the run folder and write the config; see `launch`."""
    recipe = _choose_recipe(cfg, overrides)
    composed = cfg if recipe is None else recipe.cfg
    whole, start, new = composed, Start(Action.START), out_dir
    if composed.resume is not None and "resume_from" in composed.mode:
        start = _find_start(composed, typed, location)
        if start.action is Action.NOTHING and start.folder is not None:
            from dinoseg.experiment.past_runs import read_result

            return JobStart(composed, start.folder, read_result(start.folder))
        whole = _take_checkpoint(composed, typed, start)
        new = _below_recipe(out_dir, composed.choices.hparam, whole.choices.hparam)
    if not is_first_rank():  # of a mode on one device: the first rank writes its files
        return JobStart(whole, start.folder or new)
    run_folder = start.folder or _claim_folder(whole, new, new_folder)  # both are locked
    drop_parts(run_folder)
    config_folder = write_config(whole, run_folder, overrides)
    if start.plan is not None or location.in_sweep:
        plan = None if start.plan is None else vars(start.plan)
        write_origin(config_folder, start.job, plan, in_sweep=location.in_sweep)
    if location.is_given and not location.in_sweep and whole.mode.get("resume_from") == "last":
        remember_folder(Path(whole.cache_dir).expanduser(), run_folder)
    if recipe is not None and start.checkpoint is None:
        recipe.write(config_folder)
    return JobStart(whole, run_folder)


def _claim_folder(cfg: DictConfig, folder: Path, new_folder: bool) -> Path:
    """Create a new run folder, or return an existing one in which the mode resumes; report another name than typed."""
    if not new_folder and resumes_in_folder(cfg, folder):
        lock(folder, instead="choose another run folder")
        return folder
    run_folder = claim(folder)
    if run_folder != folder and not _DEFAULT_NAME.fullmatch(folder.name):  # a typed name; default names may collide
        print(printable(f"{folder} holds another run: this one is written to {run_folder}"), file=sys.stderr)
    return run_folder


def _choose_recipe(cfg: DictConfig, overrides: Sequence[str]) -> Any:
    """Return the `ChosenRecipe` of `hparam=auto`; None for other recipes and resumed runs.

    Raises:
        UserError: nothing can be chosen.
    """
    if cfg.choices.hparam != "auto" or cfg.resume not in (None, AUTO):  # a resumed run has its choices
        return None
    if "trainer" not in cfg:
        raise UserError(f"hparam=auto chooses a training, which mode={cfg.choices.mode} does not read. Leave it out.")
    from dinoseg.cli.auto.recipe import choose_recipe

    return choose_recipe(cfg, overrides)


def resumes_in_folder(cfg: DictConfig, folder: Path) -> bool:
    """Return whether a mode with `resumes_with` resumes in its existing run folder instead of using a new one."""
    record = cfg.mode.get("resumes_with")
    claimed = (folder / LOG).exists()
    return record is not None and claimed and ((folder / record).is_file() or not has_results(folder))


def _below_recipe(out_dir: Path, typed: str, recipe: Any) -> Path:
    """Return the run folder of a mode that uses a checkpoint: below the checkpoint's recipe, unless its name was typed.

    The recipe's name comes from a file, so only a plain name is used as a folder.
    """
    ours = out_dir.parent.name == typed and _DEFAULT_NAME.fullmatch(out_dir.name)
    plain_name = isinstance(recipe, str) and re.fullmatch(r"\w[\w-]*", recipe)
    return out_dir.parent.with_name(recipe) / out_dir.name if ours and plain_name else out_dir


def _find_start(cfg: DictConfig, typed: Sequence[Override], location: RunLocation) -> Start:
    """Return where a job with `resume` starts: its folder is that of the checkpoint if the mode resumes in place."""
    from dinoseg.cli import resuming
    from dinoseg.training import checkpoint

    prefer = cfg.mode.resume_from
    if cfg.resume != AUTO:
        path = checkpoint.find(cfg.resume, prefer)
        in_place = prefer == "last" and path.parent.name == checkpoint.CHECKPOINT_FOLDER
        return Start(Action.RESUME, path.parent.parent if in_place else None, path)
    if prefer == "best":
        raise UserError(f"resume=auto resumes trainings. For mode={cfg.choices.mode}, name the run: resume=RUN.")
    return resuming.find_start(cfg, typed, location)


def _take_checkpoint(cfg: DictConfig, typed: Sequence[Override], start: Start) -> DictConfig:
    """Return the config of a job that starts from a checkpoint, or from none."""
    from dinoseg.experiment import resume
    from dinoseg.training import checkpoint

    if start.checkpoint is None:
        return resume.without_resume(cfg)
    info = checkpoint.describe(start.checkpoint)
    tells = is_first_rank() and start.folder is not None
    if start.folder is not None and tells:
        lock(start.folder)
        configure_log(start.folder)  # for the changes
    merged = resume.merge(cfg, typed, start.checkpoint, info, tell=tells)
    return resume.to_evaluation(merged, start.step) if start.action is Action.EVALUATE else merged


def _interrupt_note(cfg: DictConfig, folder: Path, location: RunLocation) -> str:
    """Return a note on what an interrupted run has left on disk."""
    if cfg.mode.get("resume_from") != "last":
        return f"finished results are in {folder}" if has_results(folder) else ""
    last = folder / "checkpoints" / "last.safetensors"
    if not last.exists():  # as in a run that is interrupted while torch is imported, which cannot be imported again
        return "this run has saved nothing"
    from dinoseg.training import checkpoint

    step = checkpoint.describe(last)["progress"]["step"]
    remedy = f"resume=auto or {shlex.quote(f'resume={folder}')}"
    if location.in_sweep:
        remedy = f"resume=auto {shlex.quote(f'hydra.sweep.dir={location.root}')}"
    return f"{last} holds step {step}. To resume, add {remedy} to the same command or call"


def _check_launch_keys(cfg: DictConfig) -> None:
    """Refuse a mode's file without a function, or with a wrong value of a key that is read here."""
    where = f"mode={cfg.choices.mode}"
    check_partial(cfg.mode if OmegaConf.is_dict(cfg.mode) else {}, where)
    for key, annotation in _LAUNCH_VALUES.items():
        check_value(f"{where}: {key}", cfg.mode.get(key), annotation)


def _check_groups(cfg: DictConfig) -> None:
    """Refuse a group that a config file sets to null, as a line such as `trainer:` does if all keys below are gone."""
    for group, option in cfg.choices.items():
        if option is not None and OmegaConf.select(cfg, group, default="") is None:
            raise UserError(
                f"{group} is null, and {group}={option} is a group of keys. A config file has the line `{group}:` "
                "without keys below it. Remove that line."
            )


def _check_words(cfg: DictConfig, typed: Sequence[Override]) -> None:
    """Refuse a `+key` that no target takes, keys that only files may set, and two lengths of a training."""
    if {"trainer.steps", "trainer.epochs"} <= keys_with_values(typed):
        raise UserError("trainer.steps and trainer.epochs both set the length of the training: set one of them.")
    for override in typed:
        name = override.key_or_group
        hidden = [part for part in name.split(".") if part.startswith("_")]
        hidden += [str(steps[-1]) for steps, _ in below(decode_keys(override.value()), (name,)) if steps[-1] in BUILDS]
        if hidden := hidden or [key for key in LAUNCH_KEYS[1:] if f"{name}.".startswith(f"mode.{key}.")]:
            raise UserError(
                f"{name}: {hidden[0]} can be set in config files only. Choose a component by GROUP=OPTION; for your "
                "own, write GROUP/NAME.yaml in a folder and add --config-dir FOLDER."
            )
        package = override.package or "_global_"
        # the keys of a group of the user's own may replace others, if they are not below a key of their own
        is_own = name in cfg.choices and package == "_global_" and not (_CONFIGS / name).is_dir()
        if override.is_add() and not is_own and not _is_taken(cfg, name if package == "_global_" else package):
            added = override.get_key_element()
            raise UserError(f"{added} adds a key that nothing reads. Check its spelling; an existing key needs no +.")


def _check_mode(cfg: DictConfig, typed: Sequence[Override]) -> None:
    """Refuse a command line without a mode, for which `mode=help` is the default."""
    keys = {override.get_key_element().partition("@")[0] for override in typed}
    if not keys or "mode" in keys or cfg.choices.mode != "help":
        return
    raise no_mode([_CONFIGS])


def _is_taken(cfg: DictConfig, name: str) -> bool:
    """Return whether a key is at or below a node with a `_target_`, whose arguments are checked later."""
    nodes = [OmegaConf.select(cfg, name[:end]) for end, letter in enumerate(name) if letter == "."]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in nodes)
