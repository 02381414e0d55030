"""mode=export: write a trained model, or its backbone, as a file for other uses; `export` says which."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.nodes import instantiate


def export(cfg: DictConfig, *, out_dir: Path) -> dict[str, Any]:
    """Write what `export` asks for of the checkpoint that `resume` names to `out_dir`, and return where.

    Raises:
        UserError: as the export says.
    """
    return {"run": str(out_dir), **instantiate(cfg.export)(cfg, out_dir=out_dir)}
