"""mode=export: export of a trained model or its backbone to a file, in the format of `export`."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.checkpoints.source import ModelSource
from dinoseg.config.nodes import instantiate


def export(cfg: DictConfig, *, out_dir: Path) -> dict[str, Any]:
    """Export the checkpoint that `resume` names to `out_dir` in the format of `export`; return the files.

    Raises:
        UserError: see the chosen export.
    """
    return {"run": str(out_dir), **instantiate(cfg.export)(ModelSource(cfg), out_dir=out_dir)}
