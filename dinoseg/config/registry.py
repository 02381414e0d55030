"""Registry of what this machine's config files contain, by place in the config."""

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
from dinoseg.utils.stamps import Stamp, stamp

# groups that a checkpoint's config fills
GROUPS = ("backbone", "adapter", "head", "loss", "data", "optim", "trainer", "inference")
_ACROSS = (RECIPES, "local")  # groups whose files write below the keys of other groups
LISTED = "*"  # stands for any index of a list
_SHIPPED = Path(__file__).parents[1] / "cfg"
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # the loader in C is eight times as fast

Keys = tuple[str, ...]  # path from the root of a config


@dataclass
class RegistryEntry:
    """Content of config files at one place.

    Attributes:
        targets: every `_target_`.
        partial: every `_partial_`.
        values: from each key to its texts; a key without texts has an empty set.
    """

    targets: set[str] = field(default_factory=set)
    partial: set[bool] = field(default_factory=set)
    values: dict[str, set[str]] = field(default_factory=dict)


Registry = Mapping[Keys, RegistryEntry]


def shipped_registry(config_dir: Path | None = None) -> Registry:
    """Return the registry of the shipped config files and of a further folder, whatever Hydra program this runs in."""
    return read_registry((_SHIPPED,) if config_dir is None else (_SHIPPED, config_dir))


def full_registry(config: Mapping[str, Any]) -> Registry:
    """Return the registry of all config files, shipped ones and the user's, and of the composed config.

    The user's config files are those in hydra's search path, if hydra runs.

    Args:
        config: composed from the command line, plain, with interpolations unresolved.
    """
    composed: dict[Keys, RegistryEntry] = {}
    _add({group: config[group] for group in GROUPS if group in config}, (), composed)
    if not HydraConfig.initialized():
        return _joined(shipped_registry(), composed)
    runtime = HydraConfig.get().runtime
    sources = [_folder(source.schema, source.path) for source in runtime.config_sources]
    folders = tuple(dict.fromkeys([_SHIPPED, *(folder for folder in sources if folder is not None)]))
    chosen = [(group, option) for group, option in runtime.choices.items() if group not in (*GROUPS, *_ACROSS)]
    return _joined(_joined(read_registry(folders), read_chosen(folders, chosen)), composed)


def read_registry(folders: tuple[Path, ...]) -> Registry:
    """Return the registry of config files in `folders`.

    Files next to the main one and those of `GROUPS`, `hparam` and `local` are read. The files in their defaults lists
    follow, at the place where these put them.

    Args:
        folders: roots of config groups.
    """
    # a notebook may write a file between two calls; those of the package do not change
    files = (path for folder in folders if folder != _SHIPPED for path in sorted(folder.rglob("*.yaml")))
    return _read_registry(folders, tuple((path, stamp(path)) for path in files))


@lru_cache(maxsize=4)
def _read_registry(folders: tuple[Path, ...], stamps: tuple[tuple[Path, Stamp | None], ...]) -> Registry:
    registry: dict[Keys, RegistryEntry] = {}
    seen: set[_Config] = set()
    for folder in folders:
        for group in ("", *GROUPS, *_ACROSS):
            pattern = "**/*.yaml" if group == RECIPES else "*.yaml"  # recipes are in families
            for path in sorted((folder / group).glob(pattern)):
                name = path.relative_to(folder).with_suffix("").as_posix()
                _collect(folders, _Config(name, None, name.rpartition("/")[0].replace("/", ".")), registry, seen)
    return registry


def read_chosen(folders: Sequence[Path], chosen: Iterable[tuple[str, Any]]) -> Registry:
    """Return the registry of other config files, which the command line chose.

    Args:
        folders: roots of config groups.
        chosen: group (`data/deep`, `protocol@data.official`) and option.
    """
    registry: dict[Keys, RegistryEntry] = {}
    seen: set[_Config] = set()
    for config in _bases([{group: option} for group, option in chosen], "", ""):
        _collect(folders, config, registry, seen)
    return registry


def _joined(registry: Registry, more: Registry) -> Registry:
    """Return the union of two registries."""
    both = {**registry, **more}
    for keys in registry.keys() & more.keys():
        first, second = registry[keys], more[keys]
        names = first.values.keys() | second.values.keys()
        values = {name: first.values.get(name, set()) | second.values.get(name, set()) for name in names}
        both[keys] = RegistryEntry(first.targets | second.targets, first.partial | second.partial, values)
    return both


def _folder(schema: str, path: str) -> Path | None:
    """Return the folder of a source in hydra's search path; None if it is no folder."""
    if schema == "file":
        return Path(path)
    return Path(str(files(path.replace("/", ".")))) if schema == "pkg" and not path.startswith("hydra") else None


@dataclass(frozen=True)
class _Config:
    """A config by its path below the roots, and its place.

    Attributes:
        name: `data/camvid`.
        package: dotted, relative to `parent` unless it begins with `_global_`; None: taken from the file's header.
        usual: place below `parent` if neither gives one.
        parent: place of the config whose defaults list contains it.
    """

    name: str
    package: str | None
    usual: str
    parent: str = ""

    def location(self, header: str | None) -> str:
        """Return the dotted place where hydra puts the config; a header counts from the root."""
        if self.package is None and header not in (None, "_group_"):
            return str(header).removeprefix("_global_").lstrip(".")
        package = self.usual if self.package is None else self.package
        if package.partition(".")[0] == "_global_":
            return package.partition(".")[2]
        return f"{self.parent}.{'' if package == '_here_' else package}".strip(".")


def _collect(folders: Sequence[Path], config: _Config, registry: dict[Keys, RegistryEntry], seen: set[_Config]) -> None:
    """Add the content of a config, and of the configs in its defaults list."""
    if config in seen:
        return
    seen.add(config)
    for path in (folder / f"{config.name}.yaml" for folder in folders):
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.load(text, _LOADER)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # hydra reports it where it is used
        if isinstance(content, dict):
            header = _PACKAGE.search(text)
            where = config.location(header[1] if header else None)
            bases = _bases(content.pop("defaults", None), config.name.rpartition("/")[0], where)
            _add(content, tuple(where.split(".")) if where else (), registry)
            for base in bases:
                _collect(folders, base, registry, seen)


def _bases(defaults: Any, group: str, where: str) -> Iterator[_Config]:
    """Yield each config in the defaults list of a config of `group` that is put at `where`."""
    for entry in defaults if isinstance(defaults, list) else ():
        for key, options in entry.items() if isinstance(entry, dict) else [("", entry)]:
            word = str(key).split()[-1] if key else ""  # without `override` and `optional`
            for option in options if isinstance(options, list) else [options]:
                if isinstance(option, str) and option != "_self_" and "${" not in option:
                    yield _base(word, option, group, where)


def _base(key: str, option: str, group: str, where: str) -> _Config:
    """Return the config of a defaults-list entry: `option` alone, or `key: option`, whose key names a group."""
    path, _, package = (key or option).partition("@")
    absolute = path.startswith("/")
    folder = path.strip("/") if key else path.strip("/").rpartition("/")[0] if absolute else ""
    name = f"{path.strip('/')}/{option}" if key else path.strip("/")
    name = name if absolute or not group else f"{group}/{name}"
    return _Config(name.removesuffix(".yaml"), package or None, folder.replace("/", "."), where)


def _add(node: Any, keys: Keys, registry: dict[Keys, RegistryEntry]) -> None:
    """Add the content of a file at and below `keys`."""
    for value in node if isinstance(node, list) else ():
        _add(value, (*keys, LISTED), registry)
    if not isinstance(node, dict):
        return
    entry = registry.setdefault(keys, RegistryEntry())
    for key, value in node.items():
        if key == "_target_":
            entry.targets.add(str(value))
        elif key == "_partial_":
            entry.partial.add(bool(value))
        else:
            entry.values.setdefault(str(key), set()).update([value] if isinstance(value, str) else ())
            _add(value, (*keys, str(key)), registry)
