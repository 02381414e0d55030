"""ViT-Split head: trained copies of a frozen backbone's last blocks."""

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.core.contracts import Backbone, BlockKwargs, Head
from dinoseg.models.heads.options import check_positive
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Count

_GROUPS = 32  # maximum number of groups in GroupNorm


class SplitHead(Head[Tensor]):
    """Task branch and prior branch on a frozen transformer, fused (ViT-Split: Li et al., arXiv 2506.03433).

    The task branch consists of copies of the last blocks, initialised with their weights. It receives the input
    tokens of the first copied block, including class and register tokens, and ends in the backbone's final norm,
    which stays frozen. The prior branch mixes the tapped frozen maps.

    A further mixture fuses both branches. Two upsampling steps by 2 with GroupNorm lead to a grid four times finer,
    on which the classes are scored. A mixture is a 1x1 and a 3x3 convolution, each followed by a GELU; the published
    code uses a deformable 3x3 convolution.

    Published for DINOv2-S: four evenly spread frozen blocks and copies of the last 3 on ADE20K, the last four and
    copies of 5 on Cityscapes; the copies train with a tenth of the learning rate of the rest.

    Args:
        in_dim: width of the backbone.
        num_layers: number of frozen maps.
        num_classes: number of classes K.
        blocks: number of blocks to copy, counted back from the last tapped one.
        channels: width of both branches' mixture; None: the width of the backbone.
        checkpointing: recompute the copies in the backward pass: less memory, more time.

    Raises:
        UserError: the widths are those of a pyramid, or an option is out of range.
    """

    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        *,
        blocks: Count = 3,
        channels: Count | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(in_dim, int):
            raise _needs_another_backbone()
        width = in_dim if channels is None else channels
        check_positive(blocks=blocks, channels=width)
        self.blocks = blocks
        self.checkpointing = checkpointing
        self.copies = nn.ModuleList()
        self.norm: nn.Module = nn.Identity()
        self.prior = _mixture(in_dim * num_layers, width)
        self.fuse = _mixture(width + in_dim, width)
        self.upscale = nn.Sequential(*_doubling(width), *_doubling(width), nn.BatchNorm2d(width))
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)

    @property
    def trainable_blocks(self) -> Sequence[nn.Module]:
        """The copied blocks, in order."""
        return list(self.copies)

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone whose blocks do not take tokens, that has too few blocks, or that is not fully frozen.

        Raises:
            UserError: the backbone does not fit; the message names ones that do.
        """
        if not backbone.takes_tokens:
            raise _needs_another_backbone()
        if backbone.first_trained is not None:
            raise UserError(
                "head=split trains copies of the last blocks of a frozen backbone, but this adapter changes the "
                "backbone. Choose adapter=frozen, or a head that reads maps, such as head=multiscale or head=dpt."
            )
        count = len(backbone.blocks)
        if self.blocks > count:
            raise UserError(f"head.blocks={self.blocks}: this backbone reads {count} blocks; give 1 to {count}.")

    def copy_from(self, backbone: Backbone) -> None:
        """Copy the last blocks and the final norm as float32; a no-op if the head already has copies.

        Raises:
            UserError: the weights are already quantised.
        """
        if len(self.copies):
            return
        copies = copy.deepcopy(nn.ModuleList(list(backbone.blocks)[-self.blocks :]))
        for name, part in list(copies.named_modules()):
            if isinstance(part, nn.Linear) and type(part.weight) is not nn.Parameter:
                parent, _, child = name.rpartition(".")
                setattr(copies.get_submodule(parent), child, _plain(part))
        for part in copies.modules():
            if getattr(part, "gradient_checkpointing", False):  # else `checkpointing` would recompute twice
                vars(part)["gradient_checkpointing"] = False
        self.copies = copies.float().requires_grad_(True)
        self.norm = copy.deepcopy(backbone.norm or nn.Identity()).float()

    def run(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Return class scores (B, K, 4h, 4w) for images (B, 3, H, W), float RGB in 0..1."""
        return self.forward_trainable(
            backbone, self.forward_frozen(backbone, images), (images.shape[-2], images.shape[-1])
        )

    def forward_frozen(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """Return normed patch tokens (B, h * w, C) of each tapped block, in order, then the input of the copies.

        The latter are tokens (B, N, C), including class and register tokens.
        """
        pixels = backbone.pixels(images)
        rows, columns = _grid(backbone, (pixels.shape[-2], pixels.shape[-1]))
        tokens, block_kwargs = backbone.embed(pixels)
        norm, first = backbone.norm or nn.Identity(), len(backbone.blocks) - self.blocks
        given, entering = [], tokens
        for number, block in enumerate(backbone.blocks):
            if number == first:
                entering = tokens
            tokens = block(tokens, **block_kwargs)
            if number in backbone.layers:
                given.append(norm(tokens[:, -rows * columns :]))
        return [at_least_float32(part) for part in (*given, entering)]

    def forward_trainable(self, backbone: Backbone, frozen: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return class scores (B, K, 4h, 4w) for the output of `forward_frozen` on images of `size` (H, W)."""
        rows, columns = _grid(backbone, size)
        *given, tokens = frozen
        block_kwargs = backbone.block_kwargs((rows * backbone.patch_size, columns * backbone.patch_size))
        for block in self.copies:
            tokens = self._through(block, tokens, block_kwargs)
        by_layer = dict(zip(sorted({*backbone.layers}), given, strict=True))
        patches = [*(by_layer[layer] for layer in backbone.layers), self.norm(tokens[:, -rows * columns :])]
        return self([part.transpose(1, 2).unflatten(2, (rows, columns)) for part in patches])

    def _through(self, block: nn.Module, tokens: Tensor, block_kwargs: BlockKwargs) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(partial(block, **block_kwargs), tokens, use_reentrant=False)
        return block(tokens, **block_kwargs)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores (B, K, 4h, 4w) for L + 1 maps (B, C, h, w): the frozen ones, then the copies' map."""
        *frozen, task = features
        fused = self.fuse(torch.cat([self.prior(torch.cat(frozen, dim=1)), task], dim=1))  # (B, channels, h, w)
        return self.classify(self.upscale(fused))

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs


def _grid(backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch rows and columns of images of `size` (H, W)."""
    return -(-size[0] // backbone.patch_size), -(-size[1] // backbone.patch_size)


def _mixture(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size=1),
        nn.GELU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.GELU(),
    )


def _doubling(channels: int) -> list[nn.Module]:
    groups = math.gcd(_GROUPS, channels)
    return [nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.GroupNorm(groups, channels), nn.GELU()]


def _plain(linear: nn.Linear) -> nn.Linear:
    """Return a plain copy of a layer marked for quantisation: weights are float until moved to the device."""
    whole = linear.weight.data
    if whole.shape != (linear.out_features, linear.in_features) or not whole.is_floating_point():
        raise UserError(
            "head=split copies unquantised weights, but this backbone is already quantised, as with "
            "trainer=multi_head. Choose adapter.bits=null, or train this head separately."
        )
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(whole), linear.bias
    return plain


def _needs_another_backbone() -> UserError:
    return UserError(
        "head=split needs a backbone whose blocks take tokens one after another: dino_*, dinov2_*, dinov3_vit*, tiny, "
        "tiny_surgical, or a plain vision transformer of timm. Choose one of these, or head=multiscale or head=dpt."
    )
