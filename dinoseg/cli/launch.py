"""Launch of a mode from a composed config: checkpoint to resume, run folder and ranks."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoseg.cli.extras import hush_schemas
from dinoseg.cli.ranks import LAUNCH_KEYS, is_first_rank, join_slurm, run_mode, run_ranks, shortages_as_user_errors
from dinoseg.cli.typos import mode_needed
from dinoseg.config.credentials import check_credentials
from dinoseg.config.grammar import decode_keys
from dinoseg.config.limits import check_training
from dinoseg.config.options import values_in_files
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
    enter,
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
from dinoseg.utils.private import check_private
from dinoseg.utils.wording import format_value, printable

AUTO = "auto"  # value of `resume` that looks for a run
_CONFIGS = Path(__file__).parents[1] / "cfg"
_POINTER = re.compile(r"\$\{(\.{2,})(\w+)\}")  # to a key above its own table
_DEFAULT_NAME = re.compile(r"[a-z]+_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # names of run folders by cfg/hydra/run.yaml

# processes of launcher plug-ins (joblib, Slurm) import only this module, through its callback, and resolve the name of
# the job's folder
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
    try:
        _check_words(cfg, overrides)
        _check_values(cfg, overrides)
        check_credentials(cfg.get("logger"), "logger")  # before the config is written
        devices = _join_ranks(cfg)
    except UserError:
        drop_empty(out_dir)
        raise
    if devices == 1:  # ranks started from here set their own limits
        limit_threads_to_quota()
    if not cfg.mode.get("keeps_folder", True):
        drop_empty(out_dir)
        _check_mode(cfg, overrides)
        return run_mode(cfg, out_dir)
    run_folder = out_dir  # removed after an error, unless another one is entered
    try:
        with file_errors_as_user_errors(out_dir), shortages_as_user_errors():
            start = _share_start(cfg, out_dir, partial(_enter_folder, cfg, out_dir, overrides, location, new_folder))
            run_folder = start.folder
            if run_folder != out_dir:
                drop_empty(out_dir)
            if start.result is not None:
                return start.result
            if devices == 1 or "WORLD_SIZE" in os.environ:
                return run_mode(start.cfg, run_folder)
            return run_ranks(start.cfg, run_folder, devices)
    except UserError:
        drop_bare(run_folder)
        raise
    except KeyboardInterrupt as stop:
        drop_empty(out_dir)  # if stopped while the recipe was being chosen
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        sweep = location.root if location is not None and location.in_sweep else None
        note = _interrupt_note(cfg, run_folder, sweep) if is_first_rank() else ""
        raise Interrupted(number, note=note) from None
    finally:
        release_all()


def _join_ranks(cfg: DictConfig) -> int:
    """Check `cache_dir`, join the ranks of torchrun or Slurm, and return the number of devices."""
    limit_spinning()
    if not isinstance(cfg.get("cache_dir", ""), str):
        raise UserError(f"cache_dir={to_container(cfg)['cache_dir']}: give a folder, such as cache_dir=outputs/.cache.")
    if "data" in cfg and cfg.shared_cache is not True:  # other modes read and write nothing there
        check_private(Path(cfg.cache_dir).expanduser(), "cache_dir")
    if "devices" in cfg.mode:
        join_slurm()
        if "WORLD_SIZE" in os.environ:
            limit_threads_to_share()
    devices = cfg.mode.get("devices", 1)
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"engine.devices={devices}: give a whole number of at least 1.")
    return devices


def _share_start(cfg: DictConfig, out_dir: Path, start: Callable[[], JobStart]) -> JobStart:
    """Call `start` on the first of the ranks that torchrun or Slurm has started, and return its result on all.

    Raises:
        UserError: on every rank, if the first one raises it.
    """
    if "devices" not in cfg.mode or os.environ.get("WORLD_SIZE", "1") == "1":
        return start()
    from dinoseg.experiment.shared import compose_shared, describe_job
    from dinoseg.training.rendezvous import share_from_rank0

    def as_text() -> str:
        with file_errors_as_user_errors(out_dir):
            found = start()
        # YAML keeps the types of keys, which JSON would turn into text
        config = OmegaConf.to_yaml(OmegaConf.create(describe_job(found.cfg)))
        return json.dumps([config, str(found.folder), found.result])

    engine = cfg.engine
    text = share_from_rank0(as_text, connect=engine.rendezvous_timeout, wait=engine.rank_timeout)
    config, folder, result = json.loads(text)
    return JobStart(compose_shared(to_container(OmegaConf.create(config)), to_container(cfg)), Path(folder), result)


def _enter_folder(
    cfg: DictConfig,
    out_dir: Path,
    overrides: Sequence[str],
    location: RunLocation | None = None,
    new_folder: bool = False,
) -> JobStart:
    """Find the run to resume, claim a run folder and write the config to it; see `launch` for the arguments."""
    location = location or RunLocation(out_dir, out_dir.parent)
    recipe = _recipe(cfg, overrides)
    if recipe is not None:
        cfg = recipe.cfg
    typed_recipe, new = cfg.choices.hparam, out_dir
    cfg, start = _find_run(_settle_length(cfg, overrides), overrides, location)
    if start.action is Action.NOTHING and start.folder is not None:
        from dinoseg.experiment.past_runs import read_result

        return JobStart(cfg, start.folder, read_result(start.folder))
    if start.checkpoint is not None:
        new = _below_recipe(out_dir, typed_recipe, cfg.choices.hparam)
    cfg, solo_runs = _with_heads(cfg, overrides, start.folder if start.checkpoint else None)
    if cfg.mode.get("resume_from") == "last":
        from dinoseg.experiment.models import ModelBuilder
        from dinoseg.experiment.recipe import config_description

        for whole in (cfg, *(solo.cfg for solo in solo_runs.values())):
            check_training(whole)
            config_description(ModelBuilder(whole))  # refuses what a checkpoint could not store
    if not is_first_rank():  # of a mode on one device: the first rank writes its files
        return JobStart(cfg, start.folder or new)
    run_folder = start.folder or _claim_folder(cfg, new, new_folder)
    lock(run_folder)
    drop_parts(run_folder)
    config_folder = write_config(cfg, run_folder, overrides)
    if start.plan is not None or location.in_sweep:
        plan = None if start.plan is None else vars(start.plan)
        write_origin(config_folder, start.job, plan, in_sweep=location.in_sweep)
    if location.is_given and not location.in_sweep and cfg.mode.get("resume_from") == "last":
        remember_folder(Path(cfg.cache_dir).expanduser(), run_folder)
    if recipe is not None and start.checkpoint is None:
        recipe.write(config_folder)
    for name, solo in solo_runs.items():
        folder = run_folder / "heads" / name
        enter(folder, instead="train the other heads separately")
        write_config(solo.cfg, folder, solo.words)
    return JobStart(cfg, run_folder)


def _claim_folder(cfg: DictConfig, folder: Path, new_folder: bool) -> Path:
    """Create a new run folder, or return an existing one in which the mode resumes; report another name than typed."""
    if not new_folder and resumes_in_folder(cfg, folder):
        lock(folder, instead="choose another hydra.run.dir")
        return folder
    run_folder = claim(folder)
    if run_folder != folder and not _DEFAULT_NAME.fullmatch(folder.name):  # a typed name; default names may collide
        print(printable(f"{folder} holds another run: this one is written to {run_folder}"), file=sys.stderr)
    return run_folder


def _recipe(cfg: DictConfig, overrides: Sequence[str]) -> Any:
    """Return the `ChosenRecipe` of `hparam=auto`; None for other recipes and resumed runs.

    Raises:
        UserError: nothing can be chosen.
    """
    is_chosen = cfg.choices.hparam == "auto" and cfg.mode.get("keeps_folder", True)
    if not is_chosen or cfg.resume not in (None, AUTO):  # a resumed run has its choices
        return None
    if "trainer" not in cfg:
        raise UserError(f"hparam=auto chooses a training, which mode={cfg.choices.mode} does not read. Leave it out.")
    from dinoseg.cli.auto.recipe import choose_recipe

    return choose_recipe(cfg, overrides)


def _with_heads(cfg: DictConfig, overrides: Sequence[str], run: Path | None) -> tuple[DictConfig, dict[str, Any]]:
    """Return the config of a multi-head job, including each head's own run config, and these runs."""
    if "heads" not in cfg.get("trainer", ()):
        return cfg, {}
    from dinoseg.experiment.heads import SOLO, solo_runs

    runs = {
        name: solo._replace(cfg=_settle_length(solo.cfg, overrides))
        for name, solo in solo_runs(cfg, overrides, run).items()
    }
    return OmegaConf.merge(cfg, {SOLO: {name: to_container(solo.cfg) for name, solo in runs.items()}}), runs  # type: ignore[return-value]


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


def _find_run(cfg: DictConfig, overrides: Sequence[str], location: RunLocation) -> tuple[DictConfig, Start]:
    """Return the config, merged with that of the checkpoint in `resume`, and where the job starts.

    Its folder is that of the checkpoint if the mode resumes in place.
    """
    if cfg.get("resume") is None or "resume_from" not in cfg.mode:
        return cfg, Start(Action.START)
    from dinoseg.cli import resuming
    from dinoseg.experiment import resume
    from dinoseg.training import checkpoint

    prefer, words = cfg.mode.resume_from, _parsed(overrides)
    if cfg.resume != AUTO:
        path = checkpoint.find(cfg.resume, prefer)
        in_place = prefer == "last" and path.parent.name == checkpoint.FOLDER
        start = Start(Action.RESUME, path.parent.parent if in_place else None, path)
    elif prefer == "best":
        raise UserError(f"resume=auto resumes trainings. For mode={cfg.choices.mode}, name the run: resume=RUN.")
    else:
        start = resuming.find_start(cfg, words, location)
    if start.action is Action.NOTHING:
        return cfg, start
    if start.checkpoint is None:
        return resume.without_resume(cfg), start
    info, tell = checkpoint.describe(start.checkpoint), start.folder is not None and is_first_rank()
    if start.folder is not None and tell:
        lock(start.folder)
        configure_log(start.folder)  # for the changes
    merged = _settle_length(resume.merge(cfg, words, start.checkpoint, info, tell=tell), overrides)
    return resume.to_evaluation(merged, start.step) if start.action is Action.EVALUATE else merged, start


def _settle_length(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Let a typed `trainer.steps` override the `trainer.epochs` of a recipe or checkpoint."""
    typed = {override.key_or_group for override in _parsed(overrides) if override.value() is not None}
    if {"trainer.steps", "trainer.epochs"} <= typed:
        raise UserError("trainer.steps and trainer.epochs both set the length of the training: set one of them.")
    if "trainer.steps" not in typed:
        return cfg
    return OmegaConf.merge(cfg, {"trainer": {"epochs": None}})  # type: ignore[return-value]


def _interrupt_note(cfg: DictConfig, folder: Path, sweep: Path | None = None) -> str:
    """Return a note on what an interrupted run has left on disk."""
    if cfg.mode.get("resume_from") != "last":
        return f"finished results are in {folder}" if has_results(folder) else ""
    last = folder / "checkpoints" / "last.safetensors"
    if not last.exists():  # as in a run that is interrupted while torch is imported, which cannot be imported again
        return "this run has saved nothing"
    from dinoseg.training import checkpoint

    step = checkpoint.describe(last)["progress"]["step"]
    remedy = f"resume=auto or resume={folder}" if sweep is None else f"resume=auto hydra.sweep.dir={sweep}"
    return f"{last} holds step {step}. To resume, add {remedy} to the same command or call"


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _check_words(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a `+key` that no target takes, which Hydra would add silently, and keys that only files may set."""
    for override in _parsed(overrides):
        name = override.key_or_group
        hidden = [part for part in name.split(".") if part.startswith("_")]
        hidden += [str(steps[-1]) for steps, _ in below(decode_keys(override.value()), (name,)) if steps[-1] in BUILDS]
        if hidden := hidden or [key for key in LAUNCH_KEYS[1:] if f"{name}.".startswith(f"mode.{key}.")]:
            raise UserError(
                f"{name}: {hidden[0]} can be set in config files only. Choose a component by GROUP=OPTION; for your "
                "own, write GROUP/NAME.yaml in a folder and add --config-dir FOLDER."
            )
        if override.is_add() and name not in cfg.choices and not _is_taken(cfg, name):
            raise UserError(f"+{name} adds a key that nothing reads. Check its spelling; an existing key needs no +.")


def _check_values(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse text for numbers and switches, and keys that repeat another one, by the shipped files of the options.

    Signatures state what a key takes, but importing the modules that hold them takes seconds.
    """
    for override in _parsed(overrides):
        name, value = override.key_or_group, override.value()
        group = name.partition(".")[0]
        choice = cfg.choices.get(group)
        if override.is_delete() or name in cfg.choices or not isinstance(choice, str | None):
            continue
        found = values_in_files(_CONFIGS, choice, name)
        pointer = _POINTER.fullmatch(found[0]) if found and isinstance(found[0], str) else None
        if pointer and name.count(".") == len(pointer[1]):
            text = (override.input_line or "").partition("=")[2]
            raise UserError(f"{name} repeats {group}.{pointer[2]}. Set that one: {group}.{pointer[2]}={text}")
        is_text = isinstance(value, str) and value != "???" and "${" not in value
        if is_text and found and all(isinstance(each, int | float) for each in found):
            rule = "true or false" if isinstance(found[0], bool) else f"a number, such as {found[0]}"
            raise UserError(f"{name}={format_value(value)} is of type str. Give {rule}.")


def _check_mode(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a command line without a mode, for which `mode=help` is the default."""
    keys = {override.get_key_element().partition("@")[0] for override in _parsed(overrides)}
    if not keys or "mode" in keys or cfg.choices.mode != "help":
        return
    raise UserError(mode_needed([_CONFIGS]))


def _is_taken(cfg: DictConfig, name: str) -> bool:
    """Return whether a key is at or below a node with a `_target_`, whose arguments are checked later."""
    nodes = [OmegaConf.select(cfg, name[:end]) for end, letter in enumerate(name) if letter == "."]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in nodes)
