"""Config of a resumed run: that of the checkpoint, changed by the command line."""

import os
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.guard import guard
from dinoseg.config.job import machine_config, squared
from dinoseg.config.plain import has_key, keys_of, to_container
from dinoseg.config.registry import full_registry, shipped_registry
from dinoseg.experiment.recipe import (
    INITIAL,
    SAVED,
    USE,
    USES,
    absolute,
    data_root,
    saved_config,
)
from dinoseg.training.description import CHOSEN, PRECISION
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, format_value, nearest, printable


def merge(
    cfg: DictConfig, overrides: Sequence[Override], path: Path, info: Mapping[str, Any], *, tell: bool = False
) -> DictConfig:
    """Return `cfg` with the model, data and training settings of a checkpoint, changed by the command line.

    Args:
        cfg: composed from the command line.
        overrides: the command line's assignments.
        path: the checkpoint file.
        info: the description in the checkpoint.
        tell: whether to print the changes.

    Raises:
        UserError: the checkpoint's config is not to be trusted, or the command line names another model.
    """
    saved, keys = saved_config(info), [override.key_or_group for override in overrides]
    guard(saved, f"resume={path}", to_container(cfg), trust=trusted(to_container(cfg)["trust"]), typed=keys)
    choices = {group: option for group, option in info["choices"].items() if group in (*CHOSEN, *USES)}
    # settings of this machine and run
    facts = {**to_container(cfg), "resume": str(path), "choices": {**to_container(cfg.choices), **choices}}
    facts |= {INITIAL: None}  # only a new run takes it from the command line
    merged = OmegaConf.create({**facts, **saved})
    _keep_precision(merged, info, keys)
    merged.data.root, remark = data_root(saved, Path(info["folder"]))
    if remark and not {"data", "data.root"} & {*keys}:
        print(printable(f"resume={path}: {remark}"), file=sys.stderr)
    before = deepcopy(merged)
    # options first: another data= replaces the whole group, in which typed keys then take effect
    for option in (override for override in overrides if override.key_or_group in (*CHOSEN, *USES)):
        _take_option(option, cfg, merged, path)
    for value in (override for override in overrides if override.key_or_group not in (*CHOSEN, *USES)):
        _take_value(value, cfg, merged, path)
    is_lifted = _lift_time_limit(merged, keys)
    merged = squared(merged)
    changed = _changes(before, merged, overrides) if tell else []
    if tell and is_lifted:
        changed.append(f"trainer.max_minutes=null instead of {before.trainer.max_minutes:g}, since a length is given")
    if changed:
        print(printable(f"resume={path}: resumes with {', '.join(changed)}"), file=sys.stderr)
    return merged


def standalone_config(
    path: Path,
    info: Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    inference: str | None = None,
    trust: Sequence[str] = (),
    job: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Return the config for using a checkpoint without a command line, validated against the shipped config files.

    Without `job`, Hydra is neither initialised nor read: the caller may be a Hydra program of its own.

    Args:
        path: the checkpoint file.
        info: the description in the checkpoint.
        changes: dotted key to the user's own value, such as `engine.device` or `backbone.weights`.
        inference: option of that group, instead of the file's own.
        trust: packages and hub IDs that the file may name, in addition to those in config files.
        job: config of the job that uses the checkpoint; its own config files and its `trust` then count as well.

    Raises:
        UserError: the checkpoint's config is not to be trusted.
    """
    saved, cfg = saved_config(info), machine_config(inference or "auto")
    registry = shipped_registry() if job is None else full_registry(job)
    trust = trust if job is None else [*trust, *trusted(job["trust"])]
    guard(saved, f"resume={path}", to_container(cfg), trust=trust, typed=[*changes], registry=registry)
    reused = {key: value for key, value in saved.items() if not (inference and key == USE)}
    choices = {**to_container(cfg.choices), **info["choices"], **({USE: inference} if inference else {})}
    merged = OmegaConf.create({**to_container(cfg), "resume": str(path), "choices": choices, **reused})
    _keep_precision(merged, info, [*changes])
    for key, value in changes.items():
        OmegaConf.update(merged, key, value)
    return squared(merged)


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


def trusted(trust: Any) -> list[str]:
    """Return the value of `trust`, or raise a UserError if it is not a list of names."""
    names = trust or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"trust={names}: give a list of packages or hub ids, such as trust=[my_package].")
    return names


def _take_option(override: Override, cfg: DictConfig, merged: DictConfig, path: Path) -> None:
    """Apply another data, inference or slots option of the command line; refuse options that the checkpoint fixes."""
    group = override.key_or_group
    option, was = cfg.choices[group], merged.choices[group]
    if group in ("data", *USES) and option != was:
        merged[group], merged.choices[group] = cfg[group], option
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
    OmegaConf.update(merged, name, override.value())


def _lift_time_limit(merged: DictConfig, keys: Sequence[str]) -> bool:
    """Remove the time limit if the command line sets only a new length; return whether there was a limit."""
    is_lifted = bool({"trainer.steps", "trainer.epochs"} & {*keys}) and "trainer.max_minutes" not in keys
    is_lifted = is_lifted and merged.trainer.get("max_minutes") is not None
    if is_lifted:
        merged.trainer.max_minutes = None
    return is_lifted


def _changes(before: DictConfig, merged: DictConfig, overrides: Sequence[Override]) -> list[str]:
    """Return a text for each setting that the command line changes from the checkpoint's, with both values."""
    found = []
    for override in overrides:
        name = override.key_or_group
        where = "choices." * (name in (*CHOSEN, *USES)) + name
        old, new = (_at(each, where) for each in (before, merged))
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
    if INITIAL in cfg.mode.get("reads", ()) and given is not None and absolute(given) != began:
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
            f"{name} is not a key of the config of resume={path}.{nearest(name, alike)} To add it anyway, give "
            f"++{name}=VALUE."
        )
