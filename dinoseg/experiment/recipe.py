"""Description of a run for its checkpoints, and the settings that identify its recipe."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dinoseg import __version__
from dinoseg.config.stored import VALUES_ONLY, describe
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment.models import ModelBuilder
from dinoseg.models.backbones.normalisation import SATELLITE, is_satellite
from dinoseg.training.description import (
    FOLLOWING,
    INITIAL,
    METRIC,
    OPTIONAL,
    PRECISION,
    SAVED,
    TEACHER,
    USES,
    locate_weights,
)
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import as_read_back

# keys of `trainer` that may change when a run resumes
LENGTHS = ("steps", "epochs", "max_minutes", "patience", "val_every", "val_images", "save_every", "log_every", "score")


def run_description(builder: ModelBuilder, data: SegmentationData | Labels) -> dict[str, Any]:
    """Return the description that a run's checkpoints store in addition to their progress."""
    return {
        **config_description(builder),
        "classes": list(data.classes),
        "palette": [list(colour) for colour in data.palette],
        "ignore_index": data.ignore_index,
        "versions": {"dinoseg": __version__, "torch": torch.__version__},
    }


def config_description(builder: ModelBuilder, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the part of the description that depends only on the config.

    Args:
        builder: of the whole config.
        info: description of the checkpoint that the config comes from, for groups without a stored option.

    Raises:
        UserError: see `describe`; or a group has no option, which no checkpoint could store.
    """
    held = builder.config.get(VALUES_ONLY, ())
    unsaid = () if builder.value("loss.class_weights") is None else (FOLLOWING,)
    saved = [key for key in SAVED if key not in unsaid and builder.config.get(key) is not None]
    description = describe(builder.cfg, saved)
    config, choices, targets = (description[part] for part in ("config", "choices", "targets"))
    if held and info is not None:
        config |= {group: {key: builder.config[group][key] for key in info["config"][group]} for group in held}
        targets |= {place: name for place, name in info["targets"].items() if place.split(".")[0] in held}
    if empty := [group for group, option in choices.items() if option is None]:
        raise UserError(
            f"The defaults list of a config file sets {empty[0]} to null, which no checkpoint could store. Choose an "
            "option there, or remove the entry."
        )
    config["backbone"] = _with_colours(config["backbone"])
    for key in (TEACHER, INITIAL):
        if key in config:
            config[key] = absolute(config[key])
    exact = builder.value("engine.precision") == "fp32"  # half precisions depend on the machine
    return {
        **({PRECISION: "fp32"} if exact else {}),
        "config": {key: config[key] for key in saved},
        "choices": {"hparam": builder.options["hparam"], **dict(sorted(choices.items()))},
        "targets": dict(sorted(targets.items())),
        "folder": str(Path.cwd()),
    }


def _with_colours(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a backbone, with the statistics that follow from the name of its weights."""
    mean, std = map(list, SATELLITE)
    named = {"mean": mean, "std": std} if is_satellite(str(backbone.get("weights"))) else {}
    return {**backbone, **{key: value for key, value in named.items() if backbone.get(key) is None}}


def absolute(path: Any) -> Any:
    """Return the absolute path of a run, which may be resumed from any folder; other values than text are unchanged."""
    return str(Path(path).expanduser().absolute()) if isinstance(path, str) else path


def recipe_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that identify the recipe of a run, in the form in which a checkpoint returns them.

    Args:
        info: a description. The location of the data is part of the recipe, the length of the training is not.
    """
    # the inference strategy and the scores do not affect training
    left = (*USES, METRIC)
    config = {key: value for key, value in as_read_back(saved_config(info)).items() if key not in left}
    targets = {
        f"{place}._target_": target for place, target in info["targets"].items() if place.split(".")[0] not in left
    }
    config = locate_weights(config, Path(info["folder"]))
    trainer = {key: value for key, value in config["trainer"].items() if key not in LENGTHS}
    # the background affects a score, but not training
    data = {**config["data"], "root": data_root(config, Path(info["folder"]))[0], "background": None}
    head = dict(config["head"])
    if "mask_classification" not in repr(targets):
        head.pop("deep_supervision", None)  # no other loss reads it
    return {**config, "trainer": trainer, "data": data, "head": head, **targets}


def saved_config(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the root keys of a checkpoint's config that describe the run; optional keys only if they are set."""
    given = info["config"]
    return {key: given[key] for key in SAVED if key not in OPTIONAL or given.get(key) is not None}


def data_root(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Return the absolute data root of a run, and a remark on the choice for the user.

    A relative root is resolved in the folder where the run was started, even if the current folder has one of the same
    name: that may be another dataset. Only if the run's root does not exist is the one in the current folder used. A
    value that is no valid path counts as not set.

    Args:
        config: config of the run.
        folder: where the run was started.
    """
    root = config["data"].get("root")
    if not isinstance(root, str):
        return "???", ""
    if root == "???" or "${" in root:
        return root, ""
    try:
        here, there = (path.resolve() for path in (Path(root).expanduser(), folder / Path(root).expanduser()))
        is_here, is_there = here.exists(), there.exists()
    except (OSError, RuntimeError, ValueError):  # name too long, home of an unknown user, invalid characters
        return "???", ""
    if here == there or not is_here:
        return str(there), ""
    if is_there:
        return str(there), (
            f"warning: data.root={root} means {there}, as in the run, not {here}. To use that one, set "
            f"{shlex.quote(f'data.root={here}')}."
        )
    return str(here), (
        f"{there}, the data of the run, does not exist: using data.root={root} of the current folder, {here}."
    )
