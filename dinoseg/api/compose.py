"""Configs composed from Python, with the options, keys and messages of the command line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig
from yaml import YAMLError

from dinoseg.api.options import folder_of
from dinoseg.cli.extras import check_intervals, hush_schemas
from dinoseg.cli.own_keys import with_checkpoint_keys
from dinoseg.cli.recipes import with_recipe_files
from dinoseg.cli.typos import explain, explain_value
from dinoseg.cli.words import as_text
from dinoseg.config.job import job_config
from dinoseg.config.resolvers import lent_resolvers
from dinoseg.experiment.composed import searching
from dinoseg.utils.errors import UserError

CONFIGS = Path(__file__).parents[1] / "cfg"
_OF_A_PROGRAM = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)  # Hydra's state, which a caller may use itself
_PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_][\w./-]*", re.IGNORECASE)  # text that needs no quotes


def compose(words: Sequence[str], *, config_dir: str | PathLike[str] | None = None) -> DictConfig:
    """Return the whole config of a job, as the command line composes it; Hydra's global state does not change.

    Args:
        words: overrides as typed on the command line, such as `head=mlp` or `trainer.steps=100`.
        config_dir: further folder of config groups, as `--config-dir` names it.

    Raises:
        UserError: an unknown option or key, or a value that cannot be parsed.
    """
    folders = [CONFIGS, *([] if config_dir is None else [folder_of(config_dir)])]
    with lent_resolvers(), _hydra_of_its_own():
        hush_schemas()
        words = with_recipe_files(as_text(words, CONFIGS), folders)
        check_intervals(words)
        words = with_checkpoint_keys(words)
        searched = [searching([f"file://{folder}" for folder in folders[1:]])] if folders[1:] else []
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                cfg = hydra_compose("main", [*words, *searched], return_hydra_config=True)
                return job_config(cfg, cfg.hydra.runtime.choices)
        except HydraException as error:
            raise UserError(explain(words, folders, error)) from error
        except YAMLError as error:
            text = " ".join(str(error).split())
            raise UserError(f"A config file is not valid YAML: {text}. Correct the file.") from error
        except ValueError as error:
            message = explain_value(words, folders, error)
            if not message:
                raise
            raise UserError(message) from error


def words_of(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as words of a command line: `{"head": "mlp", "trainer": {"steps": 9}}` as `head=mlp`, ...

    Args:
        overrides: values by key. A key may be dotted, and a mapping sets the keys below a group. Python's None, True
            and False are null, true and false.

    Raises:
        UserError: a value that no config holds, such as an array.
    """
    words = []
    for key, value in overrides.items():
        below = value if isinstance(value, Mapping) and "." not in key else {None: value}
        for name, each in below.items():
            full = key if name is None else f"{key}.{name}"
            words.append(f"{full}={_as_word(each, full)}")
    return words


def _as_word(value: Any, key: str) -> str:
    """Return a value in Hydra's grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PathLike):
        text = str(value)
        return text if _PLAIN.fullmatch(text) else QuotedString(text, Quote.double).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_as_word(each, key)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_as_word(each, key) for each in value) + "]"
    kind = type(value).__name__
    raise UserError(f"{key} is of type {kind}. Give text, a number, true or false, null, or a list or dict of these.")


@contextmanager
def _hydra_of_its_own() -> Iterator[None]:
    """Hide the state of the surrounding program's Hydra within the block, and restore it afterwards."""
    instances = Singleton._instances
    before: dict[type, Any] = {kind: instances.pop(kind) for kind in _OF_A_PROGRAM if kind in instances}
    try:
        yield
    finally:
        for kind in _OF_A_PROGRAM:
            instances.pop(kind, None)
        instances.update(before)
