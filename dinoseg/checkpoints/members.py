"""Config of a job that uses several trained models as one, which the extension in `mode.ensemble` loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.checkpoints.resume import compose_resumed
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import is_sweep_folder


def names_ensemble(cfg: DictConfig) -> bool:
    """Return whether `resume` names several models: a list, or a sweep's folder for a mode that takes ensembles."""
    is_sweep = isinstance(cfg.resume, str) and is_sweep_folder(Path(cfg.resume).expanduser())
    return OmegaConf.is_list(cfg.resume) or (is_sweep and cfg.mode.get("ensemble") is not None)


def compose_ensemble(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """Return the config of an ensemble's first model, with those of the others in `members`.

    Raises:
        UserError: the mode, or this installation, has no ensembles.
    """
    if cfg.mode.get("ensemble") is None:
        raise UserError(
            f"resume={cfg.resume}: mode={cfg.choices.mode} takes no ensemble. Give one run folder or checkpoint. -m "
            "runs a mode for each of several."
        )

    def compose_run(path: Path) -> dict[str, Any]:
        return to_container(compose_resumed(cfg, words, path, checkpoint.describe(path)))

    resume = cfg.resume if isinstance(cfg.resume, str) else OmegaConf.to_container(cfg.resume, resolve=True)
    ensemble = instantiate(cfg.mode.ensemble)
    return OmegaConf.create(ensemble.compose(resume, cfg.mode.get("split"), compose_run))
