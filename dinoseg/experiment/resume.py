"""Config of a resumed run: that of the checkpoint, changed by the command line."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.composition import SHIPPED, compose_options, expand_short_forms
from dinoseg.config.grammar import decode_keys
from dinoseg.config.job import keys_with_values
from dinoseg.config.options import groups_of, options_in
from dinoseg.config.plain import has_key, keys_of, to_container
from dinoseg.config.stored import VALUES_ONLY, Source, choices_of, compose_stored
from dinoseg.experiment.recipe import (
    INITIAL,
    METRIC,
    SAVED,
    USE,
    USES,
    absolute,
    data_root,
    saved_config,
)
from dinoseg.training.description import PRECISION
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, format_value, printable, suggest_nearest

logger = logging.getLogger(__name__)
_UNBUILT = ("data", "loss", "trainer")  # groups that build nothing of a trained model
REPLACEABLE = ("data", *USES, METRIC)  # groups of a checkpoint that the command line may choose again


def merge(
    cfg: DictConfig, overrides: Sequence[Override], path: Path, info: Mapping[str, Any], *, tell: bool = False
) -> DictConfig:
    """Return `cfg` with the model, data and training settings of a checkpoint, changed by the command line.

    Args:
        cfg: composed from the command line.
        overrides: the command line's assignments.
        path: the checkpoint file.
        info: the description in the checkpoint.
        tell: whether to log the changes.

    Raises:
        UserError: the checkpoint's config is not to be trusted, or the command line names another model.
    """
    keys = [override.key_or_group for override in overrides]
    replaced = [group for group in REPLACEABLE if group in keys and cfg.choices[group] != info["choices"].get(group)]
    stored = {key: value for key, value in saved_config(info).items() if key not in replaced}
    source = Source(f"resume={path}", cfg.get("config_dirs", ()), parse_trust(to_container(cfg)["trust"]), keys)
    folders = [SHIPPED, *map(Path, cfg.get("config_dirs", ()))]
    # a training reads all groups of its recipe; `slots` comes with its trainer
    read = stored if "trainer" in cfg else groups_of(folders, cfg.choices.mode)
    unused = [key for key in stored if key not in read and choices_of(info["choices"], [key])]
    saved = compose_stored({**info, "config": stored}, source, unused=unused)
    ours = choices_of(to_container(cfg.choices), saved)
    choices = {group: option for group, option in to_container(cfg.choices).items() if group not in ours}
    choices |= {**choices_of(info["choices"], saved), "hparam": info["choices"]["hparam"]}
    choices |= {group: info["choices"][group] for group in replaced if group in info["choices"]}
    # settings of this machine and run
    facts = {**to_container(cfg), "resume": str(path), "choices": choices}
    facts |= {VALUES_ONLY: unused} if unused else {}
    facts |= {INITIAL: None}  # only a new run takes it from the command line
    merged = OmegaConf.create({**facts, **saved})
    _keep_precision(merged, info, keys)
    if "data" in saved:
        merged.data.root, remark = data_root(saved, Path(info["folder"]))
        if remark and "data.root" not in keys:
            print(printable(f"resume={path}: {remark}"), file=sys.stderr)
    before = deepcopy(merged)
    # options first: another data= replaces the whole group, in which typed keys then take effect
    for option in (override for override in overrides if override.key_or_group in cfg.choices):
        _take_option(option, cfg, merged, path)
    for value in (override for override in overrides if override.key_or_group not in cfg.choices):
        _take_value(value, cfg, merged, path)
    is_lifted = _lift_time_limit(cfg, merged, keys)
    merged = expand_short_forms(merged, keys_with_values(overrides))
    changed = _changes(before, merged, overrides) if tell else []
    if tell and is_lifted:
        changed.append(f"trainer.max_minutes=null instead of {before.trainer.max_minutes:g}, since a length is given")
    if changed:
        logger.info("resume=%s: resumes with %s", path, ", ".join(changed))
    return merged


def standalone_config(
    path: Path,
    info: Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    inference: str | None = None,
    trust: Sequence[str] = (),
    job: Mapping[str, Any] | None = None,
    config_dir: Path | None = None,
    unused: Sequence[str] = _UNBUILT,
    key: str = "resume",
) -> DictConfig:
    """Return the config for using the model of a checkpoint without a command line.

    Hydra is neither initialised nor read: the caller may be a Hydra program of its own.

    Args:
        path: the checkpoint file.
        info: the description in the checkpoint.
        changes: dotted key to the user's own value, such as `engine.device` or `backbone.weights`.
        inference: option of that group, instead of the file's own.
        trust: hub ids that the file may name.
        job: config of the job that uses the checkpoint, whose folders of config groups and `trust` count as well.
        config_dir: folder of further config groups, without a job.
        unused: groups whose options are not composed, since they build nothing of a model.
        key: of the config, which names the file in messages.

    Raises:
        UserError: the checkpoint's config is refused.
    """
    folders = [] if config_dir is None else [str(config_dir)]
    folders += [] if job is None else job.get("config_dirs", ())
    trust = trust if job is None else [*trust, *parse_trust(job["trust"])]
    chosen = {"engine": "auto"}
    stored = {key: value for key, value in saved_config(info).items() if key != METRIC}
    if inference is not None:
        known = options_in([SHIPPED, *map(Path, folders)], USE)
        if inference not in known:
            raise UserError(f"inference={inference} is unknown. Choose one of {', '.join(known)}.")
        chosen[USE] = inference
        stored.pop(USE, None)
    source = Source(f"{key}={path}", folders, trust, [*changes])
    saved = compose_stored({**info, "config": stored}, source, unused=unused)
    facts = {"resume": str(path), "choices": {**info["choices"], **chosen}, "config_dirs": folders}
    facts[VALUES_ONLY] = [*unused]
    merged = OmegaConf.create({**compose_options(chosen, folders), **facts, **saved})
    _keep_precision(merged, info, [*changes])
    for changed, value in changes.items():
        OmegaConf.update(merged, changed, value)
    return expand_short_forms(merged, ())


def _keep_precision(merged: DictConfig, info: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Compute in float32 if the run of a checkpoint was set to, unless `keys` name a precision."""
    is_open = "engine.precision" not in keys and merged.engine.get("precision", "auto") == "auto"
    if is_open and info.get(PRECISION) is not None:
        merged.engine.precision = info[PRECISION]


def to_evaluation(cfg: DictConfig, step: int) -> DictConfig:
    """Return the config of a resumed run whose training ended at `step`: only its final evaluation is left."""
    length = {"steps": step, "epochs": None, "max_minutes": None}
    return OmegaConf.merge(cfg, {"trainer": length})  # type: ignore[return-value]


def without_resume(cfg: DictConfig) -> DictConfig:
    """Return `cfg` without a run to resume."""
    return OmegaConf.create({**to_container(cfg), "resume": None})


def parse_trust(trust: Any) -> list[str]:
    """Return the value of `trust`, or raise a UserError if it is not a list of names."""
    names = trust or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"trust={names}: give a list of hub ids, such as trust=[my-org/my-dino].")
    return names


def _take_option(override: Override, cfg: DictConfig, merged: DictConfig, path: Path) -> None:
    """Apply another data, inference or slots option of the command line; refuse options that the checkpoint fixes."""
    group = override.key_or_group
    option, was = cfg.choices[group], merged.choices[group]
    if group in REPLACEABLE and option != was:
        merged.choices[group] = option
    elif option != was:
        raise UserError(
            f"{group}={option}: the checkpoint {path} was trained with {group}={was}. Leave {group} out, or "
            f"start a new run without resume."
        )


def _take_value(override: Override, cfg: DictConfig, merged: DictConfig, path: Path) -> None:
    """Apply a typed value to the checkpoint's config; keys that checkpoints do not save are already set in it."""
    name = override.key_or_group
    if name == INITIAL:
        return _check_initial(override.value(), cfg, merged, path)
    if name.split(".")[0] not in SAVED:
        return
    if not (override.is_add() or override.is_force_add()):
        _check_key(name, cfg, merged, path)
    OmegaConf.update(merged, name, decode_keys(override.value()))


def _lift_time_limit(cfg: DictConfig, merged: DictConfig, keys: Sequence[str]) -> bool:
    """Remove the time limit if the command sets a length and no limit; return whether there was a limit."""
    is_lifted = bool({"trainer.steps", "trainer.epochs"} & {*keys}) and merged.trainer.get("max_minutes") is not None
    # a limit that is typed or in its config files stays: without it, the same command would not find its run again
    is_lifted = is_lifted and cfg.trainer.get("max_minutes") is None
    if is_lifted:
        merged.trainer.max_minutes = None
    return is_lifted


def _changes(before: DictConfig, merged: DictConfig, overrides: Sequence[Override]) -> list[str]:
    """Return a text for each setting that the command line changes from the checkpoint's, with both values."""
    found = []
    for override in overrides:
        name = override.key_or_group
        is_group = name in before.choices
        old, new = (each.choices[name] if is_group else _at(each, name) for each in (before, merged))
        if new != old and not _same_path(old, new):
            found.append(f"{name}={format_value(format_override(new))} instead of {format_value(format_override(old))}")
    return found


def _at(cfg: DictConfig, key: str) -> Any:
    found = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _same_path(old: Any, new: Any) -> bool:
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    try:
        return os.path.realpath(os.path.expanduser(old)) == os.path.realpath(os.path.expanduser(new))
    except ValueError:  # a path cannot contain a null byte, a value from a file can
        return False


def _check_initial(given: Any, cfg: DictConfig, merged: DictConfig, path: Path) -> None:
    """Refuse an `init` other than the one that the run started from: a resumed run has its own weights."""
    began = merged.get(INITIAL)
    if INITIAL in cfg and given is not None and absolute(given) != began:
        raise UserError(
            f"init={given}: the run of {path} resumes with its own weights, and started "
            f"{'without' if began is None else f'with init={began}'}. Leave init out, or, for a new run, resume."
        )


def _check_key(name: str, cfg: DictConfig, merged: DictConfig, path: Path) -> None:
    """Refuse a key that the checkpoint's config lacks, unless the same option has gained it since."""
    known, group = to_container(merged), name.split(".")[0]
    newer = cfg.choices.get(group) == merged.choices.get(group) and has_key(to_container(cfg), name)
    if not newer and not has_key(known, name):
        alike = [key for key in keys_of(known) if key.split(".")[0] in SAVED]
        raise UserError(
            f"{name} is not a key of the config of resume={path}.{suggest_nearest(name, alike)} To add it anyway, give "
            f"++{name}=VALUE."
        )
