"""Config of a job that uses a checkpoint: composed from the options and values in the file, and the typed words."""

import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config import expansion
from dinoseg.config.composition import SHIPPED, Value, compose, compose_options, expand_short_forms, set_values
from dinoseg.config.job import read_words
from dinoseg.config.options import choices_of, groups_of, root_of
from dinoseg.config.plain import has_key, keys_of, to_container, value_at
from dinoseg.config.stored import VALUES_ONLY, Source, compose_stored
from dinoseg.experiment.recipe import absolute, data_root, saved_config
from dinoseg.training.description import INITIAL, METRIC, PRECISION, USE, USES
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, format_text, printable

logger = logging.getLogger(__name__)
_UNBUILT = ("data", "loss", "trainer")  # groups that build nothing of a trained model
REPLACEABLE = ("data", *USES, METRIC)  # groups of a checkpoint that the command line may choose again
_LIMIT = "trainer.max_minutes"


def compose_resumed(
    cfg: DictConfig, words: Sequence[str], path: Path, info: Mapping[str, Any], *, tell: bool = False
) -> DictConfig:
    """Return the config of a job that uses a checkpoint: the file's groups, the job's own, and typed values over both.

    Args:
        cfg: of the job, composed without the checkpoint.
        words: of the job's command line.
        path: the checkpoint file.
        info: the description in the checkpoint.
        tell: whether to log what the words change.

    Raises:
        UserError: the checkpoint's config is refused, a word chooses another model, or no group has a typed key.
    """
    own_folders = cfg.get("config_dirs", ())
    folders = [SHIPPED, *map(Path, own_folders)]
    options, given, _ = read_words(words, folders)
    typed = {group: cfg.choices[group] for group in options if group in cfg.choices}
    stored = _stored_groups(info, typed, path)
    values = [_over_stored(value, stored) for value in _values_of_run(given, stored, cfg, path)]
    names = _names_of(values)
    unused = _unused_groups(info, stored, groups_of(folders, cfg.choices.mode))
    source = Source(f"resume={path}", own_folders, to_container(cfg)["trust"] or (), names)
    replaced = _names_of([value for value in values if not value.sign])  # `++` adds to a stored mapping
    saved = compose_stored({**info, "config": stored}, source, unused=unused, replaced=replaced)
    saved.setdefault(INITIAL, None)  # only a new run takes it from a config file
    if "data" in stored:
        stored["data"] = {**stored["data"], "root": _find_root(info, stored, path, is_typed="data.root" in names)}
        saved["data"]["root"] = stored["data"]["root"]
    of_checkpoint = [value for value in values if root_of(value.key) in saved and root_of(value.key) not in unused]
    others = [value for value in values if value not in of_checkpoint]
    own = {**to_container(compose(options, others, own_folders).cfg), "resume": str(path)}
    merged = _join(own, saved, of_checkpoint, info, unused)
    _keep_precision(merged, info, names)
    if tell:
        before = expansion.merge([own, saved, stored])
        changed = _changes({**own["choices"], **info["choices"]}, before, merged, typed, values)
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
    trust = trust if job is None else [*trust, *(job["trust"] or ())]
    chosen = {"engine": "auto"}
    stored = {key: value for key, value in saved_config(info).items() if key != METRIC}
    if inference is not None:
        chosen[USE] = inference
        stored.pop(USE, None)
    source = Source(f"{key}={path}", folders, trust, [*changes])
    saved = compose_stored({**info, "config": stored}, source, unused=unused, replaced=[*changes])
    choices = {**info["choices"], **chosen}
    facts = {"resume": str(path), "choices": choices, "config_dirs": folders}
    own = {**compose_options(chosen, folders), **facts}
    values = [Value(changed, value) for changed, value in changes.items()]
    merged = _join(own, saved, values, info, unused)
    _keep_precision(merged, info, [*changes])
    return merged


def _join(
    own: Mapping[str, Any],
    saved: Mapping[str, Any],
    values: Sequence[Value],
    info: Mapping[str, Any],
    unused: Sequence[str],
) -> DictConfig:
    """Return the config of a job with the groups of a checkpoint instead of its own, and values set in it.

    Args:
        own: plain config of the job, with `choices` and `config_dirs`.
        saved: root keys of the checkpoint, as `compose_stored` returns them.
        values: to set.
        info: the description in the checkpoint.
        unused: groups of which `saved` has the values alone.
    """
    others = {group: option for group, option in own["choices"].items() if root_of(group) not in saved}
    choices = {**others, **choices_of(info["choices"], saved), "hparam": info["choices"]["hparam"]}
    cfg = OmegaConf.create({**own, **{key: node for key, node in saved.items() if key not in unused}})
    set_values(cfg, values, choices, [SHIPPED, *map(Path, own["config_dirs"])])
    whole = {**to_container(cfg), "choices": choices}
    if unused:
        whole |= {VALUES_ONLY: [*unused], **{key: node for key, node in saved.items() if key in unused}}
    return expand_short_forms(OmegaConf.create(whole), {value.key for value in values if value.value is not None})


def _over_stored(value: Value, stored: Mapping[str, Any]) -> Value:
    """Return a typed value, with `++` instead of `+` for a key that the run has added: its own command has `+`."""
    return value._replace(sign="++") if value.sign == "+" and has_key(stored, value.key) else value


def _names_of(values: Sequence[Value]) -> set[str]:
    """Return the keys that values set, and those in the mappings among them."""
    set_keys = [value for value in values if value.sign != "~"]
    mappings = [value for value in set_keys if isinstance(value.value, Mapping)]
    below = [key for value in mappings for key in keys_of(value.value, f"{value.key}.")]
    return {*(value.key for value in set_keys), *below}


def _keep_precision(merged: DictConfig, info: Mapping[str, Any], keys: Collection[str]) -> None:
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


def _stored_groups(info: Mapping[str, Any], typed: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the groups that a job takes from a checkpoint: all but those of which it may choose another option.

    Args:
        info: the description in the checkpoint.
        typed: option of each group that the words choose.
        path: the checkpoint file.

    Raises:
        UserError: the words choose another option of a group that the checkpoint fixes.
    """
    others = {group: option for group, option in typed.items() if option != info["choices"].get(group)}
    stored = {key: value for key, value in saved_config(info).items() if key not in {*REPLACEABLE} & {*others}}
    for group, option in others.items():
        if root_of(group) in (*stored, "hparam"):
            raise UserError(
                f"{group}={option}: the checkpoint {path} was trained with {group}={info['choices'].get(group)}. Leave "
                f"{group} out, or start a new run without resume."
            )
    return stored


def _unused_groups(info: Mapping[str, Any], stored: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Return the stored groups that a mode does not build: those not in `read`, the groups of its defaults lists."""
    if "trainer" in read:  # a training reads all groups of its recipe; some come with its trainer
        return []
    return [key for key in stored if key not in read and choices_of(info["choices"], [key])]


def _values_of_run(values: Sequence[Value], stored: Mapping[str, Any], cfg: DictConfig, path: Path) -> list[Value]:
    """Return the typed values without `init`, and without the run's time limit if they set another length.

    Raises:
        UserError: `init` is not the one that the run started from: a resumed run has its own weights.
    """
    began = stored.get(INITIAL)
    for given in (value.value for value in values if value.key == INITIAL):
        if given is not None and absolute(given) != began:
            raise UserError(
                f"init={given}: the run of {path} resumes with its own weights, and started "
                f"{'without' if began is None else f'with init={began}'}. Leave init out, or, for a new run, resume."
            )
    kept = [value for value in values if value.key != INITIAL]
    names = _names_of(kept)
    # a limit that is typed or in config files stays: without it, the same command would not find its run again
    has_limit = _LIMIT in names or OmegaConf.select(cfg, _LIMIT) is not None
    if (
        {"trainer.steps", "trainer.epochs"} & names
        and not has_limit
        and stored["trainer"].get("max_minutes") is not None
    ):
        kept.append(Value(_LIMIT, None))
    return kept


def _find_root(info: Mapping[str, Any], stored: Mapping[str, Any], path: Path, *, is_typed: bool) -> str:
    """Return the data root of a run, and warn on the choice between two folders unless the words set another."""
    root, remark = data_root(stored, Path(info["folder"]))
    if remark and not is_typed:
        print(printable(f"resume={path}: {remark}"), file=sys.stderr)
    return root


def _changes(
    options: Mapping[str, Any],
    before: Mapping[str, Any],
    merged: DictConfig,
    typed: Collection[str],
    values: Sequence[Value],
) -> list[str]:
    """Return a text for each setting that the words change from the checkpoint's, with both values.

    Args:
        options: option of each group before.
        before: the config without the words, as plain values.
        merged: the config with them.
        typed: groups that the words choose.
        values: that the words set.
    """
    found = [(group, options[group], merged.choices[group], "") for group in typed]
    for value in values:
        reason = "" if value.word else ", since a length is given"
        found.append((value.key, value_at(before, value.key.split(".")), _at(merged, value.key), reason))
    return [
        f"{name}={format_text(format_override(new))} instead of {format_text(format_override(old))}{reason}"
        for name, old, new, reason in found
        if new != old and not _same_path(old, new)
    ]


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
