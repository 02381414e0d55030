"""Files of config groups, expanded from their defaults lists in Hydra's order, and their keys at Hydra's places."""

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinoseg.config import mistakes
from dinoseg.config.plain import to_container
from dinoseg.utils.files import Stamp, stamp

_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)


class ConfigFile(NamedTuple):
    """A config file of a defaults list, and where its keys go.

    Attributes:
        group: folder of the file, to which its own defaults list is relative.
        option: path below that folder.
        package: place relative to `parent`, as the defaults list gives it; None: that of the file's header.
        usual: group below that of the parent, which is the place if neither gives one.
        parent: place of the file whose defaults list contains it.
        is_optional: whether the file may be missing.
    """

    group: str
    option: str
    package: str | None = None
    usual: str = ""
    parent: str = ""
    is_optional: bool = False

    @property
    def name(self) -> str:
        """The path below the folders of config groups, such as `head/mlp`."""
        return f"{self.group}/{self.option}".strip("/")

    def place(self, header: str | None) -> str:
        """Return the dotted place of the file's keys; that of a header, and after `_global_`, is from the root."""
        if self.package is None and header not in (None, "_group_"):
            return str(header).removeprefix("_global_").lstrip(".")
        package = self.package or self.usual.replace("/", ".")
        names = [self.parent, "" if package == "_here_" else package]
        return ".".join(filter(None, names)).rpartition("_global_")[2].strip(".")

    @property
    def key(self) -> str:
        """The name of its group in Hydra's overrides: with the place, unless that is the usual one."""
        place = self.place(None)
        return self.group if place == self.group.replace("/", ".") else f"{self.group}@{place or '_global_'}"


class Expansion:
    """The files of a config, expanded from their defaults lists, and the option of each group on the way.

    Attributes:
        choices: option of each group that was found, by its name in Hydra's overrides.
    """

    def __init__(self, options: Mapping[str, Any], folders: Sequence[Path], *, is_part: bool = False) -> None:
        self.choices: dict[str, Any] = {}
        self._folders = folders
        self._is_part = is_part
        self._given = {key: option for key, option in options.items() if key[0] not in "+~"}
        self._removed = {key[1:]: option for key, option in options.items() if key[0] == "~"}
        self._origins: dict[str, str] = {}  # file of each `override` entry that counts
        self._used: set[str] = set()

    def expand(self, config: ConfigFile, above: tuple[str, ...] = (), chosen: Sequence[Any] = ()) -> list[Any]:
        """Return the keys of the files in a config's defaults list and its own, each at its place, in their order.

        Args:
            config: the file.
            above: names of the files that led to it.
            chosen: further entries of its defaults list.
        """
        paths = [folder / f"{config.name}.yaml" for folder in self._folders]
        path = next((path for path in paths if os.path.isfile(path)), None)  # False for a name that no file can have
        if path is None and config.is_optional:
            return []
        if path is None and self._is_part:
            raise mistakes.missing_option(config.group, config.option)
        if path is None:
            raise mistakes.unknown_option(config.group, config.option, self._folders)
        if config.name in above:
            raise mistakes.circular_defaults(path)
        content, header = read_config(path)
        place = config.place(header)
        entries = [*content.pop("defaults", []), *chosen]
        if "_self_" not in entries:
            entries.append("_self_")
        for entry in filter(_is_override, entries):
            self._add_override(entry, config, place)
        # later entries first: a recipe's `override` entries count for the groups of the mode that is listed before it
        order = [index for index in reversed(range(len(entries))) if not _is_override(entries[index])]
        order.sort(key=lambda index: "${" in repr(entries[index]))  # which refer to the options of all others
        parts: dict[int, list[Any]] = {}
        for index in order:
            if entries[index] == "_self_":
                parts[index] = [_at_place(content, place)]
            else:
                parts[index] = self.expand_entry(entries[index], config.group, place, (*above, config.name))
        return [part for index in sorted(parts) for part in parts[index]]

    def expand_entry(self, entry: Any, group: str, place: str, above: tuple[str, ...] = ()) -> list[Any]:
        """Return the same of an entry of a defaults list: `option`, `/group/option@package`, or `group: option`.

        Args:
            entry: of the list.
            group: of the file with the list.
            place: of that file.
            above: names of the files that led to it, that file included.
        """
        if isinstance(entry, str):
            path, _, package = entry.partition("@")
            return self.expand(_listed(path, package, group, place), above)
        ((words, option),) = entry.items()
        *keywords, name = str(words).split()
        path, _, package = name.partition("@")
        config = ConfigFile(_absolute(path, group), "", package or None, path.strip("/"), place, "optional" in keywords)
        key = config.key
        option = self._given.get(key, option)
        self._used.add(key)
        if isinstance(option, str) and "${" in option:
            option = _resolve(option, self.choices)
        if key in self._removed and self._removed[key] in (None, option):
            self._used.add(f"~{key}")
            return []
        if key in self.choices and not self._is_part:
            raise mistakes.repeated_group(key, above[-1])
        self.choices[key] = option
        if isinstance(option, list):
            items = [_listed(f"{path}/{each}", package, group, place) for each in option]
            return [part for item in items for part in self.expand(item, above)]
        return [] if option is None else self.expand(config._replace(option=option), above)

    def check_used(self) -> None:
        """Refuse options of groups that no defaults list names."""
        for key in self._given:
            if key not in self._used and not key.startswith("hydra/"):  # Hydra's own groups are not composed
                raise mistakes.group_not_read(
                    key, self._given[key], self._origins.get(key), self.choices, self._folders
                )
        for key in self._removed:
            if f"~{key}" not in self._used:
                raise mistakes.group_not_read(key, None, None, self.choices, self._folders)

    def _add_override(self, entry: Mapping[str, Any], config: ConfigFile, place: str) -> None:
        """Take the option of an `override` entry for its group, unless one was given or taken before."""
        ((words, option),) = entry.items()
        path, _, package = str(words).split()[-1].partition("@")
        key = ConfigFile(_absolute(path, config.group), "", package or None, path.strip("/"), place).key
        if key not in self._given:
            self._given[key], self._origins[key] = option, config.name


def _resolve(option: str, choices: Mapping[str, Any]) -> Any:
    """Return the option that refers to those of other groups, such as `${data}`; as it is if there is none."""
    node = OmegaConf.create({**choices, "_option": option})
    return OmegaConf.select(node, "_option", throw_on_resolution_failure=False) or option


def _is_override(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "override" in str(next(iter(entry))).split()[:-1]


def _listed(path: str, package: str, group: str, place: str) -> ConfigFile:
    """Return the file that a path in a defaults list names."""
    above, _, option = path.rpartition("/")
    folder = group if not above and not path.startswith("/") else _absolute(above or "/", group)
    return ConfigFile(folder, option, package or None, above.strip("/"), place)


def _absolute(path: str, group: str) -> str:
    return path.strip("/") if path.startswith("/") or not group else f"{group}/{path}"


def _at_place(content: dict[str, Any], place: str) -> dict[str, Any]:
    for name in reversed(place.split(".") if place else []):
        content = {name: content}
    return content


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the keys of all parts, of which later ones override, as OmegaConf merges them."""
    whole: dict[str, Any] = {}
    try:
        for part in parts:
            _merge_into(whole, deepcopy(part))
    except _Refers:
        return to_container(OmegaConf.merge(*map(OmegaConf.create, parts)))
    return whole


class _Refers(Exception):
    """Keys below one that refers to another, which only OmegaConf can merge."""


def _refers_to_key(value: Any) -> bool:
    """Return whether a value is that of another key, `${key}`, and not of a resolver, `${dinoseg.len:...}`."""
    return isinstance(value, str) and "${" in value and ":" not in value


def _merge_into(node: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Merge plain values in place: OmegaConf takes ten times as long, and resolves what it replaces."""
    for key, value in part.items():
        before = node.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            _merge_into(before, value)
        elif isinstance(value, dict) and _refers_to_key(before):
            raise _Refers
        elif value != "???" or key not in node:  # a key without a value does not unset one
            node[key] = value


def read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the content of a config file, and the package in its header."""
    content, header = _parse(path, stamp(path))
    return dict(content), header


@lru_cache(maxsize=256)  # parsing is most of the time of composing
def _parse(path: Path, _: Stamp | None) -> tuple[dict[str, Any], str | None]:
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = OmegaConf.load(StringIO(text))
    except (OSError, ValueError, RecursionError, OmegaConfBaseException, YAMLError) as error:
        raise mistakes.unreadable_file(path, error) from None
    if not OmegaConf.is_dict(content):
        raise mistakes.unreadable_file(path, "it holds no keys")
    plain = to_container(content)
    _check_defaults(path, plain.get("defaults", []))
    header = _PACKAGE.search(text)
    return plain, header and header[1]


def _check_defaults(path: Path, entries: Any) -> None:
    """Refuse a defaults list that is no list of names and of options by group."""
    for entry in entries if isinstance(entries, list) else [entries]:
        options = [*entry.values()] if isinstance(entry, Mapping) else []
        names = options[0] if options and isinstance(options[0], list) else options
        is_option = len(options) == 1 and all(isinstance(name, str | None) for name in names)
        if not (isinstance(entries, list) and (isinstance(entry, str) or is_option)):
            raise mistakes.unreadable_file(path, f"its defaults list holds {entry}")
    if isinstance(entries, list) and entries.count("_self_") > 1:
        raise mistakes.unreadable_file(path, "its defaults list holds _self_ twice")
