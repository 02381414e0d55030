"""Error messages for command lines that Hydra could not compose."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinoseg.cli.own_keys import checkpoint_configs
from dinoseg.cli.words import assignments, is_sweep, parsed, values_of
from dinoseg.config.options import options_of
from dinoseg.config.plain import at, keys_of, to_container
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value, join_names, nearest

_ALL_KEYS = "Add `--cfg job` to see all keys, `--help` alone to see all groups and options."


@contextmanager
def explained(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    """Turn errors of composing a command line into a `UserError` that names the mistake and its fix.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.

    Raises:
        UserError: instead of an error of Hydra, of a YAML file, or of a value that an override gives.
    """
    try:
        yield
    except UserError:  # some are also errors of OmegaConf
        raise
    except HydraException as error:
        raise UserError(explain(arguments, folders, error)) from None
    except YAMLError as error:  # in a user's config file
        text = " ".join(str(error).split())
        raise UserError(f"A config file is not valid YAML: {text}. Correct the file.") from None
    except ValueError as error:  # by Hydra and OmegaConf for invalid values, or by a job
        if message := explain_value(arguments, folders, error):
            raise UserError(message) from None
        raise


def explain(arguments: Sequence[str], folders: Sequence[Path], error: Exception) -> str:
    """Return the mistake and its fix; Hydra's own message if no mistake is recognised.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.
        error: raised by Hydra.
    """
    several = is_sweep(arguments)
    chosen: list[str] = []
    overrides: list[Override] = []
    for _, word in assignments(arguments):
        override, mistake = _read(word)
        if override is None:
            return mistake
        if override.is_sweep_override() and not several:
            return (
                f"{word} gives several values. For a list use brackets: '{override.key_or_group}=[{_value(word)}]'. "
                "For a run with each of them, add -m."
            )
        groups = [folder / override.get_key_element().split("@")[0] for folder in folders]
        if override.is_add() or override.is_delete() or override.key_or_group.startswith("hydra"):
            continue
        if any(group.is_dir() for group in groups):
            if mistake := _wrong_option(override, groups):
                return mistake
            chosen += [f"{override.get_key_element()}={option}" for option in _chosen(override, groups)[:1]]
        else:
            overrides.append(override)
    return _wrong_key(overrides, chosen, folders, checkpoint_configs(arguments, folders)) or _hydra_message(error)


def check_patterns(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse a sweep's glob that matches no option: Hydra would run nothing, without a message.

    Raises:
        UserError: naming the existing options.
    """
    for _, word in assignments(arguments) if is_sweep(arguments) else ():
        override = parsed(word)
        if override is not None and isinstance(override.value(), Glob):
            groups = [folder / override.key_or_group for folder in folders]
            if mistake := _wrong_option(override, groups):
                raise UserError(mistake)


def misplaced(words: Sequence[str], folders: Sequence[Path], error: Exception) -> str:
    """Return which override of a composed command line caused an error; "" if none did.

    Recognised are a group of keys that is deleted or replaced by a value, and an interpolation of a missing key.

    Args:
        words: the overrides of the command line.
        folders: of config groups, the shipped one first.
        error: raised by a job.
    """
    overrides = [
        override for word in words if (override := parsed(word)) and not override.key_or_group.startswith("hydra")
    ]
    keys = {override.key_or_group for override in overrides}
    groups = {key for key in keys if any((folder / key).is_dir() for folder in folders)}
    known = groups - {override.key_or_group for override in overrides if override.is_delete()}
    cfg = _composed([override.input_line or "" for override in overrides if override.key_or_group in known], folders)
    for override in overrides:
        key, value = override.key_or_group, override.value()
        node = at(cfg, key.split("."))
        if override.is_delete():
            return f"~{key} removes a key that is read. Leave it out, or set {key} to another value."
        if key not in groups and (mistake := _below_a_value(key, cfg) or _other_shape(key, value, node)):
            return mistake
    for override in overrides:
        if isinstance(error, OmegaConfBaseException) and "${" in str(override.value()):
            return (
                f"{override.input_line} refers to a key that does not exist, or is not a valid value. Give a value, or "
                "the full name of another key, such as '${seed}'."
            )
    if isinstance(error, OmegaConfBaseException):
        key = error.full_key or "A key"
        cause = (str(error).strip().splitlines() or ["no details"])[0]
        return f"{key} has no usable value after {' '.join(words)} ({cause}). Undo these overrides."
    return ""


def _below_a_value(key: str, cfg: Mapping[str, Any]) -> str:
    """Return the mistake of a key below a plain value or null; "" if there is none."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        above, name = at(cfg, parts[: end - 1]), ".".join(parts[:end])
        # below the root, null may stand for a table
        there = (
            isinstance(above, Mapping) and parts[end - 1] in above and (end == 1 or above[parts[end - 1]] is not None)
        )
        if there and not isinstance(above[parts[end - 1]], Mapping):
            return f"{key}: {name} is a single value and has no keys below it. Set it as {name}=VALUE."
    return ""


def explain_value(arguments: Sequence[str], folders: Sequence[Path], error: ValueError) -> str:
    """Return which override caused an error while the config was composed; "" if none did.

    Recognised are a number as a group's option, a deleted option that names the run folder, and a name below a list.
    OmegaConf reads the last as an item's index, and only reports an invalid integer.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.
        error: the error raised.
    """
    words = [word for _, word in assignments(arguments)]
    if isinstance(error, OmegaConfBaseException):
        return misplaced(words, folders, error)
    if "Config group override must be" in str(error):
        return explain(arguments, folders, error)
    name = str(error).rpartition("invalid literal for int() with base 10: ")[2].strip("'")
    word = next((word for word in words if _key(word).endswith(f".{name}")), None)
    if word is None:
        return ""
    return f"{word}: a list has no key {name}. Its items are numbered from 0, as in data.classes.0=VALUE."


def _composed(chosen: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the config composed from these options alone."""
    sources = ",".join(f'"file://{folder.absolute()}"' for folder in folders[1:])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        return to_container(compose("main", [f"hydra.searchpath=[{sources}]", *chosen]))


def _read(word: str) -> tuple[Override | None, str]:
    if "=" not in word and not word.startswith("~"):
        return None, f"{word} is not KEY=VALUE.{f' Did you mean mode={word}?' if word.isidentifier() else ''}"
    if override := parsed(word):
        return override, ""
    form = f'"{_value(word)}"' if _is_text(_value(word)) else '["a value"]'
    return None, (
        f"{word} cannot be parsed: brackets, braces or quotes are not closed, or the text inside them holds special "
        f"characters. Quote the whole word, and the text inside it: '{_key(word)}={form}'."
    )


def _is_text(value: str) -> bool:
    """Return whether a value with braces or brackets, such as {split}/pictures, is text: neither a list nor a table."""
    closed = all(value.count(first) == value.count(last) for first, last in ("[]", "{}"))
    return closed and not re.search(r"['\"]|^\[.*\]$|^\{.*\}$", value)


def _wrong_option(override: Override, groups: Sequence[Path]) -> str:
    """Return the mistake of an option that no folder of the group has; "" if all exist."""
    options = _options(groups)
    bases = {path.stem for group in groups for path in group.glob("_*.yaml")}
    name = override.key_or_group
    for choice in _chosen(override, groups):
        if choice not in bases.union(options):
            question = nearest(choice, options, f"{name}=")
            return f"{name}={choice} is unknown.{question} Choose from {', '.join(options)}."
    return ""


def _options(groups: Sequence[Path]) -> list[str]:
    return sorted({option for group in groups for option in options_of(group)})


def _chosen(override: Override, groups: Sequence[Path]) -> list[str]:
    """Return the options that an override names; a glob without matches is returned as it was typed."""
    value = override.value()
    if isinstance(value, list):
        return [str(option) for option in value]
    return (value.filter(_options(groups)) if isinstance(value, Glob) else []) or values_of(override)


def _wrong_key(
    overrides: Sequence[Override], chosen: Sequence[str], folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]
) -> str:
    """Return the mistake of the first key that is neither in the config with these options nor in a checkpoint's."""
    try:
        cfg = _composed(chosen, folders)
    except HydraException:
        return ""
    for config in configs:
        cfg |= config
    keys = list(keys_of(cfg))
    for override in overrides:
        key = override.key_or_group
        if key not in keys and not _below_free(cfg, key.split(".")):
            return f"{key} is not a key of the config.{_elsewhere(key, folders) or nearest(key, keys)} {_ALL_KEYS}"
        if mistake := _other_shape(key, override.value(), at(cfg, key.split("."))):
            return mistake
        if (value := override.value()) and (new := _new_entries(cfg, key, value)):
            return (
                f"{key} has no {' or '.join(new)}. To add it, put ++ before the word, in quotes: "
                f"'++{override.input_line}'."
            )
    return ""


def _elsewhere(key: str, folders: Sequence[Path]) -> str:
    """Return a hint on which other options of the group have a key, by their own files."""
    group, _, inner = key.partition(".")
    having = []
    for folder in folders:
        for option in options_of(folder / group) if inner else []:
            with suppress(OSError, YAMLError):  # an invalid config file is reported when it is chosen
                if inner in keys_of(to_container(OmegaConf.load(folder / group / f"{option}.yaml"))):
                    having.append(f"{group}={option}")
    return f" Of this group, {join_names(having)} {'has' if len(having) == 1 else 'have'} it." if having else ""


def _other_shape(key: str, value: Any, node: Any) -> str:
    """Return the mistake if a value replaces a group of keys, or a group of keys replaces a list."""
    if isinstance(node, Mapping) and not isinstance(value, Mapping):
        several = f"{key}.{'|'.join(str(name) for name in node if not str(name).startswith('_'))}"
        text = "null" if value is None else value
        return f"{key}={text}: {key} is a group of keys. Set one of them: {several}=VALUE."
    if isinstance(node, list) and isinstance(value, Mapping):
        return f"{key} is a list. Write it in brackets: {key}=[...]."
    return ""


def _new_entries(cfg: Mapping[str, Any], key: str, value: Any) -> list[str]:
    """Return the names in a table given for a key that the config's table does not have."""
    table = at(cfg, key.split("."))
    both = isinstance(table, Mapping) and isinstance(value, Mapping)
    return [str(name) for name in value if name not in table] if both else []


def _below_free(cfg: Any, parts: Sequence[str]) -> bool:
    """Return whether a key is below a value that is no mapping, where keys cannot be checked."""
    for part in parts[:-1]:
        if not isinstance(cfg, Mapping):
            return True
        cfg = cfg.get(part, {})
    return not isinstance(cfg, Mapping)


def _key(word: str) -> str:
    return word.split("=", 1)[0]


def _value(word: str) -> str:
    return word.split("=", 1)[-1]


def _hydra_message(error: Exception) -> str:
    """Return Hydra's message about its own keys, without its hints and its search path."""
    text = str(error).partition("Config search path:")[0]
    if merged := re.match(r"Error merging override (.*)", text):
        word = merged[1]
        return f"{format_value(word)} leaves {word.lstrip('~+').partition('=')[0]} without a valid value. Leave it out."
    lines = [line for line in text.splitlines() if "HYDRA_FULL_ERROR" not in line]
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()
