"""mode=export: write a trained backbone as a file that `backbone.weights=FILE` reads."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.resume import load_trained
from dinoseg.training.checkpoint import write_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(cfg: DictConfig, *, out_dir: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write the backbone of the checkpoint that `resume` names to `out_dir`/backbone.safetensors.

    Raises:
        UserError: an unknown dtype, or a backbone that holds LoRA updates, which are not weights of their own.
    """
    if dtype not in DTYPES:
        raise UserError(f"mode.dtype={dtype} is unknown. Choose one of {', '.join(DTYPES)}.")
    backbone: Any = load_trained(cfg).model.backbone
    state = {name: value.to(DTYPES[dtype]) for name, value in backbone.export_state().items()}
    path = out_dir / "backbone.safetensors"
    write_tensors(path, state, {})
    print(f"written to {path}: {len(state)} tensors, {path.stat().st_size / 1e6:.2f} MB. Use: backbone.weights={path}")
    return {"run": str(out_dir), "path": str(path)}
