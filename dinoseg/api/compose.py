"""Configs composed from Python, with the options, keys and messages of the command line."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose as hydra_compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, open_dict, read_write

from dinoseg.api.options import CONFIGS, config_folders
from dinoseg.cli.extras import hush_schemas
from dinoseg.cli.own_keys import with_checkpoint_keys
from dinoseg.cli.typos import check_words, explain_errors
from dinoseg.cli.words import as_text, parse_word
from dinoseg.config.grammar import decode_keys, write_value
from dinoseg.config.job import job_config
from dinoseg.config.options import nested_groups, options_in
from dinoseg.config.plain import at, to_container
from dinoseg.config.resolvers import lent_resolvers
from dinoseg.experiment.folder import RunLocation, locate_runs
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

_OF_A_PROGRAM = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)  # Hydra's state, which a caller may use itself
_ONE_AT_A_TIME = threading.RLock()  # taken before the lock of resolvers
_OF_HYDRA = ("hydra", "_dummy_empty_config_.yaml")  # entries of its store of configs


def compose(words: Sequence[str], *, config_dir: str | PathLike[str] | None = None) -> DictConfig:
    """Return the whole config of a job, as the command line composes it; Hydra's global state does not change.

    Args:
        words: overrides as typed on the command line, such as `head=mlp` or `trainer.steps=100`.
        config_dir: further folder of config groups, as `--config-dir` names it.

    Raises:
        UserError: an unknown option or key, or a value that cannot be parsed.
    """
    with lent_hydra(), lent_resolvers(), warnings.catch_warnings():
        return compose_job(words, config_dir=config_dir).cfg


class Job(NamedTuple):
    """A composed command line: the whole config, where it runs, and the words without those of Hydra itself."""

    cfg: DictConfig
    location: RunLocation
    words: list[str]


def compose_job(words: Sequence[str], *, config_dir: str | PathLike[str] | None = None) -> Job:
    """Return the job of a command line, see `compose`; Hydra stays initialised, as modes expect it.

    Call it within `lent_hydra` and with registered resolvers.
    """
    folders = config_folders(config_dir)
    hush_schemas()
    words = with_checkpoint_keys(as_text(words), folders)
    with explain_errors(words, folders):
        check_words(words, folders)
        setbase("1.3")
        search_path = create_config_search_path(str(CONFIGS))
        for folder in folders[1:]:
            search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
        Hydra.create_main_hydra2("dinoseg", search_path)
        cfg = hydra_compose("main", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        out_dir = os.path.abspath(cfg.hydra.run.dir)  # resolved once, as it may hold the time
        with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = out_dir
    location = locate_runs(cfg.hydra, Path(out_dir))
    return Job(job_config(cfg, cfg.hydra), location, to_container(cfg.hydra.overrides)["task"])


def find_tables(
    words: Sequence[str], overrides: Mapping[str, Any], config_dir: str | PathLike[str] | None
) -> Callable[[str], bool] | None:
    """Return the function that states whether the config has a table at a key, with the options of the overrides.

    Without a mapping in `overrides` nothing has to be composed, and it is None.
    """
    if not any(isinstance(value, Mapping) for value in overrides.values()):
        return None
    options = {key: value for key, value in overrides.items() if not isinstance(value, Mapping)}
    cfg = to_container(compose([*words, *words_of(options)], config_dir=config_dir))
    return lambda key: isinstance(at(cfg, key.split(".")), Mapping)


def split_options(overrides: Mapping[str, Any], config_dir: str | PathLike[str] | None) -> dict[str, Any]:
    """Return overrides in which `data={"name": "camvid", "root": R}` is `data="camvid"` and `data.root=R`.

    The option of a nested group is found at any depth, with dots or slashes: `data={"pixels": "files"}` is
    `data/pixels=files`. A `name` that is no option of the group is a key, such as the name of a model of timm.
    """
    folders = config_folders(config_dir)
    nested = nested_groups(folders)
    split: dict[str, Any] = {}
    for key, value in overrides.items():
        split |= _split_option(key, value, folders, nested)
    return split


def _split_option(key: str, value: Any, folders: Sequence[Path], nested: set[str]) -> dict[str, Any]:
    group = key.lstrip("+").replace(".", "/")
    if group in nested:
        if isinstance(value, str):
            return {group: value}
        key = group.replace("/", ".")
    if not isinstance(value, Mapping):
        return {key: value}
    given = dict(value)
    options = {group: given.pop("name")} if value.get("name") in options_in(folders, group) else {}
    if options or any(each.startswith(f"{group}/") for each in nested):
        parts: dict[str, Any] = {}
        for name, each in given.items():
            parts |= _split_option(f"{key}.{name}", each, folders, nested)
        if options or not nested.isdisjoint(parts):
            return options | parts
    return {key: value}


def words_of(overrides: Mapping[str, Any], is_table: Callable[[str], bool] | None = None) -> list[str]:
    """Return overrides as words of a command line: `{"head": "mlp", "trainer": {"steps": 9}}` as `head=mlp`, ...

    Args:
        overrides: values by key. A key may be dotted, and a mapping sets the keys below a table of the config. None,
            True and False become null, true and false; NumPy scalars, paths, devices, dtypes and tuples become numbers,
            text and lists. As on the command line, `${...}` in text refers to another key.
        is_table: whether the config has a table at a full key; None: at every key without a dot.

    Raises:
        UserError: a value that no config holds, such as an array.
    """
    has_keys = is_table or (lambda key: "." not in key)
    words: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value and has_keys(key):
            words += words_of({f"{key}.{name}": each for name, each in value.items()}, has_keys)
        else:
            words.append(_as_word(key, _plain_value(value, key)))
    return words


def _as_word(key: str, value: Any) -> str:
    """Return a plain value as the word that Hydra parses back to the same value."""
    texts = [value] if isinstance(value, str) else []  # as typed, if Hydra does not read it as anything else
    for text in (*texts, write_value(value)):
        override = parse_word(f"{key}={text}")
        if override is None or override.is_sweep_override():
            continue
        if repr(decode_keys(override.value())) == repr(value):
            return f"{key}={text}"
    if set(key) & set("/+~"):
        raise UserError(f"{key} is not the name of a key. Write its words with dots, such as head.layers.")
    raise UserError(f"{key}={format_value(value)} cannot be written as an override. Set it in a YAML file of your own.")


def _plain_value(value: Any, key: str) -> Any:
    """Return a value as None, bool, number, text, or lists and dicts of these."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.device | torch.dtype):
        value = str(value).removeprefix("torch.")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain_value(name, key): _plain_value(each, key) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(each, key) for each in value]
    if isinstance(value, PathLike):
        return os.fsdecode(value)
    if isinstance(value, str):  # a subclass, such as a member of an enumeration
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    kind = type(value).__name__
    raise UserError(f"{key} is of type {kind}. Give text, a number, true or false, null, or a list or dict of these.")


@contextmanager
def lent_hydra() -> Iterator[None]:
    """Hide the state of the surrounding program's Hydra within the block, and restore it afterwards.

    Configs that the program has stored for groups of its own, such as `optim`, would be taken for schemas of ours.
    Blocks of several threads run one after another, since this state is the process's.
    """
    with _ONE_AT_A_TIME:
        instances = Singleton._instances
        store = ConfigStore.instance()
        before: dict[type, Any] = {kind: instances.pop(kind) for kind in _OF_A_PROGRAM if kind in instances}
        stored = store.repo
        store.repo = {name: node for name, node in stored.items() if name in _OF_HYDRA}
        try:
            yield
        finally:
            for kind in _OF_A_PROGRAM:
                instances.pop(kind, None)
            instances.update(before)
            store.repo = stored
