"""Files of config groups, expanded from their defaults lists in Hydra's order, and their keys at Hydra's places."""

import os
import posixpath
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


class DefaultsEntry(NamedTuple):
    """An entry of a defaults list: the file that it names, and where the file's keys go.

    Attributes:
        group: folder of the file, to which its own defaults list is relative.
        option: path below that folder; a list for groups that take one, None for no file.
        package: place relative to `parent`, as the entry gives it; None: that of the file's header.
        usual: group below that of the parent, which is the place if neither gives one.
        parent: place of the file whose defaults list contains the entry.
        keywords: `optional` for a file that may be missing, `override` for the option of an entry elsewhere.
        is_choice: whether it is `GROUP: OPTION`, for which a caller may choose another option.
    """

    group: str
    option: Any
    package: str | None = None
    usual: str = ""
    parent: str = ""
    keywords: Sequence[str] = ()
    is_choice: bool = False

    @property
    def name(self) -> str:
        """The path below the folders of config groups, such as `head/mlp`."""
        return f"{self.group}/{self.option}".strip("/")

    def place(self, header: str | None) -> str:
        """Return the dotted place of the file's keys; that of a header, and after `_global_`, is from the root."""
        # a header `# @package` is absolute, and the package of an entry, which overrides it, is relative to the file of
        # the list
        if self.package is None and header not in (None, "_group_"):
            return str(header).removeprefix("_global_").lstrip(".")
        package = self.package or self.usual.replace("/", ".")
        names = [self.parent, "" if package == "_here_" else package]
        # `_global_` starts at the root again, wherever it stands in the place
        return ".".join(filter(None, names)).rpartition("_global_")[2].strip(".")

    @property
    def key(self) -> str:
        """The name of its group in Hydra's overrides: with the place, unless that is the usual one."""
        place = self.place(None)
        return self.group if place == self.group.replace("/", ".") else f"{self.group}@{place or '_global_'}"


def read_entry(entry: Any, group: str = "", place: str = "") -> DefaultsEntry:
    """Return an entry of a defaults list: `OPTION`, `/GROUP/OPTION@PACKAGE`, or `optional GROUP@PACKAGE: OPTION`.

    Args:
        entry: of the list.
        group: of the file with the list.
        place: of that file.
    """
    is_choice = isinstance(entry, Mapping)
    ((words, option),) = entry.items() if is_choice else [(entry, None)]
    *keywords, name = words.split()
    path, _, package = name.partition("@")
    # a group is relative to that of the list's file, unless it begins with a slash
    folder = posixpath.join("/", group, path).strip("/")
    if not is_choice:
        folder, _, option = folder.rpartition("/")
        path = path.rpartition("/")[0]
    return DefaultsEntry(folder, option, package or None, path.strip("/"), place, keywords, is_choice)


class Expansion:
    """The files of a config, expanded from their defaults lists, and the option of each group on the way.

    Attributes:
        choices: option of each group that was found, by its name in Hydra's overrides.
    """

    def __init__(self, options: Mapping[str, Any], folders: Sequence[Path], *, is_part: bool = False) -> None:
        self.choices: dict[str, Any] = {}
        self._folders = folders
        # part of a stored config: an option may bring a group that is composed on its own, too
        self._is_part = is_part
        self._given = {key: option for key, option in options.items() if key[0] not in "+~"}
        self._removed = {key[1:]: option for key, option in options.items() if key[0] == "~"}
        self._origins: dict[str, str] = {}  # file of each `override` entry that counts
        self._used: set[str] = set()

    def expand(
        self, entry: DefaultsEntry, above: Sequence[str] = (), chosen: Sequence[Any] = ()
    ) -> list[dict[str, Any]]:
        """Return the keys of the files that an entry leads to, each at its place, in their order.

        Args:
            entry: of a defaults list.
            above: names of the files that led to it.
            chosen: further entries of its file's own defaults list.
        """
        if entry.is_choice:
            entry = entry._replace(option=self._choose(entry, above))
        if isinstance(entry.option, list):
            return [part for option in entry.option for part in self._expand_file(entry._replace(option=option), above)]
        return [] if entry.option is None else self._expand_file(entry, above, chosen)

    def _choose(self, entry: DefaultsEntry, above: Sequence[str]) -> Any:
        """Return the option of an entry's group: that of the caller or of an `override` entry, else the entry's own."""
        key = entry.key
        option = self._given.get(key, entry.option)
        self._used.add(key)
        # the groups that it refers to are expanded before, see the order below
        if isinstance(option, str) and "${" in option:
            option = _resolve(option, self.choices)
        # `~head` removes the group whatever its option, and `~head=mlp` this option alone
        if key in self._removed and self._removed[key] in (None, option):
            self._used.add(f"~{key}")
            return None
        if key in self.choices and not self._is_part:
            raise mistakes.repeated_group(key, above[-1])
        self.choices[key] = option
        return option

    def _expand_file(
        self, file: DefaultsEntry, above: Sequence[str], chosen: Sequence[Any] = ()
    ) -> list[dict[str, Any]]:
        """Return the same of the one file that an entry names."""
        paths = [folder / f"{file.name}.yaml" for folder in self._folders]
        # the first folder wins; `isfile` is False, not an error, for a name that no file can have
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is None and "optional" in file.keywords:
            return []
        if path is None and self._is_part:
            raise mistakes.missing_option(file.group, file.option)
        if path is None:
            raise mistakes.unknown_option(file.group, file.option, self._folders)
        if file.name in above:
            raise mistakes.circular_defaults(path)
        content, header = read_config(path)
        place = file.place(header)
        listed = [*content.pop("defaults", []), *chosen]
        # Hydra's default: a file's own keys come last, and so override those of its groups
        if "_self_" not in listed:
            listed.append("_self_")
        try:
            entries = [read_entry(entry, file.group, place) for entry in listed]
        except (AttributeError, ValueError):
            raise mistakes.unreadable_file(path, f"its defaults list holds {listed}") from None
        # before any file below is read: an `override` entry counts for groups that are listed anywhere. The caller's
        # choice wins over it, and the file nearest to the root over others
        for entry in entries:
            if "override" in entry.keywords and entry.key not in self._given:
                self._given[entry.key] = entry.option
                self._origins[entry.key] = file.name
        # later entries first: a recipe's `override` entries count for the groups of the mode that is listed before it
        order = [index for index in reversed(range(len(entries))) if "override" not in entries[index].keywords]
        order.sort(key=lambda index: "${" in str(entries[index].option))  # which refer to the options of all others
        parts: dict[int, list[dict[str, Any]]] = {}
        for index in order:
            is_self = listed[index] == "_self_"
            parts[index] = [_at_place(content, place)] if is_self else self.expand(entries[index], (*above, file.name))
        # expanded in another order, merged in that of the list
        return [part for index in sorted(parts) for part in parts[index]]

    def check_used(self) -> None:
        """Refuse options of groups that no defaults list names."""
        unread = [key for key in self._given if key not in self._used and not key.startswith("hydra/")]
        unread += [key for key in self._removed if f"~{key}" not in self._used]
        for key in unread:
            raise mistakes.group_not_read(
                key, self._given.get(key), self._origins.get(key), self.choices, self._folders
            )


def _resolve(option: str, choices: Mapping[str, Any]) -> Any:
    """Return the option that refers to those of other groups, such as `${data}`; unchanged if there is none."""
    # unresolved where a group is not chosen: the `optional` entries of it then name no file
    node = OmegaConf.create({**choices, "_option": option})
    return OmegaConf.select(node, "_option", throw_on_resolution_failure=False) or option


def _at_place(content: dict[str, Any], place: str) -> dict[str, Any]:
    for name in reversed(place.split(".") if place else []):
        content = {name: content}
    return content


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the keys of all parts, where later ones override, as OmegaConf merges them."""
    whole: dict[str, Any] = {}
    try:
        for part in parts:
            _merge_into(whole, deepcopy(part))
    # for a whole config this takes 100 ms instead of 2 (docs/decisions.md)
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


# parsing is most of the time of composing; the stamp makes a changed file another key of the cache
@lru_cache(maxsize=256)
def _parse(path: Path, _: Stamp | None) -> tuple[dict[str, Any], str | None]:
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = OmegaConf.load(StringIO(text))
    except (OSError, ValueError, RecursionError, OmegaConfBaseException, YAMLError) as error:
        raise mistakes.unreadable_file(path, error) from None
    plain: Any = OmegaConf.to_container(content)
    if not isinstance(plain, dict) or not isinstance(plain.get("defaults", []), list):
        raise mistakes.unreadable_file(path, "it must hold keys, and `defaults` a list")
    header = _PACKAGE.search(text)
    return {str(key): value for key, value in plain.items()}, header and header[1]
