"""Config options composed from files, in Hydra's order and at its places, without Hydra's global state."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import Stamp, stamp

SHIPPED = Path(__file__).parents[1] / "cfg"
_SHARED = ("main", "mode/_model", "mode/_recipe")  # files with root keys that need no choice
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)


class _Config(NamedTuple):
    """A config file of a defaults list, and where its keys go.

    Attributes:
        name: path below the folders of config groups, such as `head/mlp`.
        package: place relative to `parent`, as the defaults list gives it; None: that of the file's header.
        usual: group below that of the parent, which is the place if neither gives one.
        parent: place of the file whose defaults list contains it.
    """

    name: str
    package: str | None
    usual: str
    parent: str = ""

    def place(self, header: str | None) -> str:
        """Return the dotted place of the file's keys; that of a header, and after `_global_`, is from the root."""
        if self.package is None and header not in (None, "_group_"):
            return str(header).removeprefix("_global_").lstrip(".")
        package = self.package or self.usual.replace("/", ".")
        names = [self.parent, "" if package == "_here_" else package]
        return ".".join(filter(None, names)).rpartition("_global_")[2].strip(".")


def compose_options(choices: Mapping[str, Any], folders: Sequence[str | Path]) -> DictConfig:
    """Return the keys of `main.yaml` and of the chosen options, with interpolations unresolved.

    Recipes and `local` are not composed. Without a mode, groups without a choice are not composed either.

    Args:
        choices: option of each group; with one of `mode`, all of its groups are composed. A nested group has the name
            of Hydra's override: `protocol@data.official`.
        folders: further folders of config groups.

    Raises:
        UserError: an option does not exist; the message names it.
    """
    searched = [SHIPPED, *map(Path, folders)]
    shared = []
    for name in _SHARED:
        content = _read_config(SHIPPED / f"{name}.yaml")[0]
        del content["defaults"]
        shared.append(content)
    # a nested group is composed by the option whose defaults list names it
    groups = [group for group in choices if not {"@", "/"} & {*group}]
    groups.sort(key=lambda group: group != "mode")  # a checkpoint adds groups to those of a mode
    configs = [config for group in groups for config in _configs_of({group: None}, "", "", choices)]
    parts = [part for config in configs for part in _parts(config, choices, searched)]
    return OmegaConf.merge(*shared, *parts)  # type: ignore[return-value]


def _parts(config: _Config, choices: Mapping[str, Any], folders: Sequence[Path]) -> Iterator[DictConfig]:
    """Yield the keys of the files in a config's defaults list and its own, each at its place; later ones override."""
    path = next((path for folder in folders if (path := folder / f"{config.name}.yaml").is_file()), None)
    if path is None:
        group, _, option = config.name.rpartition("/")
        raise UserError(
            f"{group}={option} is not an option on this machine. Add the folder of config groups that has it: "
            "--config-dir FOLDER, or config_dir=FOLDER in Python."
        )
    content, header = _read_config(path)
    place = config.place(header)
    entries = content.pop("defaults", [])
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            keys: dict[str, Any] = content
            for name in reversed(place.split(".") if place else []):
                keys = {name: keys}
            yield OmegaConf.create(keys)
        else:
            for inner in _configs_of(entry, config.name.rpartition("/")[0], place, choices):
                yield from _parts(inner, choices, folders)


def _configs_of(
    entry: str | Mapping[str, Any], group: str, place: str, choices: Mapping[str, Any]
) -> Iterator[_Config]:
    """Yield the configs of an entry of a defaults list: `option`, `/group/option@package`, or `group: option`.

    Args:
        entry: of the list.
        group: of the file with the list.
        place: of that file.
        choices: see `compose_options`; they replace the file's own, so that `override` entries need no attention.
    """
    if isinstance(entry, str):
        path, _, package = entry.partition("@")
        yield _Config(_absolute(path, group), package or None, path.strip("/").rpartition("/")[0], place)
        return
    for words, option in entry.items():
        *keywords, key = str(words).split()
        if "override" in keywords:
            continue
        path, _, package = key.partition("@")
        nested = _Config(_absolute(path, group), package or None, path.strip("/"), place)
        full = nested.place(None)
        is_usual = full == nested.name.replace("/", ".")
        chosen = choices.get(nested.name if is_usual else f"{nested.name}@{full}", option)
        for name in chosen if isinstance(chosen, list) else [chosen]:
            if name is not None:
                yield nested._replace(name=f"{nested.name}/{name}")


def _absolute(path: str, group: str) -> str:
    return path.strip("/") if path.startswith("/") or not group else f"{group}/{path}"


def _read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the content of a config file, and the package in its header."""
    content, header = _parse(path, stamp(path))
    return deepcopy(content), header


@lru_cache(maxsize=256)  # parsing is most of the time of composing
def _parse(path: Path, _: Stamp | None) -> tuple[dict[str, Any], str | None]:
    text = path.read_text(encoding="utf-8")
    header = _PACKAGE.search(text)
    return to_container(OmegaConf.create(text) if text.strip() else OmegaConf.create()), header and header[1]
