"""DINO, DINOv2 and DINOv3 vision transformers, built on the models of Hugging Face transformers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, BlockKwargs
from dinoseg.core.geometry import resize
from dinoseg.models.backbones.attention import (
    class_maps,
    key_maps,
    mask_queries_only,
    register_query_mask,
    watch_transformers,
)
from dinoseg.models.backbones.layers import Layers, resolve_layers
from dinoseg.models.backbones.normalisation import ColourMean, ColourStd, register_colours, resolve_colours
from dinoseg.models.backbones.patch_projection import ChannelWeight, PatchProjection, adapt_input
from dinoseg.models.backbones.pretrained import configuration, exported_state, load_model
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Channels, Count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
register_query_mask()


METHODS = {  # (offset, antialias) of Meta's published models, by transformers model type
    "vit": (0.1, False),
    "dinov2": (0.1, False),
    "dinov2_with_registers": (0.0, True),
}


class TransformersVit(Backbone):
    """DINO vision transformer that returns its patch tokens as maps.

    Images (B, 3, H, W), float RGB in 0..1, any H and W; returns L maps (B, dim, h, w), h = ceil(H / patch_size), one
    for each of `layers`. Each map passes the final LayerNorm (as in Meta's `get_intermediate_layers(norm=True)`)
    unless `final_norm` is False. Class and register tokens are dropped by count. Images are normalised, then padded
    with zeros (the mean colour) at the bottom and on the right.

    Learned positions (DINO, DINOv2) are resampled to the grid as in Meta's code, see `positions.interpolate`.
    DINOv3's random rescaling of positions in training is off unless enabled in `arch` (`pos_embed_rescale`).

    Args:
        family: transformers model type: `vit` (DINO), `dinov2`, `dinov2_with_registers` or `dinov3_vit`.
        arch: values of its configuration, so that the model can be built without weights or network.
        weights: a hub id (`id` or `id@revision`), a local folder, a safetensors file, a checkpoint file of Meta,
            `dinoseg:NAME` or `random`.
        patch_size: side of a patch in pixels.
        layers: 0-based blocks to return; negative numbers count from the last; `quarters` for four spread evenly.
        mean: RGB mean of the images the weights were trained on, in 0..1; None: ImageNet's, or those of satellite
            images if the name of the weights contains `sat493m`.
        std: RGB standard deviation of the same images.
        checkpointing: recompute block activations in the backward pass: less memory, about a third more time.
        local_cls_norm: store the second final norm of Meta's ViT-7B, which is used only in pre-training.
        dtype: `float32`, or `bfloat16` to store the weights in half the memory; the maps are always float32.
        final_norm: apply the final LayerNorm to the maps, although its scales and shifts were learned for the last
            block; False removes it from the model.
        weights_patch_size: side of a patch of the weights in pixels, if it differs from `patch_size`. The patch
            kernel is then resampled (Beyer et al., arXiv 2212.08013, equation 3), as EoMT does with DINOv2.
        channels: number of channels of the images; three are RGB.
        channel_weights: factor of each channel's kernel in the first convolution, such as `[1, 1, 1, 0]` for a fourth
            channel that starts without influence, see `adapt_input_kernel`; None: as timm adapts it.

    Raises:
        UserError: invalid key or value in `arch`, layer out of range, invalid colour statistics, or
            weights that are not available or do not fit.
    """

    has_class_attention = True
    has_tokens = True

    def __init__(
        self,
        family: Literal["vit", "dinov2", "dinov2_with_registers", "dinov3_vit"],
        arch: Mapping[str, Any],
        weights: str,
        patch_size: Count,
        layers: Layers = (-1,),
        mean: Sequence[ColourMean] | None = None,
        std: Sequence[ColourStd] | None = None,
        checkpointing: bool = False,
        local_cls_norm: bool = False,
        dtype: Literal["float32", "bfloat16"] = "float32",
        final_norm: bool = True,
        weights_patch_size: Count | None = None,
        channels: Channels = 3,
        channel_weights: Sequence[ChannelWeight] | None = None,
    ) -> None:
        super().__init__()
        config = _config(family, {**arch, "patch_size": weights_patch_size or patch_size})
        self.layers = resolve_layers(layers, config.num_hidden_layers)
        self.patch_size = patch_size
        self.dim = config.hidden_size
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.depth = config.num_hidden_layers
        self.num_layers = len(self.layers)
        self.num_prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.weights = weights
        self._has_norm = final_norm
        self.local_cls_norm = nn.LayerNorm(self.dim) if local_cls_norm else None
        self.model = load_model(config, weights, self._cut, self.local_cls_norm)
        if config.patch_size != patch_size:
            _resample_patches(self.model, patch_size)
        projection = _patch_projection(self.model)
        projection.__class__ = PatchProjection
        if projection.in_channels != channels or channel_weights is not None:
            adapt_input(projection, channels, channel_weights)
            _set_channels(self.model, channels)
        self.model.to(DTYPES[dtype])
        mask_queries_only(self.model)
        if checkpointing:
            _enable_checkpointing(self.model)
            # blocks recompute themselves in train mode alone, but gradients of queries also pass through frozen ones
            self.recomputed_modes = (False,)
        self.unused = [
            name for name, _ in self.named_parameters() if name.endswith("mask_token") or "local_cls_norm" in name
        ]
        register_colours(self, *resolve_colours(weights, mean, std, channels=channels))

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks up to the last tapped one, in order."""
        return _blocks(self.model)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm, or an identity if it was removed."""
        return getattr(self.model, _norm_name(self.model))

    def embed(self, images: Tensor) -> Tensor:
        """See `Backbone`."""
        embeddings: Any = self.model.embeddings
        pixels = self.pixels(images).to(embeddings.cls_token.dtype)
        has_rotary = hasattr(self.model, "rope_embeddings")
        return embeddings(pixels) if has_rotary else self._embed_with_learned_positions(pixels)

    def block_kwargs(self, size: tuple[int, int]) -> BlockKwargs:
        """See `Backbone`: rotary positions, if any."""
        model: Any = self.model
        if not hasattr(model, "rope_embeddings"):
            return {}
        padded = [cells * self.patch_size for cells in self.grid(size)]
        # only shape and dtype are used
        pixels = model.embeddings.cls_token.new_empty(()).expand(1, self.channels, *padded)
        return {"position_embeddings": model.rope_embeddings(pixels)}

    def _embed_with_learned_positions(self, pixels: Tensor) -> Tensor:
        # transformers resamples positions differently from the code that trained the weights
        parts: Any = self.model.embeddings
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        offset, antialias = METHODS[self.model.config.model_type]
        positions = interpolate(parts.position_embeddings, grid, offset=offset, antialias=antialias)
        patches = parts.patch_embeddings(pixels) + positions[:, 1:]
        prefix = [parts.cls_token + positions[:, :1]]
        if hasattr(parts, "register_tokens"):
            prefix.append(parts.register_tokens)  # registers have no position
        tokens = [*(part.expand(pixels.shape[0], -1, -1) for part in prefix), patches]
        return parts.dropout(torch.cat(tokens, dim=1))

    @property
    def first_trained(self) -> int | None:
        """See `Backbone`; also 0 if training randomises the positions, which all blocks must share."""
        first, model = super().first_trained, self.model.config
        drawn = [getattr(model, f"pos_embed_{how}", None) for how in ("shift", "jitter", "rescale")]
        return 0 if first and any(drawn) else first

    def trainable_tokens(
        self, frozen: list[Tensor], block_kwargs: BlockKwargs, skipped_prefix: int = 0
    ) -> list[Tensor]:
        """See `Backbone`; cached features are float32."""
        embeddings: Any = self.model.embeddings
        frozen = [part.to(embeddings.cls_token.dtype) for part in frozen]
        return super().trainable_tokens(frozen, block_kwargs, skipped_prefix)

    def with_class_attention(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and the class token's attention in the last tapped block, from one forward pass.

        The attention is (B, heads, h, w), float32: softmax weights over all tokens. Those of class and register
        tokens are left out, so each head sums to less than 1. No gradient passes through it.
        """
        blocks: Any = self.blocks
        with watch_transformers(blocks[-1].attention) as calls:
            maps = self(images)
        return maps, class_maps(calls[0], self.num_prefix, maps[0].shape[2:])

    def with_keys(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and the attention keys (B, dim, h, w) of the last tapped block, without gradients."""
        blocks: Any = self.blocks
        with watch_transformers(blocks[-1].attention) as calls:
            maps = self(images)
        return maps, key_maps(calls[0], self.num_prefix, maps[0].shape[2:])

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names that `weights` accepts in a file.

        Raises:
            UserError: the model has LoRA updates that are not merged.
        """
        return exported_state(self.model)

    def _cut(self, model: Any) -> None:
        """Remove the blocks after the last tapped one, and the final norm if `final_norm` is False."""
        del _blocks(model)[max(self.layers) + 1 :]
        if not self._has_norm:
            setattr(model, _norm_name(model), nn.Identity())


def _config(family: str, values: dict[str, Any]) -> Any:
    defaults = {"pos_embed_rescale": None} if family == "dinov3_vit" else {}
    return configuration(family, {**defaults, **values})


def _norm_name(model: Any) -> str:
    return "norm" if hasattr(model, "norm") else "layernorm"


def _blocks(model: Any) -> nn.ModuleList:
    if model.config.model_type == "vit":
        return model.layers
    return model.model.layer if model.config.model_type == "dinov3_vit" else model.encoder.layer


def _set_channels(model: Any, channels: int) -> None:
    """Let a model accept images of this number of channels."""
    model.config.num_channels = channels
    model.embeddings.num_channels = channels
    model.embeddings.patch_embeddings.num_channels = channels


def _patch_projection(model: Any) -> nn.Conv2d:
    embeddings = model.embeddings.patch_embeddings
    return getattr(embeddings, "projection", embeddings)


def _resample_patches(model: Any, patch_size: int) -> None:
    """Resample the kernel of the patch embedding to another side in pixels, in place."""
    from timm.layers import resample_patch_embed

    projection = _patch_projection(model)
    kernel, side = projection.weight.detach(), patch_size
    outline = kernel.new_empty(*kernel.shape[:2], side, side)
    resampled = outline if kernel.is_meta else resample_patch_embed(kernel, [side, side])
    projection.weight = nn.Parameter(resampled)
    projection.kernel_size = projection.stride = (side, side)
    model.config.patch_size = patch_size


def _enable_checkpointing(model: Any) -> None:
    # transformers 5 renamed this method in a minor release
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def interpolate(positions: Tensor, grid: tuple[int, int], *, offset: float, antialias: bool) -> Tensor:
    """Resample learned positions of a square grid bicubically to another grid.

    With an offset, the scale is (cells + offset) / stored cells, so cells are not quite evenly spread. This early
    guard against rounding was active when the weights were trained; leaving it out visibly changes DINO's and
    DINOv2's features. Half-precision positions are resampled in float32.

    Args:
        positions: (1, 1 + M * M, C): the class token, then the stored grid, row by row.
        grid: (h, w), rows and columns of patches. Only at (M, M) are the positions returned unchanged, even with an
            offset.
        offset: in cells of the target grid; 0 resamples to the exact size.
        antialias: widen the kernel when the grid shrinks.

    Returns:
        (1, 1 + h * w, C), with the class token's position unchanged.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if not torch.compiler.is_exporting() and grid == (side, side):
        return positions
    precise = at_least_float32(positions)
    stored = precise[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, C, M, M)
    if torch.compiler.is_exporting():
        resized = _interpolate_traced(stored, grid, offset, antialias)
    elif offset:
        scale = ((grid[0] + offset) / side, (grid[1] + offset) / side)
        resized = F.interpolate(stored, scale_factor=scale, mode="bicubic", antialias=antialias)
    elif antialias:
        resized = resize(stored, grid, "bicubic")
    else:
        resized = F.interpolate(stored, grid, mode="bicubic")
    return torch.cat([precise[:, :1], resized.flatten(2).transpose(1, 2)], dim=1).to(positions.dtype)


def _interpolate_traced(stored: Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> Tensor:
    """Return the interpolation as two matrix products, (1, C, h, w), so that exported graphs accept any grid.

    Other runtimes round scales differently and use a different antialiased bicubic kernel.
    """
    side = stored.shape[-1]
    height, width = (torch.full((), cells, dtype=torch.float32) for cells in grid)
    is_stored = (height == side) & (width == side)
    more = torch.where(is_stored, 0.0, offset)
    rows = _bicubic_matrix(torch.arange(grid[0]), side, (height + more) / side, antialias)  # (h, M)
    columns = _bicubic_matrix(torch.arange(grid[1]), side, (width + more) / side, antialias)  # (w, M)
    return rows @ stored @ columns.T


def _bicubic_matrix(cells: Tensor, side: int, scale: Tensor, antialias: bool) -> Tensor:
    """Return the weights (cells, side) of `side` stored cells for `cells`; borders replicate the last cell."""
    reach = (1 / scale).clamp(min=1) if antialias else torch.ones(())  # the kernel widens where the grid shrinks
    sharpness = -0.5 if antialias else -0.75  # torch's constants
    centres = (cells + 0.5) / scale - 0.5
    if antialias:
        taps = _bicubic((torch.arange(side) - centres[:, None]) / reach, sharpness)
        return taps / taps.sum(dim=1, keepdim=True)
    steps = torch.arange(-1, 3)
    taps = centres.floor()[:, None] + steps  # (cells, 4)
    weights = _bicubic(taps - centres[:, None], sharpness)
    stored = taps.clamp(0, side - 1)[..., None] == torch.arange(side)  # (cells, 4, side)
    return (weights[..., None] * stored).sum(dim=1)


def _bicubic(distance: Tensor, a: float) -> Tensor:
    """Return Keys' cubic convolution kernel."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros(())))
