"""DINOv2 and DINOv3 vision transformers, on Hugging Face transformers' models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.backbones.pretrained import exported_state, load_model
from dinoseg.errors import UserError
from dinoseg.geometry import pad_to_multiple


class TransformersVit(nn.Module):
    """A DINO vision transformer that returns its patch tokens as maps.

    Images (B, 3, H, W), float RGB in 0..1, any H and W; returns L maps (B, dim, h, w), h = ceil(H / patch_size),
    one for each of `layers`, each after the final LayerNorm (as Meta's `get_intermediate_layers(norm=True)`);
    the class and register tokens are dropped by count. Images are normalised here, then padded with zeros
    (the mean colour) at the bottom and on the right.

    DINOv3's random rescaling of positions in training is off unless `arch` asks for it (`pos_embed_rescale`).

    Args:
        family: `dinov2`, `dinov2_with_registers` or `dinov3_vit`: the transformers model type.
        arch: values of its configuration, so that it can be built without weights or network.
        weights: a hub id (`id` or `id@revision`), a local folder, a safetensors file, `dinoseg:NAME` or `random`.
        patch_size: side of a patch in pixels.
        layers: 0-based blocks to return; negative numbers count from the last.
        mean: RGB mean of the images the weights were trained on, in 0..1.
        std: RGB standard deviation of the same.
        checkpointing: recompute block activations in the backward pass: less memory, about a third more time.

    Raises:
        UserError: unknown family, a layer out of range, or weights that cannot be had or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        family: str,
        arch: Mapping[str, Any],
        weights: str,
        patch_size: int,
        layers: Sequence[int] = (-1,),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        config = _config(family, {**arch, "patch_size": patch_size})
        self.layers = _resolve_layers(layers, config.num_hidden_layers)
        self.patch_size = patch_size
        self.dim = config.hidden_size
        self.depth = config.num_hidden_layers
        self.num_layers = len(self.layers)
        self.num_prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.weights = weights
        self.model = load_model(config, weights)
        _drop_unused_blocks(self.model, self.depth, last=max(self.layers))
        if checkpointing:
            _enable_checkpointing(self.model)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, dim, h, w) for each tapped layer."""
        pixels = pad_to_multiple((images - self.mean) / self.std, self.patch_size)
        hidden = self.model(pixels, output_hidden_states=True).hidden_states  # depth + 1 of (B, N, dim)
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        norm: Any = self.model.norm if hasattr(self.model, "norm") else self.model.layernorm
        tokens = [norm(hidden[layer + 1])[:, self.num_prefix :] for layer in self.layers]  # L of (B, h * w, dim)
        return [part.transpose(1, 2).unflatten(2, grid) for part in tokens]

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names in which `weights` reads them from a file.

        Raises:
            UserError: it holds LoRA updates, which are no weights of their own.
        """
        return exported_state(self.model)


def _config(family: str, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    known = ("dinov2", "dinov2_with_registers", "dinov3_vit")
    if family not in known:
        raise UserError(f"backbone.family={family} is unknown. Choose one of {', '.join(known)}.")
    unknown = sorted(values.keys() - AutoConfig.for_model(family).to_dict().keys())
    if unknown:
        raise UserError(f"backbone.arch: {family} has no {', '.join(unknown)}. Check the key's spelling.")
    defaults = {"pos_embed_rescale": None} if family == "dinov3_vit" else {}
    return AutoConfig.for_model(family, **{**defaults, **values})


def _resolve_layers(layers: Sequence[int], depth: int) -> list[int]:
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise UserError(
            f"backbone.layers={list(layers)}: this backbone has {depth} blocks; give at least one number, "
            f"each from {-depth} to {depth - 1} (negative counts from the last)."
        )
    return [layer % depth for layer in layers]


def _drop_unused_blocks(model: nn.Module, depth: int, last: int) -> None:
    """Remove the blocks after the last tapped one: nothing reads them."""
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            del part[last + 1 :]


def _enable_checkpointing(model: Any) -> None:
    # transformers renamed this method in the course of version 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
