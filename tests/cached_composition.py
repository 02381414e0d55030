"""Compose the options once a session: Hydra takes a third of a short command's time to do it anew."""

import pickle
import re
from pathlib import Path
from unittest.mock import patch

import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides

from dinoseg.__main__ import CONFIGS

PACKAGED = {CONFIGS, "hydra.conf", ""}  # where options lie that no test changes; "" is Hydra's store of schemas
_lists = {}  # the chosen options and the defaults of a test's own -> Hydra's list of defaults
_configs = {}  # such a list's id and the texts of a test's own options -> the pickled config before overrides
_create = config_loader_impl.create_defaults_list
_compose = ConfigLoaderImpl._compose_config_from_defaults_list


def _own_options(repo):
    """Return paths and texts of the options in each folder that a test has written; None: a source is no folder."""
    found = []
    for source in repo.get_sources():
        if source.path in PACKAGED:
            found.append(source.path)
        elif source.scheme() == "file" and Path(source.path).is_dir():
            root = Path(source.path)
            paths = list(root.rglob("*"))
            if any(path.is_symlink() and path.is_dir() for path in paths):
                return None  # whose options `rglob` does not list
            files = sorted(path for path in paths if path.suffix == ".yaml" and path.is_file())
            found.append(tuple((str(path.relative_to(root)), path.read_bytes()) for path in files))
        else:
            return None
    return tuple(found)


def _defaults_of(own):
    """Return the options' paths and what decides which others they take: lists of defaults, and headers."""
    return tuple(
        source if isinstance(source, str) else tuple((path, *_key_lines(text)) for path, text in source)
        for source in own
    )


def _key_lines(text):
    try:
        parsed = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return (text,)
    if not isinstance(parsed, dict) or "hydra" in parsed:
        return (text,)
    return repr(parsed.get("defaults")), *(line for line in text.splitlines() if re.match(rb"\s*#\s*@", line))


def _create_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
    arguments = (repo, config_name, overrides_list, prepend_hydra, skip_missing)
    own = _own_options(repo)
    if own is None or config_name != "main":  # one of Hydra's store, which a command has written
        return _create(*arguments)
    typed = Overrides(repo, overrides_list)
    options = (typed.override_choices, typed.append_group_defaults, typed.deletions)
    key = (str(options), config_name, prepend_hydra, skip_missing, _defaults_of(own))
    if key not in _lists:
        _lists[key] = _create(*arguments)
    known = _lists[key]
    typed.known_choices = dict(known.overrides.known_choices)
    return DefaultsList(known.defaults, known.defaults_tree, typed.config_overrides, typed)


def _compose_once(loader, defaults, repo):
    own = _own_options(repo)
    if own is None or not any(defaults is known.defaults for known in _lists.values()):
        return _compose(loader, defaults, repo)
    key = id(defaults), own
    if key not in _configs:
        _configs[key] = pickle.dumps(_compose(loader, defaults, repo))
    return pickle.loads(_configs[key])


PATCHES = (
    patch.object(config_loader_impl, "create_defaults_list", _create_once),
    patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", _compose_once),
)
