"""DINO, DINOv2 and DINOv3 vision transformers, on Hugging Face transformers' models."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, BesideTokens
from dinoseg.models.backbones.arch import configuration
from dinoseg.models.backbones.attention import mask_queries_only
from dinoseg.models.backbones.class_attention import on_patches, watch_transformers
from dinoseg.models.backbones.cut import onwards, until
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.models.backbones.positions import METHODS, interpolate
from dinoseg.models.backbones.pretrained import exported_state, load_model
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAMILIES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class TransformersVit(Backbone):
    """A DINO vision transformer that returns its patch tokens as maps.

    Images (B, 3, H, W), float RGB in 0..1, any H and W; returns L maps (B, dim, h, w), h = ceil(H / patch_size),
    one for each of `layers`, each after the final LayerNorm (as Meta's `get_intermediate_layers(norm=True)`) unless
    `final_norm` is false; the class and register tokens are dropped by count. Images are normalised here, then padded
    with zeros (the mean colour) at the bottom and on the right.

    Learned positions (DINO, DINOv2) are resampled to the grid as Meta's code does it, see `positions.interpolate`.
    DINOv3's random rescaling of positions in training is off unless `arch` asks for it (`pos_embed_rescale`).

    Args:
        family: `vit` (DINO), `dinov2`, `dinov2_with_registers` or `dinov3_vit`: the transformers model type.
        arch: values of its configuration, so that it can be built without weights or network.
        weights: a hub id (`id` or `id@revision`), a local folder, a safetensors file, a checkpoint file of Meta,
            `dinoseg:NAME` or `random`.
        patch_size: side of a patch in pixels.
        layers: 0-based blocks to return; negative numbers count from the last; `quarters` for four spread evenly.
        mean: RGB mean of the images the weights were trained on, in 0..1.
        std: RGB standard deviation of the same.
        checkpointing: recompute block activations in the backward pass: less memory, about a third more time.
        local_cls_norm: hold the second final norm of Meta's ViT-7B, which only its pre-training reads.
        dtype: `float32`, or `bfloat16` to hold the weights in half the memory; the maps are float32 all the same.
        final_norm: whether the maps pass the final LayerNorm, whose scales and shifts were learnt for the last block;
            if not, the model has none.

    Raises:
        UserError: unknown family, a key or value of `arch` that it cannot have, a layer out of range, colours that
            cannot be, or weights that cannot be had or do not fit.
    """

    has_class_attention = True
    takes_tokens = True
    takes_queries = True

    def __init__(
        self,
        family: str,
        arch: Mapping[str, Any],
        weights: str,
        patch_size: Count,
        layers: Sequence[int] | str = (-1,),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        checkpointing: bool = False,
        local_cls_norm: bool = False,
        dtype: str = "float32",
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        config = _config(family, {**arch, "patch_size": patch_size})
        if dtype not in DTYPES:
            raise UserError(f"backbone.dtype={dtype} is unknown. Choose one of {', '.join(DTYPES)}.")
        self.layers = resolve_layers(layers, config.num_hidden_layers)
        self.patch_size = patch_size
        self.dim = config.hidden_size
        self.depth = config.num_hidden_layers
        self.num_layers = len(self.layers)
        self.num_prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.weights = weights
        self._has_norm = final_norm
        self.local_cls_norm = nn.LayerNorm(self.dim) if local_cls_norm else None
        self.model = load_model(config, weights, self._cut, self.local_cls_norm)
        self.model.to(DTYPES[dtype])
        mask_queries_only(self.model)
        if checkpointing:
            _enable_checkpointing(self.model)
        self.unused = [
            name for name, _ in self.named_parameters() if name.endswith("mask_token") or "local_cls_norm" in name
        ]
        register_colours(self, mean, std)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks up to the last tapped one, in order."""
        return _blocks(self.model)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm, or what leaves all as it is."""
        return getattr(self.model, _norm_name(self.model))

    def embed(self, pixels: Tensor) -> tuple[Tensor, BesideTokens]:
        """Return the tokens (B, num_prefix + h * w, dim) that enter the first block, and what each block takes beside.

        Blocks are called as `block(tokens, **beside)`. More tokens may be put in front, and the first Q rows of the
        attention masked with `attention_mask` (B, 1, Q, N), bool, True = attend.
        """
        return self._tokens(pixels), self.beside((pixels.shape[-2], pixels.shape[-1]))

    def _tokens(self, pixels: Tensor) -> Tensor:
        parts: Any = self.model.embeddings
        pixels = pixels.to(parts.cls_token.dtype)
        return parts(pixels) if self._turns_positions else self._embed_with_learned_positions(pixels)

    def beside(self, size: tuple[int, int]) -> BesideTokens:
        """Return the rotary positions for padded pixels of `size` (H, W), where the model has such."""
        model: Any = self.model
        if not self._turns_positions:
            return {}
        pixels = model.embeddings.cls_token.new_empty(()).expand(1, 3, *size)  # of which only size and type are read
        return {"position_embeddings": model.rope_embeddings(pixels)}

    @property
    def _turns_positions(self) -> bool:
        return hasattr(self.model, "rope_embeddings")

    def _embed_with_learned_positions(self, pixels: Tensor) -> Tensor:
        # transformers resamples the positions in another way than the weights were trained with
        parts: Any = self.model.embeddings
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        offset, antialias = METHODS[self.model.config.model_type]
        positions = interpolate(parts.position_embeddings, grid, offset=offset, antialias=antialias)
        patches = parts.patch_embeddings(pixels) + positions[:, 1:]
        prefix = [parts.cls_token + positions[:, :1]]
        if hasattr(parts, "register_tokens"):
            prefix.append(parts.register_tokens)  # they have no position
        tokens = [*(part.expand(pixels.shape[0], -1, -1) for part in prefix), patches]
        return parts.dropout(torch.cat(tokens, dim=1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, dim, h, w) for each tapped layer."""
        return self.onwards(self.until(images), (images.shape[-2], images.shape[-1]))

    @property
    def first_trained(self) -> int | None:
        """As of `Backbone`; 0 as well where training draws positions at random, which all blocks have to share."""
        first, model = super().first_trained, self.model.config
        drawn = [getattr(model, f"pos_embed_{how}", None) for how in ("shift", "jitter", "rescale")]
        return 0 if first and any(drawn) else first

    def until(self, images: Tensor) -> list[Tensor]:
        """Return the patch tokens (B, h * w, dim) of each tapped block before the first one that is trained.

        If nothing is trained, they have passed the final norm. Else the tokens (B, num_prefix + h * w, dim) that enter
        the first trained block come last.
        """
        pixels = self.pixels(images)
        first, tokens = self.first_trained, self._tokens(pixels)
        cut = len(self.blocks) if first is None else first
        beside = self.beside((pixels.shape[-2], pixels.shape[-1])) if cut else {}
        given = until(list(self.blocks), cut, self.layers, tokens, self.num_prefix, beside)
        return [self.norm(patches) for patches in given] if first is None else given

    def onwards(self, frozen: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return the L maps (B, dim, h, w) for what `until` gave of images of `size` (H, W)."""
        rows, columns = (-(-side // self.patch_size) for side in size)
        first, tapped = self.first_trained, set(self.layers)
        cut = len(self.blocks) if first is None else first
        beside = partial(self.beside, (rows * self.patch_size, columns * self.patch_size))
        dtype = cast(Any, self.model).embeddings.cls_token.dtype
        frozen = [part.to(dtype) for part in frozen]  # kept ones are float32
        patches = onwards(list(self.blocks), cut, tapped, frozen, self.num_prefix, beside)
        if first is not None:
            patches = {number: self.norm(part) for number, part in patches.items()}
        return [patches[layer].transpose(1, 2).unflatten(2, (rows, columns)).float() for layer in self.layers]

    def with_class_attention(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps, and what the class token attends to in the last block that is read, from one pass.

        The latter is (B, heads, h, w), float32: softmax weights over all tokens, those of class and register tokens
        left out, so that a head's sum to less than 1; no gradient passes through it.
        """
        blocks: Any = self.blocks
        with watch_transformers(blocks[-1].attention) as rows:
            maps = self(images)
        return maps, on_patches(rows[0], self.num_prefix, maps[0].shape[2:])

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names in which `weights` reads them from a file.

        Raises:
            UserError: it holds LoRA updates, which are no weights of their own.
        """
        return exported_state(self.model)

    def _cut(self, model: Any) -> None:
        """Take away what nothing reads."""
        del _blocks(model)[max(self.layers) + 1 :]
        if not self._has_norm:
            setattr(model, _norm_name(model), nn.Identity())


def _config(family: str, values: dict[str, Any]) -> Any:
    if family not in FAMILIES:
        raise UserError(f"backbone.family={family} is unknown. Choose one of {', '.join(FAMILIES)}.")
    defaults = {"pos_embed_rescale": None} if family == "dinov3_vit" else {}
    return configuration(family, {**defaults, **values})


def _norm_name(model: Any) -> str:
    return "norm" if hasattr(model, "norm") else "layernorm"


def _blocks(model: Any) -> nn.ModuleList:
    if model.config.model_type == "vit":
        return model.layers
    return model.model.layer if model.config.model_type == "dinov3_vit" else model.encoder.layer


def _enable_checkpointing(model: Any) -> None:
    # transformers renamed this method in the course of version 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
