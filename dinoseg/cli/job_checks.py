"""Checks of a job before it starts: its words, its groups, and the keys of its mode that the launcher reads."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.credentials import check_credentials
from dinoseg.config.job import keys_with_values
from dinoseg.config.mistakes import no_mode
from dinoseg.config.nodes import check_partial
from dinoseg.core.splits import SPLITS
from dinoseg.utils.cores import check_devices
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import PACKAGED, ROOT_REMEDY, RUN_REMEDY, WEIGHT_SUFFIXES, check_exists, is_pattern
from dinoseg.utils.ranges import Count, check_value

CHOOSER = "chooser"  # root key of a recipe: the function that chooses another recipe, for the launcher alone
# keys of the file of a mode for the launcher
FILE_KEYS = ("resume_from", "keeps_folder", "resumes_with", "paths", "check", "sweep_end")
LAUNCH_KEYS = ("devices", "ensemble", *FILE_KEYS)  # keys of a mode that are not arguments of its function
AUTO = "auto"  # value of `resume` that looks for a run
_REMEDIES = {"data.root": ROOT_REMEDY, "init": RUN_REMEDY}  # by key
_CONFIGS = Path(__file__).parents[1] / "cfg"


class MissingDevice(UserError):
    """Error of a device that is missing, which all ranks of a machine have: the first one reports it."""


def check_job(cfg: DictConfig, typed: Sequence[Override]) -> None:
    """Refuse a job that no mode can run as it was typed, before anything is written.

    Args:
        cfg: as composed.
        typed: the command line's assignments.

    Raises:
        UserError: naming the key, the rule and the remedy.
    """
    _check_mode(cfg, typed)
    _check_groups(cfg)
    check_partial(cfg.mode if OmegaConf.is_dict(cfg.mode) else {}, f"mode={cfg.choices.mode}")
    check_value("engine.devices", cfg.mode.get("devices", 1), Count)
    if {"trainer.steps", "trainer.epochs"} <= keys_with_values(typed):
        raise UserError("trainer.steps and trainer.epochs both set the length of the training: set one of them.")
    for override in typed:
        _check_hidden(override)
        _check_addition(cfg, override)
    check_credentials(cfg.get("logger"))  # before the config is written


def check_paths(cfg: DictConfig, typed: Sequence[Override]) -> None:
    """Refuse typed paths at which nothing exists, before torch is imported.

    They are `resume` and the keys in `paths` of the mode's file. What else may be wrong with a path is found by what
    reads it, and paths in config files are as well.

    Args:
        cfg: as composed.
        typed: the command line's assignments.

    Raises:
        UserError: nothing exists there.
    """
    given = keys_with_values(typed)
    if "resume_from" in cfg.mode and cfg.resume not in (None, AUTO):
        for run in cfg.resume if OmegaConf.is_list(cfg.resume) else [cfg.resume]:
            check_exists(str(run), "resume", RUN_REMEDY, suffix=".safetensors")
    for key in cfg.mode.get("paths", ()):
        value = OmegaConf.select(cfg, key) if key in given else None
        if isinstance(value, str) and _names_path(cfg, key, value):
            check_exists(value, key, _REMEDIES.get(key, "Check the path."))


def _names_path(cfg: DictConfig, key: str, value: str) -> bool:
    """Return whether a value can only be a path: no pattern, split, packaged file, hub id or word of an own part."""
    group = key.partition(".")[0]
    is_own = group in cfg.choices and not (_CONFIGS / group / f"{cfg.choices[group]}.yaml").is_file()
    is_hub_id = key.endswith(".weights") and Path(value).suffix not in WEIGHT_SUFFIXES
    return not (is_own or is_hub_id or is_pattern(value) or value in SPLITS or value.startswith(PACKAGED))


def check_engine(cfg: DictConfig, ranks: int) -> None:
    """Refuse a device or a number of devices that is not there, before the libraries of the mode are imported.

    Modes without a model, such as `doctor`, run for another machine, too.

    Raises:
        MissingDevice: the device is not there, or there are fewer CUDA devices than ranks.
        UserError: the mode runs on another number of devices.
    """
    if "engine" in cfg and {"devices", "resume_from"} & cfg.mode.keys():
        check_devices(cfg.engine.devices)
        from dinoseg.utils.devices import choose_device  # imports torch

        try:
            choose_device(cfg.engine.device, ranks)
        except UserError as error:
            raise MissingDevice(str(error)) from error


def _check_mode(cfg: DictConfig, typed: Sequence[Override]) -> None:
    """Refuse a command line without a mode, for which `mode=help` is the default."""
    keys = {override.get_key_element().partition("@")[0] for override in typed}
    if keys and "mode" not in keys and cfg.choices.mode == "help":
        raise no_mode([_CONFIGS])


def _check_groups(cfg: DictConfig) -> None:
    """Refuse a group that a config file sets to null, as a line such as `trainer:` does if all keys below are gone."""
    for group, option in cfg.choices.items():
        if option is not None and OmegaConf.select(cfg, group, default="") is None:
            raise UserError(
                f"{group} is null, and {group}={option} is a group of keys. A config file has the line `{group}:` "
                "without keys below it. Remove that line."
            )


def _check_hidden(override: Override) -> None:
    """Refuse keys that only files may set: names of classes, and where a mode resumes."""
    name = override.key_or_group
    root, *below = name.split(".")
    if any(part.startswith("_") for part in below) or (root == "mode" and below and below[0] in FILE_KEYS):
        raise UserError(f"{name} can be set in config files only. Choose a component by GROUP=OPTION.")


def _check_addition(cfg: DictConfig, override: Override) -> None:
    """Refuse a `+key` that no target takes."""
    name, package = override.key_or_group, override.package or "_global_"
    # the keys of a group of the user's own may replace others, if they are not below a key of their own
    is_own = name in cfg.choices and package == "_global_" and not (_CONFIGS / name).is_dir()
    if override.is_add() and not is_own and not _is_taken(cfg, name if package == "_global_" else package):
        added = override.get_key_element()
        raise UserError(f"{added} adds a key that nothing reads. Check its spelling; an existing key needs no +.")


def _is_taken(cfg: DictConfig, name: str) -> bool:
    """Return whether a key is at or below a node with a `_target_`, whose arguments are checked later."""
    nodes = [OmegaConf.select(cfg, name[:end]) for end, letter in enumerate(name) if letter == "."]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in nodes)
