"""What a run is made of, as its checkpoints say it; and by what two runs are of the same recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg import __version__
from dinoseg.config.guard import ACTING
from dinoseg.config.moved import renamed
from dinoseg.config.plain import plain
from dinoseg.config.resolvers import settled
from dinoseg.data.classes.labels import Labels
from dinoseg.shapes import SegmentationData
from dinoseg.storage.forms import as_read_back
from dinoseg.training.description import CHOSEN, GROUPS

USE = "inference"  # the group that says how a model is asked: what validates with windows is evaluated with them
FOLLOWING = "slots"  # the same of a model of slots: how these are followed
USES = (USE, FOLLOWING)
HEADS, RATES = "heads", "lrs"  # what a run of several heads trains
TEACHER = "teacher"  # the run that a student learns from
INITIAL = "init"  # the run whose weights a new one begins with
OPTIONAL = (*USES, HEADS, RATES, TEACHER, INITIAL)  # root keys that a checkpoint lacks where they say nothing
SAVED = ("seed", *GROUPS, *OPTIONAL)  # root keys of a config that a checkpoint keeps
# keys that older checkpoints lack, and what was so before them: that is the default of their targets, too, which are
# built from such configs
_LATER: Mapping[str, Mapping[str, Any]] = {
    "backbone": {"final_norm": True},
    "data": {"views": None, "feature_noise": 0.0, "class_uniform": 0.0, "class_mix": 0.0, "labelled": None},
    "head": {
        "init": None,
        "deep_supervision": True,
        "standardise": False,
        "alone": 0.0,
        "first": "drawn",
        "decoder_first": 0.0,
        "direct": False,
    },
    "loss": {"hardest": 1.0, "border_weight": 1.0, "border_width": 3},
}
# of a trainer: a run may go on with others
LENGTHS = ("steps", "epochs", "max_minutes", "patience", "val_every", "val_images", "save_every", "log_every")


def run_description(cfg: DictConfig, data: SegmentationData | Labels) -> dict[str, Any]:
    """Return what a run's checkpoints say of themselves beside their progress."""
    return {
        **config_description(cfg),
        "classes": list(data.classes),
        "palette": [list(colour) for colour in data.palette],
        "ignore_index": data.ignore_index,
        "versions": {"dinoseg": __version__, "torch": torch.__version__},
    }


def config_description(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of the description that the config alone decides."""
    unsaid = () if cfg.trainer.feed == "clips" else (FOLLOWING,)
    config = {key: value for key, value in plain(cfg).items() if key in {*SAVED} - {*unsaid} and value is not None}
    # what acts is the machine's to say, never a file's
    config["data"] = {**settled(cfg.data), **dict.fromkeys(ACTING)}
    for key in (TEACHER, INITIAL):
        if key in config:
            config[key] = absolute(config[key])
    config["head"] = settled(cfg.head)  # its grid is what it was trained for, whatever later images are seen at
    return {
        "config": config,
        "choices": {group: cfg.choices[group] for group in (*CHOSEN, *USES) if group not in unsaid},
        "folder": str(Path.cwd()),
    }


def absolute(place: Any) -> Any:
    """Return the whole path of a run, which is gone on with from any folder; what is no text as it is."""
    return str(Path(place).expanduser().absolute()) if isinstance(place, str) else place


def recipe_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two runs the same recipe, as a checkpoint would give it back.

    Args:
        info: a description; where the data lies is part of it, and how long is trained is not.
    """
    # how it is asked changes nothing that is trained
    config = {key: value for key, value in as_read_back(saved_config(info)).items() if key not in USES}
    trainer = {key: value for key, value in config["trainer"].items() if key not in LENGTHS}
    # by the background alone a score differs, and nothing that is trained
    data = {**config["data"], "root": data_root(config, Path(info["folder"]))[0], "background": None}
    unread = {"least_maps"}  # which says what is refused, nothing that is trained
    if "mask_classification" not in repr(config["loss"]):
        unread.add("deep_supervision")  # which no other loss reads
    head = {key: value for key, value in config["head"].items() if key not in unread}
    groups = {"backbone": config["backbone"], "data": data, "head": head, "loss": config["loss"]}
    return {**config, "trainer": trainer, **{group: _without_later(node, group) for group, node in groups.items()}}


def saved_config(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a checkpoint, which may be older than a key: then it stands as what was meant.

    One that is older than one of `USES` lacks it, and is asked as the command line says.
    """
    given = info["config"]
    config = renamed({key: given[key] for key in SAVED if key not in OPTIONAL or given.get(key) is not None})
    trainer = {"feed": "images", "epochs": None, **config["trainer"]}
    data = {"background": _background_of_old(info), **config["data"]}
    return {**config, "trainer": trainer, "data": data}


def _without_later(node: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return a group's keys without those that older checkpoints lack, where they say what was so before them."""
    later = _LATER[group]
    return {
        key: _without_later(value, group) if isinstance(value, Mapping) else value
        for key, value in node.items()
        if key not in later or value != later[key]
    }


def data_root(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Return the data root of a run as a whole path, and what to say of the choice.

    A relative one is that of the run, below the folder where it was started, even if there is one of the same name
    here: that may be another data set. Only where the run's is not there, the one here is taken. What is no name of a
    folder is none given.

    Args:
        config: of the run.
        folder: where it was started.
    """
    root = config["data"].get("root")
    if not isinstance(root, str):
        return "???", ""
    if root == "???" or "${" in root:
        return root, ""
    try:
        here, there = (path.resolve() for path in (Path(root).expanduser(), folder / Path(root).expanduser()))
        is_here, is_there = here.exists(), there.exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, nobody's home, nothing that a name may hold
        return "???", ""
    if here == there or not is_here:
        return str(there), ""
    if is_there:
        return str(there), (
            f"warning: data.root={root} means {there}, where the run has its data, and not {here}. For that one, give "
            f"data.root={here}."
        )
    return str(here), f"{there}, where the run had its data, is not there: taking data.root={root} from here, {here}."


def _background_of_old(info: Mapping[str, Any]) -> int | None:
    """Return the background of a run that is older than the key, when scores without it were those without class 0."""
    names = info.get("classes") or [""]
    chosen_by = info["config"]["trainer"].get("score")
    return 0 if str(names[0]).lower() == "background" or chosen_by == "miou_no_background" else None
