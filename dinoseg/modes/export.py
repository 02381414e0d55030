"""mode=export: write a trained backbone as a file that `backbone.weights=FILE` reads."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from dinoseg.errors import UserError
from dinoseg.resume import load_trained

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(cfg: DictConfig, *, out_dir: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write the backbone of the checkpoint that `resume` names to `out_dir`/backbone.safetensors.

    Raises:
        UserError: an unknown dtype, or a backbone that holds LoRA updates, which are not weights of their own.
    """
    if dtype not in DTYPES:
        raise UserError(f"mode.dtype={dtype} is unknown. Choose one of {', '.join(DTYPES)}.")
    model = load_trained(cfg).model
    state = model.backbone.model.state_dict()  # type: ignore[union-attr]
    if any(".lora_" in name for name in state):
        raise UserError("This backbone holds LoRA updates: export a run of adapter=full.")
    path = out_dir / "backbone.safetensors"
    save_file({name: value.cpu().to(DTYPES[dtype]).contiguous() for name, value in state.items()}, path)
    print(f"written to {path}: {len(state)} tensors, {path.stat().st_size / 1e6:.2f} MB. Use: backbone.weights={path}")
    return {"run": str(out_dir), "path": str(path)}
