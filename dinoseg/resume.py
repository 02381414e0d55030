"""Going on from a checkpoint: its config, with what the command line changes, and its model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dinoseg import __version__, build
from dinoseg.config import plain
from dinoseg.errors import UserError
from dinoseg.model import Segmenter
from dinoseg.shapes import Palette, SegmentationData
from dinoseg.training import checkpoint
from dinoseg.training.engine import Engine

MODEL = ("backbone", "adapter", "head", "loss", "optim", "trainer")  # groups that a checkpoint fixes
KEPT = ("seed", "resolution", "data", *MODEL)  # root keys that a checkpoint keeps
CHOSEN = ("hparam", "data", *MODEL)


def locate(cfg: DictConfig, out_dir: Path, prefer: str) -> Path | None:
    """Return the checkpoint that `resume` means; None for `auto` where no run of this recipe has one yet.

    A run is of the same recipe if nothing but its length (`trainer`) and its data folder (`data.root`) differs.
    """
    if cfg.resume != "auto":
        return checkpoint.find(cfg.resume, prefer)
    recipe = next((folder for folder in out_dir.parents if folder.name == cfg.choices.hparam), out_dir.parent)
    runs = recipe.rglob(f"{checkpoint.FOLDER}/{prefer}.safetensors")
    for path in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True):
        if _recipe(checkpoint.describe(path)["config"]) == _recipe(plain(cfg)):
            return path
    return None


def merge(cfg: DictConfig, overrides: Sequence[str], found: checkpoint.Checkpoint) -> DictConfig:
    """Return `cfg` with the model, data and training of the checkpoint, changed as the command line says.

    Raises:
        UserError: the checkpoint's config is not to be trusted, or the command line names another model.
    """
    build.guard(found.info["config"], f"resume={found.path}")
    merged = OmegaConf.create({**plain(cfg), "resume": str(found.path), **found.info["config"]})
    _find_data_again(merged, Path(found.info["folder"]))
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name, value = override.key_or_group, override.value()
        if name in CHOSEN:
            _check_choice(name, str(value), found)
            if name == "data" and value != found.info["choices"]["data"]:
                merged.data = cfg.data
        elif name.split(".")[0] in KEPT:
            OmegaConf.update(merged, name, value, force_add=override.is_add())
    return merged


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

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.device

    def autocast(self) -> AbstractContextManager:
        """Return the precision's context for a forward pass."""
        return self.engine.autocast()


def load_trained(cfg: DictConfig) -> Trained:
    """Return the model that `resume` names, in eval mode; `cfg` is already merged with its checkpoint.

    Raises:
        UserError: `resume` is not given, or the checkpoint does not fit.
    """
    if cfg.resume is None:
        raise UserError("resume is not set: this mode needs a trained model. Give resume=RUN_FOLDER or a checkpoint.")
    found = checkpoint.read(Path(cfg.resume))
    engine = build.instantiate(cfg.engine)
    model = build.model(cfg)
    checkpoint.load_weights(model, found)
    palette = [(red, green, blue) for red, green, blue in found.info["palette"]]
    return Trained(model.to(engine.device).eval(), engine, found.info["classes"], palette, found.info["ignore_index"])


def description(cfg: DictConfig, data: SegmentationData) -> dict[str, Any]:
    """Return what a run's checkpoints say of themselves beside their progress."""
    config = plain(cfg)
    return {
        "config": {key: config[key] for key in KEPT},
        "choices": _chosen(cfg),
        "folder": str(Path.cwd()),
        "classes": list(data.classes),
        "palette": [list(colour) for colour in data.palette],
        "ignore_index": data.ignore_index,
        "versions": {"dinoseg": __version__, "torch": torch.__version__},
    }


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: config[key] for key in KEPT if key != "trainer"}
    return {**kept, "data": {**kept["data"], "root": None}}


def _chosen(cfg: DictConfig) -> dict[str, str]:
    return {group: cfg.choices[group] for group in CHOSEN}


def _check_choice(group: str, option: str, found: checkpoint.Checkpoint) -> None:
    was = found.info["choices"][group]
    if group != "data" and option != was:
        raise UserError(
            f"{group}={option}: the checkpoint {found.path} was trained with {group}={was}. Leave {group} out, or "
            f"start a new run without resume."
        )


def _find_data_again(cfg: DictConfig, folder: Path) -> None:
    """Let a relative data root that is not here point below the folder the run was started in."""
    root = plain(cfg.data).get("root")
    if isinstance(root, str) and not Path(root).exists() and (folder / root).exists():
        cfg.data.root = str(folder / root)
