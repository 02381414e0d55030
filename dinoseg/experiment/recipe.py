"""What a run is made of, as its checkpoints say it; and by what two runs are of the same recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg import __version__
from dinoseg.config.guard import ACTING
from dinoseg.config.plain import plain
from dinoseg.config.resolvers import settled
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.training.description import CHOSEN, GROUPS
from dinoseg.utils.forms import as_read_back

USE = "inference"  # the group that says how a model is asked: what validates with windows is evaluated with them
FOLLOWING = "slots"  # the same of a model of slots: how these are followed
USES = (USE, FOLLOWING)
HEADS, RATES = "heads", "lrs"  # what a run of several heads trains
TEACHER = "teacher"  # the run that a student learns from
INITIAL = "init"  # the run whose weights a new one begins with
OPTIONAL = (*USES, HEADS, RATES, TEACHER, INITIAL)  # root keys that a checkpoint lacks where they say nothing
SAVED = ("seed", *GROUPS, *OPTIONAL)  # root keys of a config that a checkpoint keeps
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
    return {**config, "trainer": trainer, "data": data, "head": head}


def saved_config(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the root keys of a checkpoint's config that a run has, optional ones where they say something."""
    given = info["config"]
    return {key: given[key] for key in SAVED if key not in OPTIONAL or given.get(key) is not None}


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
