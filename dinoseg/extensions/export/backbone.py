"""Export of a trained backbone to a file for `backbone.weights=FILE`."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dinoseg.checkpoints.source import ModelSource
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.models.adapters import merge as merge_updates
from dinoseg.utils.tensor_files import write_tensors
from dinoseg.utils.wording import format_override

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_backbone(
    source: ModelSource,
    *,
    out_dir: Path,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    merge: bool = False,
) -> dict[str, Any]:
    """Write the backbone of a trained model to `out_dir`/backbone.safetensors.

    Args:
        source: the trained model.
        out_dir: the run folder.
        dtype: of the weights in the file.
        merge: add LoRA updates to their base weights; quantised base weights are replaced by their float32 values.

    Raises:
        UserError: if the backbone has unmerged LoRA updates, which are no stand-alone weights.
    """
    warn_unread(out_dir, ("resolution", "inference", "data", "cache_dir"), "The file holds weights only.")
    backbone = source.in_float32(source.load().model).backbone
    if merge:
        backbone = merge_updates(backbone)
    state = {name: value.to(DTYPES[dtype]) for name, value in backbone.export_state().items()}
    path = out_dir / "backbone.safetensors"
    write_tensors(path, state, {})
    words = [f"backbone.weights={path}", *_settings(source.settings("backbone"))]
    print(f"written to {path}: {len(state)} tensors, {path.stat().st_size / 1e6:.2f} MB. Use: {shlex.join(words)}")
    return {"path": str(path)}


def _settings(backbone: Mapping[str, Any]) -> Iterator[str]:
    """Yield the overrides with which the weights of a backbone are used as in its training."""
    if not backbone.get("final_norm", True):
        yield "backbone.final_norm=false"
    for key in ("mean", "std"):
        if backbone.get(key) is not None:
            yield f"backbone.{key}={format_override(backbone[key])}"
    if trained := backbone.get("weights_patch_size"):
        side, arch = backbone["patch_size"], backbone["arch"]
        yield f"backbone.patch_size={side}"
        yield "backbone.weights_patch_size=null"
        if "image_size" in arch:
            yield f"backbone.arch.image_size={arch['image_size'] // trained * side}"
