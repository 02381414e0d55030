"""Plain Mask Transformer (PMT): queries and the tokens of a backbone, usually frozen, pass through blocks of the head.

Names of the official code and its files of weights: tue-mps/pmt, image/models/pmt.py and pmd.py, commit 54d73c9.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone
from dinoseg.core.shapes import MaskOutputs
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, check_annotations
from dinoseg.utils.tensor_files import check_weights, read_tensor_file
from dinoseg.utils.wording import count_of

_BASE = 100.0  # of the frequencies of rotary positions, as in DINOv3
_RESCALE = 2.0  # in training, the head's own positions are multiplied by a factor from 1 / 2 to 2
_FIRST_END = 0.15  # share of the training after which the first mask is gone; published: 3,000 of 20,192 steps (ADE20K)
_CLASS_LAYER = "classify."
_PARTS = {  # official names of the head's parts, below `network.`
    "queries": "decoder.q.weight",
    "norms": "bn",
    "laterals": "decoder.lateral_projections",
    "scales": "decoder.scalers",
    "decoder": "decoder.blocks",
    "decoder_norm": "decoder.decoder_norm",
    "classify": "decoder.class_head",
    "mask_embed": "decoder.mask_head",
    "upscale": "decoder.upscale",
}
_LAYERS = {  # official names of layers inside these parts
    **{name: f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("up_proj", "down_proj")},
    **{"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"},
    **{"grow": "conv1", "mix": "conv2"},
}


class PmtHead(EomtHead):
    """Mask classification by queries that join tokens of a plain ViT in blocks of the head (arXiv 2603.25398).

    The backbone can stay frozen: nothing of the head is inside it, and its tokens can be cached. All tokens of several
    blocks of the backbone, class and register tokens too, pass BatchNorm, a residual MLP and a factor for each channel,
    and are summed. The queries join this sum in blocks with rotary positions: those of the backbone (DINOv3), else own
    ones, which training rescales at random. Masks, deep supervision and annealing are those of `EomtHead`.

    Published settings: four maps, the last of each quarter of the backbone (blocks 5, 11, 17 and 23 of ViT-L), 6
    blocks, 100 queries for semantic maps, 200 for objects.

    Args:
        in_dim: width of the backbone.
        num_layers: number of blocks of the backbone that the head reads.
        num_classes: number of classes K.
        patch_size: side of the backbone's patches in pixels.
        num_queries: masks per image, at least 1.
        blocks: number of the head's blocks.
        no_object: add a "no object" class to the class logits of the queries.
        anneal: see `EomtHead`. `even`: the first mask is removed during the first 0.15 of the training; the others each
            take a sixth of it, and start evenly spread between 4/15 and 4/6, as in the published configs.
        weights: PMT's released decoder (`pytorch_model.bin`), or a file with the same names; None: random.
        class_layer: with `weights`, `loaded` uses the class layer of the file, `new` a random one for other classes.

    Raises:
        UserError: the widths are those of a pyramid, an option is out of range, or the weights do not fit.
    """

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        *,
        patch_size: Count,
        num_queries: Count = 100,
        blocks: Count = 6,
        no_object: bool = True,
        anneal: str | Sequence[Sequence[float]] = "even",
        weights: str | None = None,
        class_layer: Literal["loaded", "new"] = "loaded",
    ) -> None:
        if class_layer == "new" and not weights:
            raise UserError(
                "class_layer=new without weights: the whole head is new. Leave class_layer out, or give weights=FILE."
            )
        super().__init__(
            in_dim,
            num_layers,
            num_classes,
            patch_size=patch_size,
            num_queries=num_queries,
            blocks=blocks,
            no_object=no_object,
            anneal=even_windows(blocks) if anneal == "even" else anneal,
        )
        in_dim = self.queries.shape[1]
        self.joint_blocks = 0  # the queries pass none of the backbone's
        self.norms = nn.ModuleList(nn.BatchNorm1d(in_dim) for _ in range(num_layers))
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim, in_dim // 2), nn.GELU(), nn.Linear(in_dim // 2, in_dim))
            for _ in range(num_layers)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(in_dim)) for _ in range(num_layers))
        self.decoder = nn.ModuleList(_Block(in_dim) for _ in range(blocks))
        self.decoder_norm = nn.LayerNorm(in_dim)
        self.weights = weights
        if weights and not self.queries.is_meta:  # on meta only sizes are counted, without the file
            load_decoder(self, weights, new_class_layer=class_layer == "new")

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone without tokens, or one whose heads of attention do not fit its width.

        Raises:
            UserError: the backbone does not fit.
        """
        super().check_backbone(backbone)
        dim, head_dim = self.queries.shape[1], backbone.head_dim
        if dim % head_dim or head_dim % 4:
            raise UserError(
                f"head_dim={head_dim}: blocks of PMT need a multiple of 4 that divides the backbone's width of {dim}. "
                f"Set `head_dim` in {type(backbone).__name__} to the width of a head of its attention, or choose eomt."
            )

    def run(self, backbone: Backbone, images: Tensor) -> MaskOutputs:
        """Return masks (B, Q, h * 2^n, w * 2^n) and class logits; in training also those of earlier blocks."""
        size = (images.shape[-2], images.shape[-1])
        return self.forward_trainable(backbone, self.forward_frozen(backbone, images), size)

    def forward_trainable(self, backbone: Backbone, frozen: list[Tensor], size: tuple[int, int]) -> MaskOutputs:
        """Return the outputs for the result of `forward_frozen` for images passed to the backbone at `size` (H, W)."""
        block_kwargs = backbone.block_kwargs(size)
        tokens = backbone.trainable_tokens(frozen, block_kwargs)
        grid = backbone.grid(size)
        # sum over the blocks of (x + MLP(x)) * scale, where x = BatchNorm(tokens of the block), which takes (B, dim, N)
        parts = zip(tokens, self.norms, self.laterals, self.scales, strict=True)
        normed = [(norm(part.mT).mT, lateral, scale) for part, norm, lateral, scale in parts]
        fused = torch.stack([(part + lateral(part)) * scale for part, lateral, scale in normed]).sum(dim=0)
        # a backbone with learned positions has no rotary ones to share: the head computes DINOv3's
        if not block_kwargs:
            positions = rotary_positions(grid, backbone.head_dim, fused, rescale=_RESCALE if self.training else None)
            block_kwargs = {"position_embeddings": positions}
        blocks = [partial(block, **block_kwargs) for block in self.decoder]
        return self.join(fused, blocks, self.decoder_norm, grid)


class _Block(nn.Module):
    """Transformer block with rotary positions: that of DINOv3, with a hidden width of the MLP of 1 x dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim)
        # no bias of keys, as in DINOv3
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.scale1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim)
        self.up_proj = nn.Linear(dim, dim)
        self.down_proj = nn.Linear(dim, dim)
        self.scale2 = nn.Parameter(torch.ones(dim))

    def forward(
        self, tokens: Tensor, *, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the tokens (B, N, dim) after the block.

        Args:
            tokens: (B, N, dim), the patches last.
            attention_mask: (B, 1, Q, N), bool, True = attend, of the first Q tokens; None: all attend to all.
            position_embeddings: cosines and sines (h * w, head_dim) of the patches' positions.
        """
        head_dim = position_embeddings[0].shape[-1]
        normed = self.norm1(tokens)
        projected = [layer(normed) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = (part.unflatten(2, (-1, head_dim)).transpose(1, 2) for part in projected)
        query = rotate_patches(query, *position_embeddings)  # (B, heads, N, head_dim)
        key = rotate_patches(key, *position_embeddings)
        rows = 0 if attention_mask is None else attention_mask.shape[2]
        attended = F.scaled_dot_product_attention(query[:, :, rows:], key, value)
        if attention_mask is not None:  # a mask for all rows would cost the fast kernels
            masked = F.scaled_dot_product_attention(query[:, :, :rows], key, value, attn_mask=attention_mask)
            attended = torch.cat([masked, attended], dim=2)
        tokens = tokens + self.o_proj(attended.transpose(1, 2).flatten(2)) * self.scale1
        return tokens + self.down_proj(F.gelu(self.up_proj(self.norm2(tokens)))) * self.scale2


def rotate_patches(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys (B, heads, N, C), the last h * w tokens rotated by their positions (h * w, C) each.

    The i-th channel of the first half of C and of the second half form a pair, which is rotated by one angle.
    """
    others, patches = heads.split([heads.shape[2] - cos.shape[0], cos.shape[0]], dim=2)
    first, second = patches.chunk(2, dim=-1)
    rotated = patches * cos.to(patches.dtype) + torch.cat([-second, first], dim=-1) * sin.to(patches.dtype)
    return torch.cat([others, rotated], dim=2)


def rotary_positions(
    grid: tuple[int, int], head_dim: int, like: Tensor, *, rescale: float | None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (h * w, head_dim) of positions on a grid (h, w), as DINOv3 defines them.

    Centres of patches are from -1 to 1 in both axes. A quarter of the channels is for rows, the next for columns, and
    the other half repeats the same angles.

    Args:
        grid: (h, w).
        head_dim: a multiple of 4.
        like: tensor of their dtype and device.
        rescale: all positions are multiplied by one random factor, log-uniform from 1 / rescale to rescale; None: no.
    """
    device = like.device
    rows, columns = (2 * (torch.arange(cells, device=device) + 0.5) / cells - 1 for cells in grid)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (h * w, 2)
    if rescale is not None:
        limit = math.log(rescale)
        # a new factor in each call, so that the head learns grids of other sizes (`pos_embed_rescale` of DINOv3)
        centres = centres * torch.empty(1, device=device).uniform_(-limit, limit).exp()
    # 100^(-4 i / head_dim) for i = 0 .. head_dim / 4 - 1
    frequencies = 1 / _BASE ** torch.arange(0, 1, 4 / head_dim, device=device)  # (head_dim / 4,)
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).tile(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def even_windows(blocks: int) -> list[tuple[float, float]]:
    """Return the (start, end) of each block's annealing as shares of the training, after the published steps."""
    starts = [4 / 15 + 0.4 * number / max(1, blocks - 2) for number in range(blocks - 1)]
    return [(0.0, _FIRST_END), *((start, start + 1 / 6) for start in starts)]


def official_name(name: str) -> str:
    """Return the official code's name for a parameter or buffer of the head."""
    part, *rest = name.split(".")
    return ".".join(["network", _PARTS[part], *(_LAYERS.get(layer, layer) for layer in rest)])


def load_decoder(head: PmtHead, path: str, *, new_class_layer: bool) -> None:
    """Load the weights of a head from a file of the official code; its backbone and annealing state are ignored.

    Args:
        head: its weights are replaced.
        path: PyTorch checkpoint or safetensors file, with or without the official backbone.
        new_class_layer: whether the class layer stays random.

    Raises:
        UserError: the file cannot be read, lacks weights, has others, or their shapes or values do not fit.
    """
    content = read_tensor_file(Path(path).expanduser(), "weights")
    inner = content.get("state_dict")
    named = inner if isinstance(inner, Mapping) else content
    # `torch.compile` puts `_orig_mod` in the names of what it has compiled
    found = {str(name).replace("._orig_mod", ""): value for name, value in named.items() if isinstance(value, Tensor)}
    state = head.state_dict()
    names = {official_name(name): name for name in state}
    loaded = {official: name for official, name in names.items() if not new_class_layer or _CLASS_LAYER not in name}
    missing = [name for name in loaded if name not in found]
    of_decoder = [name for name in found if name.startswith(("network.decoder.", "network.bn."))]
    extra = [name for name in of_decoder if name not in names and not name.endswith("attn_mask_probs")]
    if missing or extra:
        listed = " and ".join(
            f"{count_of(len(keys), 'tensor')} {what} ({keys[0]})"
            for what, keys in (("missing", missing), ("left over", extra))
            if keys
        )
        raise UserError(
            f"weights={path}: {listed}. Give the decoder of PMT (pytorch_model.bin), and set head.blocks and "
            "head.layers as in its config."
        )
    check_weights(found, f"weights={path}", {official: state[name] for official, name in loaded.items()})
    with torch.no_grad():
        for official, name in loaded.items():
            # tensors of a `state_dict` share the memory of the parameters
            state[name].copy_(found[official])
