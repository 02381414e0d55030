"""Provenance of a report: command line, versions, device and config."""

import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from dinoseg import __version__
from dinoseg.config.plain import plain
from dinoseg.experiment.folder import command_line
from dinoseg.report.html.about import About

EVALUATION = "evaluation"  # in a run folder of mode=train: evaluation of its best checkpoint
_LIBRARIES = ("torch", "transformers", "timm", "numpy", "omegaconf")


@dataclass(frozen=True)
class Origin:
    """Origin of an evaluated model.

    Args:
        model: its checkpoint, or its released weights.
        folder: run folder that stores the command line.
        training: run folder of the model's training; None if unknown.
    """

    model: str
    folder: Path
    training: Path | None

    @classmethod
    def of(cls, cfg: DictConfig, out_dir: Path, best: Path | None = None) -> "Origin":
        """Return the origin of an evaluation into `out_dir`, or of the evaluation of `best` that ends a training."""
        if best is not None:
            run = best.parent.parent
            return cls(str(best), run, run)
        if cfg.resume is not None:
            return cls(str(cfg.resume), out_dir, Path(cfg.resume).parent.parent)
        return cls(str(plain(cfg.head).get("weights")), out_dir, None)


def about_run(cfg: DictConfig, out_dir: Path, facts: Mapping[str, str], device: torch.device | None = None) -> About:
    """Return the provenance of a run.

    Args:
        cfg: the whole config.
        out_dir: run folder, which stores the command line.
        facts: entries from the mode itself, by name.
        device: compute device; None leaves it out.
    """
    command = f"python -m dinoseg {shlex.join(command_line(out_dir))}"
    machine = {
        "dinoseg": __version__,
        "Python": platform.python_version(),
        **{name: found for name in _LIBRARIES if (found := _version(name)) is not None},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
    }
    if device is not None:
        machine["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return About(command, {**facts, **machine}, OmegaConf.to_yaml(cfg))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
