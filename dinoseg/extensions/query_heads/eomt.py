"""Encoder-only mask transformer (EoMT): queries pass through the last blocks of the backbone itself."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.shapes import MaskOutputs, WeightedMasks
from dinoseg.models.heads.semantic import semantic_map, weighted_masks
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Count, check_annotations

_STRIDE = 4  # target output stride of the masks in pixels
_POWER = 0.9  # exponent of the polynomial annealing
_EVEN = "even"


class EomtHead(Head[MaskOutputs]):
    """Mask classification by queries that join the last blocks of a plain ViT (Kerssies et al., arXiv 2503.19108).

    Queries are prepended to all tokens. In training, masks are also predicted before each of these blocks (deep
    supervision), and queries attend only to the patches inside their current mask. Each such attention mask is
    dropped at random with rising probability, until all are gone. In eval mode no attention mask is used: the
    backbone runs unmodified, with more tokens. A validation before the end of the annealing therefore evaluates a
    model that still depends on its masks.

    Published settings: 100 queries for semantic maps; 3 blocks for ViT-S and B, 4 for L; patches of 16 px and a mask
    stride of 4 px. For other patch sizes, the number of doublings is the one that brings the stride closest to 4 px.

    Args:
        in_dim: width of the backbone.
        num_layers: number of maps of the backbone; the head does not use them.
        num_classes: number of classes K.
        patch_size: side of the backbone's patches in pixels.
        num_queries: masks per image, at least 1.
        blocks: number of blocks that the queries join, counted back from the last tapped one.
        no_object: add a "no object" class to the class logits of the queries.
        anneal: when the attention mask of each of these blocks is removed: a [start, end] per block, first block
            first. Two whole numbers are optimizer steps, as in the configs of tue-mps/eomt; otherwise they are shares
            of the training, from 0.0 to 1.0. `even` for shares that the published steps follow: each lasts a sixth of
            the training; the first starts at one sixth, the last ends at five sixths, the others are spread evenly
            between. Between start and end, a mask is applied with the probability (1 - progress)^0.9
            (training/lightning_module.py there).

    Raises:
        UserError: the widths are those of a pyramid, or an option is out of range.
    """

    provides = frozenset({"masks"})
    mixture = True

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        *,
        patch_size: Count,
        num_queries: Count = 100,
        blocks: Count = 4,
        no_object: bool = True,
        anneal: str | Sequence[Sequence[float]] = _EVEN,
    ) -> None:
        super().__init__()
        if not isinstance(in_dim, int):
            raise _needs_tokens()
        self.joint_blocks = blocks
        self.no_object = no_object
        self.windows = annealing_windows(anneal, blocks)
        self.step, self.steps = 0, 1
        doublings = max(1, round(math.log2(patch_size / _STRIDE)))
        self.queries = nn.Parameter(torch.randn(num_queries, in_dim))
        self.classify = nn.Linear(in_dim, num_classes + no_object)
        self.mask_embed = nn.Sequential(
            nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, in_dim)
        )
        self.upscale = nn.Sequential(*(_Doubling(in_dim) for _ in range(doublings)))

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone whose blocks do not take tokens, or that has too few blocks.

        Raises:
            UserError: the backbone does not fit; the message names ones that do.
        """
        if not backbone.has_tokens:
            raise _needs_tokens()
        count = len(backbone.blocks)
        if self.joint_blocks > count:
            raise UserError(f"blocks={self.joint_blocks}: this backbone reads {count} blocks; give 1 to {count}.")

    def set_progress(self, step: int, steps: int) -> None:
        """Set the 0-based step and the length of the training, which control the annealing."""
        self.step, self.steps = step, steps

    def length_warning(self, steps: int) -> str | None:
        """Return a warning if an attention mask is not removed before the end of the training."""
        last = max(end for _, end in self.windows)
        if not is_in_steps(self.windows[-1]) or last <= steps:
            return None
        return (
            f"The head's anneal removes attention masks until step {last}, but the training has {steps} steps. "
            "Evaluation uses no masks, so scores will be low. Scale anneal to the training, or set it to even."
        )

    def run(self, backbone: Backbone, images: Tensor) -> MaskOutputs:
        """Return masks (B, Q, h * 2^n, w * 2^n) and class logits; in training also those of earlier blocks."""
        size = (images.shape[-2], images.shape[-1])
        block_kwargs: dict[str, Any] = backbone.block_kwargs(size)
        # the earlier blocks see no queries: their tokens are those of the backbone alone
        tokens, _ = backbone.run_blocks(backbone.embed(images), block_kwargs, stop=-self.joint_blocks)
        joint = list(backbone.blocks)[-self.joint_blocks :]
        blocks = [partial(backbone.run_block, block, **block_kwargs) for block in joint]
        return self.join(tokens, blocks, backbone.norm or nn.Identity(), backbone.grid(size))

    def join(
        self, tokens: Tensor, blocks: Sequence[Callable[..., Tensor]], norm: nn.Module, grid: tuple[int, int]
    ) -> MaskOutputs:
        """Return the outputs after `blocks`, which the queries pass together with all other tokens.

        Args:
            tokens: (B, num_prefix + h * w, dim), input of the first of these blocks.
            blocks: one for each window of the annealing, called as `block(tokens, attention_mask=mask)`.
            norm: precedes each prediction.
            grid: (h, w) of the patches.
        """
        queries = self.queries.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([queries, tokens], dim=1)  # (B, N, dim), N = Q + num_prefix + h * w
        earlier = []
        for block, window in zip(blocks, self.windows, strict=True):
            mask = None
            if self.training:
                # a prediction of the queries before each block: it is supervised, and its masks restrict the attention
                # in the block, as in Mask2Former (arXiv 2112.01527)
                earlier.append(self._read(norm(tokens), grid))
                share = masked_share(self.step if is_in_steps(window) else self.step / self.steps, window)
                mask = attention_mask(earlier[-1].mask_logits, grid, tokens.shape[1], share)
            tokens = block(tokens, attention_mask=mask)
        last = self._read(norm(tokens), grid)
        return MaskOutputs(last.class_logits, last.mask_logits, earlier)

    def weighted_masks(self, outputs: MaskOutputs) -> WeightedMasks:
        """Return the masks and class probabilities that `predict` mixes."""
        return weighted_masks(outputs, self.no_object)

    def predict(self, outputs: MaskOutputs, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return class scores (B, K, H, W): the sum over the queries of class times mask probability."""
        return semantic_map(outputs, size, valid, self.no_object)

    def _read(self, tokens: Tensor, grid: tuple[int, int]) -> MaskOutputs:
        tokens = at_least_float32(tokens)  # the backbone may run in half precision
        queries = tokens[:, : len(self.queries)]
        patches = tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)  # (B, dim, h, w)
        # logit of query q at pixel p = <MLP(q), feature(p)>, as in MaskFormer (arXiv 2107.06278)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(queries), self.upscale(patches))
        return MaskOutputs(self.classify(queries), masks)


class _Doubling(nn.Module):
    """Upsampling by 2 at constant width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        # depthwise: a full 3 x 3 convolution of all channels takes `dim` times the products
        self.mix = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        mixed = self.mix(F.gelu(self.grow(features)))  # (B, dim, 2h, 2w)
        return self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@torch.no_grad()
def attention_mask(mask_logits: Tensor, grid: tuple[int, int], num_tokens: int, share: float) -> Tensor | None:
    """Return the attention mask of the queries (B, 1, Q, N), bool, True = attend, or None if nothing is masked.

    Among the last h * w of the N tokens, a query attends to those inside its mask: logit above 0 on the patch
    grid, bilinear. It attends to all earlier tokens. With a probability of 1 - `share` it attends to all tokens.
    """
    if share == 0:
        return None
    inside = F.interpolate(mask_logits, grid, mode="bilinear").flatten(2) > 0  # (B, Q, h * w)
    # one random number per image and query: a mask is dropped as a whole, not cell by cell
    free = torch.rand(inside.shape[:2], device=inside.device) >= share
    others = inside.new_ones(*inside.shape[:2], num_tokens - inside.shape[2])
    return torch.cat([others, inside | free[..., None]], dim=2)[:, None]


def masked_share(progress: float, window: tuple[float, float]) -> float:
    """Return the mask probability: 1 before the window (start, end), then polynomial decay to 0 at its end.

    Progress and window are both steps, or both shares of the training.
    """
    start, end = window
    if progress < start:
        return 1.0
    if progress >= end:
        return 0.0
    return (1 - (progress - start) / (end - start)) ** _POWER


def is_in_steps(window: tuple[float, float]) -> bool:
    """Return whether a window is in optimizer steps, not in shares of the training."""
    return all(isinstance(end, int) for end in window)


def annealing_windows(anneal: str | Sequence[Sequence[float]], blocks: int) -> list[tuple[float, float]]:
    """Return the (start, end) of each block's annealing, as shares of the training or in steps; see `is_in_steps`.

    Raises:
        UserError: unknown word, number of windows unlike the number of blocks, or invalid window.
    """
    if isinstance(anneal, str):
        if anneal != _EVEN:
            raise UserError(f"anneal={anneal}: give {_EVEN}, or a list with a [start, end] for each block.")
        # of 4 blocks 1/6, 2/6, 3/6 and 4/6: the first blocks lose their masks first
        starts = [(1 + 3 * number / max(1, blocks - 1)) / 6 for number in range(blocks)]
        return [(start, start + 1 / 6) for start in starts]
    if len(anneal) != blocks or not all(_is_window(window) for window in anneal):
        raise UserError(
            f"anneal={list(anneal)}: give {_EVEN}, or a [start, end] for each of blocks={blocks} blocks, "
            f"with 0 <= start <= end <= 1 as shares of the training, or start <= end as whole numbers of optimizer "
            f"steps. Write shares of 0 and 1 as 0.0 and 1.0: whole numbers are steps."
        )
    windows = [(start, end) for start, end in anneal]
    if len({is_in_steps(window) for window in windows}) > 1:
        raise UserError(
            f"anneal={list(anneal)} mixes optimizer steps (whole numbers) and shares of the training. Give either "
            "for all blocks, and write shares of 0 and 1 as 0.0 and 1.0."
        )
    return windows


def _is_window(window: Sequence[float]) -> bool:
    if len(window) != 2:
        return False
    start, end = window
    if is_in_steps((start, end)):
        return 0 <= start <= end != 1  # [0, 1] is more likely meant as shares
    return 0 <= start <= end <= 1


def _needs_tokens() -> UserError:
    return UserError(
        "EoMT and PMT need a plain vision transformer, whose blocks take tokens: dino_*, dinov2_*, dinov3_vit*, tiny, "
        "tiny_surgical, or one of timm without rotary positions, such as vit_small_patch16_224. Choose one of these, "
        "or a head that reads maps, such as mask2former or dpt."
    )
