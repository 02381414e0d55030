"""Launch of a mode from a composed config: checkpoint to resume, run folder and ranks."""

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoseg.cli.extras import hush_schemas
from dinoseg.cli.ranks import LAUNCH_KEYS, is_first_rank, join_slurm, run_mode, run_ranks, shortages_as_user_errors
from dinoseg.config.credentials import check_credentials
from dinoseg.config.grammar import decode_keys
from dinoseg.config.limits import check_training
from dinoseg.config.options import options_of, values_in_files
from dinoseg.config.plain import BUILDS, to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment.folder import (
    LOG,
    claim,
    drop_bare,
    drop_empty,
    drop_parts,
    enter_within,
    has_results,
    lock,
    release,
    will_make,
    write_config,
)
from dinoseg.experiment.unread import is_read
from dinoseg.utils.cores import limit_spinning, limit_threads_to_quota, limit_threads_to_share
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.interrupt import Interrupted
from dinoseg.utils.private import check_private
from dinoseg.utils.wording import format_value, printable

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


def launch(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> Any:
    """Run the chosen mode and return its result: in this process for one device, else in ranks started from here.

    A mode with `resume_from: last` resumes in the checkpoint's own run folder; with `best` it uses a new one. A mode
    with `resumes_with` resumes in the given run folder if that holds the file of this name or no results.
    A mode with `devices` above 1 runs in that many ranks. If torchrun (WORLD_SIZE is set) or Slurm has started them,
    this process is one of them and uses the run folder of the first.

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
            cfg, run_folder = _enter_folder(cfg, out_dir, overrides)
            if devices == 1 or "WORLD_SIZE" in os.environ:
                return run_mode(cfg, run_folder)
            return run_ranks(cfg, run_folder, devices)
    except UserError:
        drop_bare(run_folder)
        raise
    except KeyboardInterrupt as stop:
        drop_empty(out_dir)  # if stopped while the recipe was being chosen
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        note = _interrupt_note(cfg, run_folder) if is_first_rank() else ""
        raise Interrupted(number, note=note, folder=run_folder) from None
    finally:
        release(run_folder)


def _join_ranks(cfg: DictConfig) -> int:
    """Check `cache_dir`, join the ranks of torchrun or Slurm, and return the number of devices."""
    limit_spinning()
    if not isinstance(cfg.get("cache_dir", ""), str):
        raise UserError(f"cache_dir={to_container(cfg)['cache_dir']}: give a folder, such as cache_dir=outputs/.cache.")
    if "cache_dir" in cfg.mode.get("reads", ()) and cfg.shared_cache is not True:
        check_private(Path(cfg.cache_dir).expanduser(), "cache_dir")
    if "devices" in cfg.mode:
        join_slurm()
        if "WORLD_SIZE" in os.environ:
            limit_threads_to_share()
    devices = cfg.mode.get("devices", 1)
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"engine.devices={devices}: give a whole number of at least 1.")
    return devices


def _enter_folder(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    """Find the run to resume, claim a run folder and write the config to it.

    Args:
        cfg: as composed.
        out_dir: created by Hydra for this run; removed if another folder is used.
        overrides: the words of the command line.
    """
    continued, new = None, out_dir
    recipe = _recipe(cfg, overrides)
    if recipe is not None:
        cfg = recipe.cfg
    if cfg.resume is not None and "resume_from" in cfg.mode:
        typed_recipe = cfg.choices.hparam
        cfg, continued = _resumed(cfg, out_dir, overrides)
        new = _below_recipe(out_dir, typed_recipe, cfg.choices.hparam)
    cfg = _settled_length(cfg, overrides)
    cfg, solo_runs = _with_heads(cfg, overrides, continued)
    if cfg.mode.get("resume_from") == "last":
        for whole in (cfg, *(solo.cfg for solo in solo_runs.values())):
            check_training(whole)
    # other ranks of torchrun only need the name: the first one creates the folder
    if not is_first_rank():
        if continued or new != out_dir:
            drop_empty(out_dir)
        return cfg, continued or new
    if continued is None:
        if new != out_dir:
            drop_empty(out_dir)
        resumes_with = resumes_in_folder(cfg, new)
        run_folder = new if resumes_with else claim(new)
        if run_folder != new and not _DEFAULT_NAME.fullmatch(new.name):  # a typed name; default names may collide
            message = f"hydra.run.dir={new} holds another run: this one is written to {run_folder}"
            print(printable(message), file=sys.stderr)
        if resumes_with:
            lock(new, instead="choose another hydra.run.dir")
            drop_parts(new)
    else:
        run_folder = continued
        lock(run_folder)
        drop_parts(run_folder)
        drop_empty(out_dir)
    write_config(cfg, run_folder, overrides)
    if recipe is not None and continued is None:
        recipe.write(run_folder / "config")
    for name, solo in solo_runs.items():
        folder = run_folder / "heads" / name
        enter_within(folder)
        write_config(solo.cfg, folder, solo.words)
    return cfg, run_folder


def _recipe(cfg: DictConfig, overrides: Sequence[str]) -> Any:
    """Return the `ChosenRecipe` of `hparam=auto`; None for other recipes and resumed runs.

    Raises:
        UserError: a budget is given to a recipe with fixed lengths, or nothing can be chosen.
    """
    reads_budget = "budget" in cfg.mode.get("reads", ())
    if cfg.choices.hparam != "auto":
        if reads_budget and cfg.budget.minutes is not None:
            raise UserError(
                f"budget.minutes={cfg.budget.minutes} has no effect without hparam=auto. Add hparam=auto, or set "
                "trainer.steps instead."
            )
        return None
    if not reads_budget or cfg.resume not in (None, "auto"):  # a resumed run has its choices
        return None
    from dinoseg.cli.auto.recipe import choose_recipe

    return choose_recipe(cfg, overrides, first=is_first_rank())


def _with_heads(cfg: DictConfig, overrides: Sequence[str], run: Path | None) -> tuple[DictConfig, dict[str, Any]]:
    """Return the config of a multi-head job, including each head's own run config, and these runs."""
    if "heads" not in cfg.trainer and cfg.get("heads") is None and cfg.get("lrs") is None:
        return cfg, {}
    from dinoseg.experiment.heads import SOLO, solo_runs

    runs = {
        name: solo._replace(cfg=_settled_length(solo.cfg, overrides))
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


def _resumed(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> tuple[DictConfig, Path | None]:
    """Return the config of the checkpoint that `resume` names, and its run folder if the mode resumes in place."""
    from dinoseg.experiment import resume
    from dinoseg.training import checkpoint

    path = resume.resumed_checkpoint(cfg, out_dir, cfg.mode.resume_from)
    if path is None:
        print("resume=auto: no earlier run of this recipe has a checkpoint; starting a new run.", file=sys.stderr)
        return resume.without_resume(cfg), None
    in_place = cfg.mode.resume_from == "last" and path.parent.name == checkpoint.FOLDER
    tell = in_place and is_first_rank()
    merged = resume.merge(cfg, _parsed(overrides), path, checkpoint.describe(path), tell=tell)
    return merged, path.parent.parent if in_place else None


def _settled_length(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Let a typed `trainer.steps` override the `trainer.epochs` of a recipe or checkpoint."""
    typed = {override.key_or_group for override in _parsed(overrides) if override.value() is not None}
    if {"trainer.steps", "trainer.epochs"} <= typed:
        raise UserError("trainer.steps and trainer.epochs both set the length of the training: set one of them.")
    if "trainer.steps" not in typed:
        return cfg
    return OmegaConf.merge(cfg, {"trainer": {"epochs": None}})  # type: ignore[return-value]


def _interrupt_note(cfg: DictConfig, folder: Path) -> str:
    """Return a note on what an interrupted run has left on disk."""
    if cfg.mode.get("resume_from") != "last":
        return f"finished results are in {folder}" if has_results(folder) else ""
    last = folder / "checkpoints" / "last.safetensors"
    if not last.exists():  # as in a run that is interrupted while torch is imported, which cannot be imported again
        return "this run has saved nothing"
    from dinoseg.training import checkpoint

    step = checkpoint.describe(last)["progress"]["step"]
    return f"{last} holds step {step}. To resume, add resume=auto or resume={folder} to the same command"


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _check_words(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a `+key` that no target takes, which Hydra would add silently, and keys that only files may set."""
    for override in _parsed(overrides):
        name = override.key_or_group
        hidden = [part for part in name.split(".") if part.startswith("_")]
        hidden += [key for table in _tables(decode_keys(override.value())) for key in map(str, table) if key in BUILDS]
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
    """Refuse a command line without a mode, for which `mode=help` is the default; name the modes that read its keys.

    Keys that no mode lists in its `reads`, such as `hparam`, count for every mode.
    """
    keys = {override.get_key_element().partition("@")[0] for override in _parsed(overrides)}
    if not keys or "mode" in keys or cfg.choices.mode != "help":
        return
    reads = {mode: values_in_files(_CONFIGS, mode, "mode.reads") for mode in options_of(_CONFIGS / "mode")}
    names = {mode: found[0] for mode, found in reads.items() if found}
    known = sorted(key for key in keys if any(is_read(key, each) for each in names.values()))
    fitting = [mode for mode, each in names.items() if all(is_read(key, each) for key in known)]
    which = f"Modes that read {' and '.join(known)}" if known and fitting else "Modes"
    raise UserError(
        f"No mode is given. Add mode=NAME. {which}: {', '.join(fitting or names)}. `--help` shows their commands."
    )


def _tables(value: Any) -> Iterator[Mapping[Any, Any]]:
    """Yield each table in a value of the command line, including the value itself."""
    if isinstance(value, Mapping):
        yield value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _tables(part)


def _is_taken(cfg: DictConfig, name: str) -> bool:
    """Return whether a key is at or below a node with a `_target_`, whose arguments are checked later."""
    nodes = [OmegaConf.select(cfg, name[:end]) for end, letter in enumerate(name) if letter == "."]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in nodes)
