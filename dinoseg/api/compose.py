"""Configs composed from Python: options and values of a call, and the words that a command line would have for them."""

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from dinoseg.api.options import config_folders
from dinoseg.cli.checkpoint_keys import checkpoint_keys
from dinoseg.cli.launch import Job
from dinoseg.cli.typos import check_words
from dinoseg.cli.words import as_text, parse_word
from dinoseg.config.composition import Value
from dinoseg.config.composition import compose as compose_config
from dinoseg.config.grammar import decode_keys, write_value
from dinoseg.config.job import read_words
from dinoseg.config.mistakes import unknown_option
from dinoseg.config.options import is_group, nested_groups, options_in
from dinoseg.config.plain import to_container
from dinoseg.config.resolvers import NOW, register_resolvers
from dinoseg.runs.location import locate_runs
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_text, format_value

_SIGNS = ("++", "+", "~")


class CallOverrides(NamedTuple):
    """Options of groups and values of keys that a call gives, and folders of config groups, the shipped one first."""

    options: dict[str, Any]
    values: list[Value]
    folders: Sequence[Path]


def compose(words: Sequence[str], *, config_dir: str | PathLike[str] | None = None) -> DictConfig:
    """Return the whole config of a job, as the command line composes it.

    Args:
        words: overrides as typed on the command line, such as `head=mlp` or `trainer.steps=100`.
        config_dir: further folder of config groups, as `--config-dir` names it.

    Raises:
        UserError: an unknown option or key, or a value that cannot be parsed.
    """
    return compose_job(read_call(words, {}, config_dir)).cfg


def compose_call(overrides: Mapping[str, Any], config_dir: str | PathLike[str] | None) -> DictConfig:
    """Return the whole config of a call that starts no job; see `read_call`."""
    options, values, folders = read_call((), overrides, config_dir)
    register_resolvers()
    return compose_config(options, values, folders[1:]).cfg


def compose_job(given: CallOverrides) -> Job:
    """Return the job of a call.

    Raises:
        UserError: an option or a key does not exist.
    """
    options, values, folders = given
    register_resolvers()
    later = checkpoint_keys(words_of(options, values), folders)
    composed = compose_config(options, values, folders[1:], later)
    text = str(to_container(composed.hydra.run)["dir"])
    # the resolver `now` is Hydra's; resolved once, as it holds the time
    OmegaConf.update(composed.hydra, "run.folder", text.replace("${now:", f"${{{NOW}:"), force_add=True)
    folder = Path(os.path.abspath(composed.hydra.run.folder))
    words = [word for word in words_of(options, composed.values) if not word.startswith(("hydra.", "hydra/"))]
    return Job(composed.cfg, locate_runs(composed.hydra, folder), words)


def read_call(
    words: Sequence[str], overrides: Mapping[str, Any], config_dir: str | PathLike[str] | None = None
) -> CallOverrides:
    """Return what a call gives by words of the command line, and then by Python values.

    An option may stand with keys below it: `data={"name": "camvid", "root": R}`. The option of a nested group is found
    at any depth, with dots or slashes: `data={"pixels": "files"}`. A `name` that is no option of the group is a key,
    such as the name of a model of timm. A mapping sets the keys below a mapping of the config. NumPy scalars, paths,
    devices, dtypes and tuples become numbers, text and lists. As on the command line, `${...}` in text refers to
    another key.

    Raises:
        UserError: a word cannot be parsed, or a group has a value that is no name of an option.
    """
    folders = config_folders(config_dir)
    words = as_text(words)
    check_words(words, folders)
    options, values, more = read_words(words, folders)
    given = CallOverrides(options, values, [*folders, *more])
    nested = nested_groups(folders)
    for key, value in overrides.items():
        sign = next((sign for sign in _SIGNS if key.startswith(sign)), "")
        _read_override(key.removeprefix(sign), value, sign, given, nested)
    return given


def _read_override(key: str, value: Any, sign: str, given: CallOverrides, nested: set[str]) -> None:
    """Add an override of a call to the given options and values."""
    path = key.partition("@")[0].replace(".", "/")
    group = path if path in nested else key.partition("@")[0]
    chooses = group in nested or is_group(given.folders, group)
    if chooses and not isinstance(value, Mapping):
        option = _plain_value(value)
        if not isinstance(option, str | list):
            raise unknown_option(group, format_text(write_value(option)), given.folders)
        given.options[sign + (group if path in nested else key)] = option
        return
    if not isinstance(value, Mapping):
        given.values.append(Value(key, _plain_value(value), sign))
        return
    keys = dict(value)
    if chooses and keys.get("name") in options_in(given.folders, group):
        given.options[sign + group] = keys.pop("name")
    if any(each.startswith(f"{path}/") for each in nested):
        for name, each in keys.items():
            _read_override(f"{path.replace('/', '.')}.{name}", each, sign, given, nested)
    elif keys or not chooses:
        given.values.append(Value(path.replace("/", "."), _plain_value(keys), sign))


def words_of(options: Mapping[str, Any], values: Sequence[Value]) -> list[str]:
    """Return the words of a command line that gives the same, for records: Hydra parses them back to these values.

    Raises:
        UserError: the name of a key has letters that Hydra's grammar lacks.
    """
    words = [key if option is None else f"{key}={write_value(option)}" for key, option in options.items()]
    return [*words, *map(_word_of, values)]


def _word_of(value: Value) -> str:
    if value.word:
        return value.sign + value.word.lstrip("+~")
    key = value.sign + value.key
    if value.sign == "~":
        return key
    texts = [value.value] if isinstance(value.value, str) else []  # as given, if Hydra reads it as that text
    for text in (*texts, write_value(value.value)):
        override = parse_word(f"{key}={text}")
        if override is None or override.is_sweep_override():
            continue
        if repr(decode_keys(override.value())) == repr(value.value):
            return f"{key}={text}"
    raise UserError(
        f"{key}={format_value(value.value)} cannot be written as an override. Give plain values, and keys with dots "
        "such as head.layers; set other names in a YAML file of your own."
    )


def _plain_value(value: Any) -> Any:
    """Return a value as None, bool, number, text, or lists and dicts of these; of other types as it is."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.device | torch.dtype):
        value = str(value).removeprefix("torch.")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain_value(name): _plain_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(each) for each in value]
    if isinstance(value, PathLike):
        return os.fsdecode(value)
    if isinstance(value, str):  # a subclass, such as a member of an enumeration
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    return value
