"""Going on from a checkpoint: its config, with what the command line changes, and its model."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dinoseg import __version__, build
from dinoseg.config.guard import ACTING, guard, renamed
from dinoseg.config.nodes import instantiate
from dinoseg.config.values import has_key, keys_of, plain, settled, squared
from dinoseg.data.classes.labels import Labels
from dinoseg.errors import UserError
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.model import Segmenter
from dinoseg.runs.folder import command_line
from dinoseg.shapes import Palette, SegmentationData
from dinoseg.training import checkpoint
from dinoseg.training.description import CHOSEN, GROUPS
from dinoseg.training.engine import Engine
from dinoseg.wording import nearest, printable

KEPT = ("seed", *GROUPS)  # root keys that a checkpoint keeps
LENGTHS = (
    "steps",
    "epochs",
    "patience",
    "val_every",
    "save_every",
    "log_every",
)  # of a trainer: a run may go on with others


def merge(cfg: DictConfig, overrides: Sequence[Any], path: Path, info: Mapping[str, Any]) -> DictConfig:
    """Return `cfg` with the model, data and training of a checkpoint, changed as the command line says.

    Args:
        cfg: what the command line composed.
        overrides: hydra's parsed assignments of the command line.
        path: the checkpoint file.
        info: what it says of itself.

    Raises:
        UserError: the checkpoint's config is not to be trusted, or the command line names another model.
    """
    kept = _kept(info)
    given = [override.key_or_group for override in overrides]
    guard(kept, f"resume={path}", plain(cfg), trust=_trust(cfg), given=given)
    chosen = {group: option for group, option in info["choices"].items() if group in CHOSEN}
    own = {**plain(cfg), "resume": str(path), "choices": {**plain(cfg.choices), **chosen}}
    merged = OmegaConf.create({**own, **kept})
    merged.data.root, remark = _root(kept, Path(info["folder"]))
    if remark and not any(override.key_or_group in ("data", "data.root") for override in overrides):
        print(printable(f"resume={path}: {remark}"), file=sys.stderr)
    for override in (each for each in overrides if each.key_or_group in CHOSEN):
        name, value = override.key_or_group, override.value()
        _check_choice(name, str(value), path, info)
        if name == "data" and value != info["choices"]["data"]:
            merged.data, merged.choices.data = cfg.data, cfg.choices.data
    for override in (each for each in overrides if each.key_or_group not in CHOSEN):
        if override.key_or_group.split(".")[0] in KEPT:
            if not (override.is_add() or override.is_force_add()):
                _check_key(override.key_or_group, cfg, merged, path)
            OmegaConf.update(merged, override.key_or_group, override.value())
    return squared(merged)


def _trust(cfg: DictConfig) -> list[str]:
    trust = OmegaConf.to_container(cfg.trust) if OmegaConf.is_config(cfg.trust) else cfg.trust or []
    if not isinstance(trust, list) or not all(isinstance(name, str) and name for name in trust):
        raise UserError(f"trust={trust}: give a list of packages or hub ids, such as trust=[my_package].")
    return trust


def without(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with nothing to resume."""
    return OmegaConf.create({**plain(cfg), "resume": None})


@dataclass
class Trained:
    """A trained segmenter, ready to predict, and what its classes mean."""

    model: Segmenter
    engine: Engine
    classes: list[str]
    palette: Palette
    ignore_index: int
    info: Mapping[str, Any]  # what the checkpoint says of itself

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.device

    def autocast(self) -> AbstractContextManager:
        """Return the precision's context for a forward pass."""
        return self.engine.autocast()


def load_trained(cfg: DictConfig) -> Trained:
    """Return the model that `resume` names, in eval mode; `cfg` is already merged with its checkpoint.

    Without `resume`, a head that comes trained from a file is used as it is, with the classes of the data set.

    Raises:
        UserError: there is neither, or the checkpoint does not fit.
    """
    found = None if cfg.resume is None else checkpoint.outline(Path(cfg.resume))
    info = _released(cfg) if found is None else found.info
    check_classes(labels_of(cfg), info, f"resume={cfg.resume}")
    engine = instantiate(cfg.engine)
    if found is not None:
        build.check_fits(cfg, found)
        found = checkpoint.read(found.path, finite=cfg.finite_weights)
    model = build.model(cfg)
    if found is not None:
        checkpoint.load_weights(model, found)
    palette = [(red, green, blue) for red, green, blue in info["palette"]]
    return Trained(model.to(engine.device).eval(), engine, info["classes"], palette, info["ignore_index"], info)


def sizes_to_keep(trained: Trained, out_dir: Path) -> TrainedSizes | None:
    """Return the sizes that pictures are brought to; None where `resolution.longest` on the command line says it."""
    typed = any(word.lstrip("+").startswith("resolution.longest=") for word in command_line(out_dir))
    return None if typed else TrainedSizes.from_info(trained.info)


def is_trained(cfg: DictConfig) -> bool:
    """Return whether a config names a trained model: a checkpoint, or a head that was released trained."""
    head = plain(cfg.head)
    return cfg.resume is not None or (head.get("weights") is not None and head.get("class_layer") != "new")


def _released(cfg: DictConfig) -> dict[str, Any]:
    """Return what a checkpoint would say of the classes, for a head whose weights come from a file.

    Raises:
        UserError: the head is not trained.
    """
    if not is_trained(cfg):
        raise UserError(
            "resume is not set: this mode needs a trained model. Give resume=RUN_FOLDER or a checkpoint; or use a head "
            "that was released trained, as hparam=ade20k_m2f head.weights=FILE does."
        )
    labels = labels_of(cfg)
    return {"classes": list(labels.classes), "palette": labels.palette, "ignore_index": labels.ignore_index}


def labels_of(cfg: DictConfig) -> Labels:
    """Return the classes of a config's data set, which need no file but `classes.yaml`."""
    return Labels.of(cfg.data.classes, cfg.data.palette, cfg.data.ignore_index)


def description(cfg: DictConfig, data: SegmentationData | Labels) -> dict[str, Any]:
    """Return what a run's checkpoints say of themselves beside their progress."""
    return {
        **description_of(cfg),
        "classes": list(data.classes),
        "palette": [list(colour) for colour in data.palette],
        "ignore_index": data.ignore_index,
        "versions": {"dinoseg": __version__, "torch": torch.__version__},
    }


def description_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of the description that the config alone decides."""
    config = {key: value for key, value in plain(cfg).items() if key in KEPT}
    config["data"] = {**settled(cfg.data), **dict.fromkeys(ACTING)}
    config["head"] = settled(cfg.head)  # its grid is what it was trained for, whatever later images are seen at
    return {"config": config, "choices": _chosen(cfg), "folder": str(Path.cwd())}


def check_classes(data: SegmentationData | Labels, found: Mapping[str, Any], where: str) -> None:
    """Refuse data whose classes are not those of a checkpoint's description.

    Raises:
        UserError: naming both.
    """
    now, then = (list(data.classes), data.ignore_index), (list(found["classes"]), found["ignore_index"])
    if now != then:
        raise UserError(
            f"{where}: the data has the classes {', '.join(now[0])} (ignored: {now[1]}), and the checkpoint was "
            f"trained on {', '.join(then[0])} (ignored: {then[1]}). Use data of the same classes in the same order."
        )


def _kept(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a checkpoint, which may be older than a key: then it stands as what was meant."""
    kept = renamed({key: info["config"][key] for key in KEPT})
    trainer = {"feed": "images", "epochs": None, **kept["trainer"]}
    data = {"background": _background_of_old(info), **kept["data"]}
    return {**kept, "trainer": trainer, "data": data}


def _background_of_old(info: Mapping[str, Any]) -> int | None:
    """Return the background of a run that is older than the key, when scores without it were those without class 0."""
    names = info.get("classes") or [""]
    chosen_by = info["config"]["trainer"].get("score")
    return 0 if str(names[0]).lower() == "background" or chosen_by == "miou_no_background" else None


def recipe_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two runs the same recipe, as a checkpoint would give it back."""
    config = json.loads(json.dumps(_kept(info)))
    trainer = {key: value for key, value in config["trainer"].items() if key not in LENGTHS}
    # by the background alone a score differs, and nothing that is trained
    data = {**config["data"], "root": _root(config, Path(info["folder"]))[0], "background": None}
    return {**config, "trainer": trainer, "data": data}


def _chosen(cfg: DictConfig) -> dict[str, str]:
    return {group: cfg.choices[group] for group in CHOSEN}


def _check_choice(group: str, option: str, path: Path, info: Mapping[str, Any]) -> None:
    was = info["choices"][group]
    if group != "data" and option != was:
        raise UserError(
            f"{group}={option}: the checkpoint {path} was trained with {group}={was}. Leave {group} out, or "
            f"start a new run without resume."
        )


def _check_key(name: str, cfg: DictConfig, merged: DictConfig, path: Path) -> None:
    """Refuse a key that the checkpoint's config lacks, unless it is one of the same options' that is newer."""
    known, group = plain(merged), name.split(".")[0]
    newer = cfg.choices.get(group) == merged.choices.get(group) and has_key(plain(cfg), name)
    if not newer and not has_key(known, name):
        own = [key for key in keys_of(known) if key.split(".")[0] in KEPT]
        raise UserError(
            f"{name} is no key of the config of resume={path}.{nearest(name, own)} To add it all the same, give "
            f"++{name}=VALUE."
        )


def _root(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Return a data root as a whole path, and what to say of the choice.

    A relative one is that of the run, below the folder where it was started, even if there is one of the same name
    here: that may be another data set. Only where the run's is not there, the one here is taken. What is no name of a
    folder is none given.
    """
    root = config["data"].get("root")
    if not isinstance(root, str):
        return "???", ""
    if root == "???" or "${" in root:
        return root, ""
    try:
        here, there = (place.resolve() for place in (Path(root).expanduser(), folder / Path(root).expanduser()))
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
