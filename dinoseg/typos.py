"""What is wrong with a command line that Hydra could not compose, in this project's words."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dinoseg.config import plain

_TAKES_A_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--info", "-i", "--experimental-rerun"),
)
_ALL_KEYS = "Add `--cfg job` to see all keys, `--help` alone to see all groups and options."


def explain(arguments: Sequence[str], configs: str, error: Exception) -> str:
    """Return the mistake and its remedy; where none is recognised, what Hydra said.

    Args:
        arguments: the command line, without the program's name.
        configs: folder of the config groups.
        error: what Hydra raised.
    """
    several = bool({"-m", "--multirun"} & set(arguments))
    chosen: list[str] = []
    overrides: list[Override] = []
    for word in _words(arguments):
        override, mistake = _parsed(word)
        if override is None:
            return mistake
        if override.is_sweep_override() and not several:
            return (
                f"{word} gives several values. For a list use brackets: '{override.key_or_group}=[{_value(word)}]'. "
                "For a run with each of them, add -m."
            )
        folder = Path(configs, override.get_key_element().split("@")[0])
        if override.is_add() or override.is_delete() or override.key_or_group.startswith("hydra"):
            continue
        if folder.is_dir():
            if mistake := _wrong_option(override, folder):
                return mistake
            chosen.append(f"{override.get_key_element()}={_choices(override)[0]}")
        else:
            overrides.append(override)
    return _wrong_key(overrides, chosen, configs) or _hydras_own(error)


def _words(arguments: Sequence[str]) -> Iterator[str]:
    """Yield what is meant as KEY=VALUE: neither flags nor their values."""
    skip = False
    for word in arguments:
        if not skip and not word.startswith("-"):
            yield word
        skip = word in _TAKES_A_VALUE


def _parsed(word: str) -> tuple[Override | None, str]:
    if "=" not in word and not word.startswith("~"):
        return None, f"{word} is no KEY=VALUE.{f' Did you mean mode={word}?' if word.isidentifier() else ''}"
    try:
        return OverridesParser.create().parse_override(word), ""
    except HydraException as error:
        first = str(error).splitlines()[0]
        return None, (
            f"{word} cannot be read ({first}). Put quotes around the whole word where its value holds brackets, braces "
            f"or blanks, and inside them around text with other signs: '{_key(word)}=\"a value\"'."
        )


def _wrong_option(override: Override, folder: Path) -> str:
    options = sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))
    group = override.key_or_group
    for choice in _choices(override):
        if not (folder / f"{choice}.yaml").is_file():
            return (
                f"{group}={choice} is unknown.{_nearest(choice, options, f'{group}=')} There are {', '.join(options)}."
            )
    return ""


def _choices(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [str(override.value())]


def _wrong_key(overrides: Sequence[Override], chosen: Sequence[str], configs: str) -> str:
    """Return the mistake of the first key that the config with these choices does not have."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(configs, version_base="1.3"):
            cfg = plain(compose("main", list(chosen)))
    except HydraException:
        return ""
    keys = list(_keys(cfg))
    for override in overrides:
        key = override.key_or_group
        if key not in keys and not _below_free(cfg, key.split(".")):
            return f"{key} is no key of the config.{_nearest(key, keys)} {_ALL_KEYS}"
    return ""


def _keys(node: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")


def _below_free(cfg: Any, parts: Sequence[str]) -> bool:
    """Return whether a key lies below a value that is no mapping, of which this file knows nothing."""
    for part in parts[:-1]:
        if not isinstance(cfg, Mapping):
            return True
        cfg = cfg.get(part, {})
    return not isinstance(cfg, Mapping)


def _nearest(word: str, known: Sequence[str], before: str = "") -> str:
    """Return the question whether the nearest of the known words was meant, the same last part first."""
    last = word.rsplit(".", 1)[-1]
    same = [key for key in known if key.rsplit(".", 1)[-1] == last]
    found = (same or difflib.get_close_matches(word, known, n=3, cutoff=0.7))[:3]
    return f" Did you mean {' or '.join(before + each for each in found)}?" if found else ""


def _key(word: str) -> str:
    return word.split("=", 1)[0]


def _value(word: str) -> str:
    return word.split("=", 1)[-1]


def _hydras_own(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "HYDRA_FULL_ERROR" not in line]
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()
