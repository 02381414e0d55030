"""Compose the packaged options once a session: Hydra takes a third of a short command's time to do it anew."""

import pickle
from unittest.mock import patch

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides

from dinoseg.__main__ import CONFIGS

PACKAGED = {CONFIGS, "hydra.conf", ""}  # where options lie that no test changes; "" is Hydra's store of schemas
_lists = {}  # the chosen options -> Hydra's list of defaults
_configs = {}  # the id of such a list -> the pickled config before any value is overridden
_create = config_loader_impl.create_defaults_list
_compose = ConfigLoaderImpl._compose_config_from_defaults_list


def _create_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
    arguments = (repo, config_name, overrides_list, prepend_hydra, skip_missing)
    if any(source.path not in PACKAGED for source in repo.get_sources()):
        return _create(*arguments)
    typed = Overrides(repo, overrides_list)
    options = (typed.override_choices, typed.append_group_defaults, typed.deletions)
    key = (str(options), config_name, prepend_hydra, skip_missing)
    if key not in _lists:
        _lists[key] = _create(*arguments)
    known = _lists[key]
    typed.known_choices = dict(known.overrides.known_choices)
    return DefaultsList(known.defaults, known.defaults_tree, typed.config_overrides, typed)


def _compose_once(loader, defaults, repo):
    if not any(defaults is known.defaults for known in _lists.values()):
        return _compose(loader, defaults, repo)
    if id(defaults) not in _configs:
        _configs[id(defaults)] = pickle.dumps(_compose(loader, defaults, repo))
    return pickle.loads(_configs[id(defaults)])


PATCHES = (
    patch.object(config_loader_impl, "create_defaults_list", _create_once),
    patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", _compose_once),
)
