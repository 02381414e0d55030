"""What the config files on this machine's own search path name, and where: the config is the registry."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig

from dinoseg.config.options import RECIPES

# those that a checkpoint's config fills
GROUPS = ("backbone", "adapter", "head", "loss", "data", "optim", "trainer", "inference")
_ACROSS = (RECIPES, "local")  # whose files write below other groups' keys
LISTED = "*"  # stands for an index of a list
_SHIPPED = Path(__file__).parents[1] / "cfg"
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # the one in C is eight times as fast

Keys = tuple[str, ...]  # from the root of the config down


@dataclass
class Entry:
    """What config files write at one place.

    Attributes:
        targets: every `_target_`.
        partial: every `_partial_`.
        values: key to every text that stands beside them; a key without text is there all the same.
    """

    targets: set[str] = field(default_factory=set)
    partial: set[bool] = field(default_factory=set)
    values: dict[str, set[str]] = field(default_factory=dict)


Registry = Mapping[Keys, Entry]


def shipped_registry() -> Registry:
    """Return what may stand where by the shipped config files alone, whatever Hydra program this runs in."""
    return read_registry((_SHIPPED,))


def own_registry(config: Mapping[str, Any]) -> Registry:
    """Return what may stand where: what config files say, shipped ones and the user's, and the composed config.

    The user's config files are those in hydra's search path, where hydra runs.

    Args:
        config: what the command line composed, plain, not resolved.
    """
    composed: dict[Keys, Entry] = {}
    _add({group: config[group] for group in GROUPS if group in config}, (), composed)
    if not HydraConfig.initialized():
        return _joined(shipped_registry(), composed)
    runtime = HydraConfig.get().runtime
    sources = [_folder(source.schema, source.path) for source in runtime.config_sources]
    folders = tuple(dict.fromkeys([_SHIPPED, *(folder for folder in sources if folder is not None)]))
    chosen = [(group, option) for group, option in runtime.choices.items() if group not in (*GROUPS, *_ACROSS)]
    return _joined(_joined(read_registry(folders), read_chosen(folders, chosen)), composed)


@lru_cache(maxsize=4)
def read_registry(folders: tuple[Path, ...]) -> Registry:
    """Return what config files name, by place.

    Read are the files beside the main one, those of `GROUPS`, `hparam` and `local`, and what they start from by their
    defaults lists, at the place where these put it.

    Args:
        folders: roots of config groups.
    """
    registry: dict[Keys, Entry] = {}
    seen: set[_Config] = set()
    for folder in folders:
        for group in ("", *GROUPS, *_ACROSS):
            pattern = "**/*.yaml" if group == RECIPES else "*.yaml"  # recipes are in families
            for path in sorted((folder / group).glob(pattern)):
                name = path.relative_to(folder).with_suffix("").as_posix()
                _collect(folders, _Config(name, None, name.rpartition("/")[0].replace("/", ".")), registry, seen)
    return registry


def read_chosen(folders: Sequence[Path], chosen: Iterable[tuple[str, Any]]) -> Registry:
    """Return what other config files name, which the command line chose.

    Args:
        folders: roots of config groups.
        chosen: group (`data/deep`, `protocol@data.official`) and option.
    """
    registry: dict[Keys, Entry] = {}
    seen: set[_Config] = set()
    for config in _bases([{group: option} for group, option in chosen], "", ""):
        _collect(folders, config, registry, seen)
    return registry


def _joined(registry: Registry, more: Registry) -> Registry:
    """Return what either says of each place."""
    both = {**registry, **more}
    for keys in registry.keys() & more.keys():
        first, second = registry[keys], more[keys]
        names = first.values.keys() | second.values.keys()
        values = {name: first.values.get(name, set()) | second.values.get(name, set()) for name in names}
        both[keys] = Entry(first.targets | second.targets, first.partial | second.partial, values)
    return both


def _folder(schema: str, path: str) -> Path | None:
    """Return the folder that a source of hydra's search path is, None for one that is none."""
    if schema == "file":
        return Path(path)
    return Path(str(files(path.replace("/", ".")))) if schema == "pkg" and not path.startswith("hydra") else None


@dataclass(frozen=True)
class _Config:
    """A config by its path below the roots, and where it is put.

    Attributes:
        name: `data/camvid`.
        package: dotted, relative to `parent` unless it begins with `_global_`; None: what its file's header says.
        usual: where it stands below `parent` if neither says.
        parent: where the config stands whose defaults list names it.
    """

    name: str
    package: str | None
    usual: str
    parent: str = ""

    def place(self, header: str | None) -> str:
        """Return where hydra puts it, dotted; a header counts from the root."""
        if self.package is None and header not in (None, "_group_"):
            return str(header).removeprefix("_global_").lstrip(".")
        package = self.usual if self.package is None else self.package
        if package.partition(".")[0] == "_global_":
            return package.partition(".")[2]
        return f"{self.parent}.{'' if package == '_here_' else package}".strip(".")


def _collect(folders: Sequence[Path], config: _Config, registry: dict[Keys, Entry], seen: set[_Config]) -> None:
    """Add what a config writes, and what those write that it starts from."""
    if config in seen:
        return
    seen.add(config)
    for path in (folder / f"{config.name}.yaml" for folder in folders):
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.load(text, _LOADER)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # hydra says so where it is used
        if isinstance(content, dict):
            header = _PACKAGE.search(text)
            where = config.place(header[1] if header else None)
            bases = _bases(content.pop("defaults", None), config.name.rpartition("/")[0], where)
            _add(content, tuple(where.split(".")) if where else (), registry)
            for base in bases:
                _collect(folders, base, registry, seen)


def _bases(defaults: Any, group: str, where: str) -> Iterator[_Config]:
    """Yield each config that the defaults list of a config of `group`, put at `where`, starts from."""
    for entry in defaults if isinstance(defaults, list) else ():
        for key, options in entry.items() if isinstance(entry, dict) else [("", entry)]:
            word = str(key).split()[-1] if key else ""  # without `override` and `optional`
            for option in options if isinstance(options, list) else [options]:
                if isinstance(option, str) and option != "_self_" and "${" not in option:
                    yield _base(word, option, group, where)


def _base(key: str, option: str, group: str, where: str) -> _Config:
    """Return what an entry of a defaults list means: `option` alone, or `key: option`, whose key names a group."""
    path, _, package = (key or option).partition("@")
    absolute = path.startswith("/")
    folder = path.strip("/") if key else path.strip("/").rpartition("/")[0] if absolute else ""
    name = f"{path.strip('/')}/{option}" if key else path.strip("/")
    name = name if absolute or not group else f"{group}/{name}"
    return _Config(name.removesuffix(".yaml"), package or None, folder.replace("/", "."), where)


def _add(node: Any, keys: Keys, registry: dict[Keys, Entry]) -> None:
    """Add what a file writes at and below `keys`."""
    for value in node if isinstance(node, list) else ():
        _add(value, (*keys, LISTED), registry)
    if not isinstance(node, dict):
        return
    entry = registry.setdefault(keys, Entry())
    for key, value in node.items():
        if key == "_target_":
            entry.targets.add(str(value))
        elif key == "_partial_":
            entry.partial.add(bool(value))
        else:
            entry.values.setdefault(str(key), set()).update([value] if isinstance(value, str) else ())
            _add(value, (*keys, str(key)), registry)
