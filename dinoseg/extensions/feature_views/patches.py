"""Features of the patches of an image: one layer of a backbone, normalised, with or without positions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.core.sizes import Size
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

MAX_RANK = 500  # of the position subspace, as in INSID3
OUTLIER = 3.0  # patches whose norm exceeds this multiple of the image's median are outliers
_TINY = float(np.finfo(np.float32).tiny)
_SIZES = 4  # grids whose position subspace is kept


class Patches(NamedTuple):
    """Features of an image.

    Attributes:
        values: (h, w, C) float32.
        size: (H, W) at which the backbone saw the image; the last patches of a row or column may exceed it.
        outliers: number of patches whose norm, before normalisation, exceeds 3 times the image's median.
        position_energy: sum over patches of the share of their squared norm that lies in the position subspace; 0 if it
            was not asked for.
    """

    values: np.ndarray
    size: Size
    outliers: int
    position_energy: float


class PatchFeatures:
    """Feature extractor: an image in, the features of its patches out, one image per forward pass.

    Args:
        model: in eval mode; its head is not used.
        device: of the model.
        autocast: context manager factory of the precision.
        layer: block whose output is read, 0-based, negative: counted from the last; after the backbone's final norm.
        normalise: divide the features of each patch by their L2 norm.
        removes_position: project out the subspace of a constant image, as in INSID3 (arXiv 2603.28480), step 3.
        rank: of that subspace; None: min(500, C // 2, N // 2) for N patches.

    Raises:
        UserError: the backbone has no such layer, or `rank` leaves nothing.
    """

    def __init__(
        self,
        model: SegmentationModel,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        *,
        layer: int = -1,
        normalise: bool = True,
        removes_position: bool = False,
        rank: int | None = None,
    ) -> None:
        self.model, self.device, self.autocast = model, device, autocast
        self.backbone = model.backbone
        self.layer = self._find_layer(layer)
        self.normalise, self.removes_position, self.rank = normalise, removes_position, rank
        self.position_basis = lru_cache(_SIZES)(self._position_basis)

    def __call__(self, image: np.ndarray, *, with_energy: bool = False) -> Patches:
        """Return the features of an image (H, W, C), uint8 or uint16.

        `with_energy` computes the position subspace of the image's size, which else only its removal needs.
        """
        stack = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2)  # (1, C, H, W)
        pixels = self.model.pixels(to_device(stack, self.device))
        size = (pixels.shape[-2], pixels.shape[-1])
        values, norms = self.extract_patches(pixels)
        rest = self.without_position(values, size) if with_energy or self.removes_position else values
        energy = 1 - (rest**2).sum(2) / np.maximum((values**2).sum(2), _TINY) if with_energy else np.zeros(1)
        if self.removes_position:
            values = self._divide(rest)[0]
        outliers = int((norms > OUTLIER * np.median(norms)).sum())
        return Patches(values.astype(np.float32), size, outliers, float(energy.sum()))

    def extract_patches(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the features (h, w, C) float64 of images (1, C, H, W) as floats, and their norms before division."""
        with torch.inference_mode(), self.autocast():
            values = self._map(pixels)[0].permute(1, 2, 0).double().cpu().numpy()  # (h, w, C)
        return self._divide(values)

    def without_position(self, values: np.ndarray, size: Size) -> np.ndarray:
        """Return features (h, w, C) float64 minus their part in the position subspace of images of `size` (H, W)."""
        basis = self.position_basis(size)
        return values - (values @ basis) @ basis.T

    def _divide(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features (h, w, C), divided by their norms if they are normalised, and these norms (h, w, 1)."""
        norms = np.linalg.norm(values, axis=2, keepdims=True)
        return values / np.maximum(norms, _TINY) if self.normalise else values, norms

    def _map(self, pixels: Tensor) -> Tensor:
        """Return the map (1, C, h, w) of the layer."""
        backbone = self.backbone
        if not backbone.has_tokens:
            return backbone(pixels)[[*list_layers(backbone)].index(self.layer)]
        size = (pixels.shape[-2], pixels.shape[-1])
        kwargs = backbone.block_kwargs(size)
        tokens, _ = backbone.run_blocks(backbone.embed(pixels), kwargs, stop=self.layer + 1)
        if backbone.norm is not None:
            tokens = backbone.norm(tokens)
        return tokens[:, backbone.num_prefix :].mT.unflatten(2, backbone.grid(size))

    def _find_layer(self, layer: int) -> int:
        """Return the 0-based number of the block."""
        backbone = self.backbone
        found = resolve_layers([layer], backbone.depth)[0]
        known = list_layers(backbone)
        if found not in known:
            raise UserError(
                f"layer={layer}: of the blocks 0 to {backbone.depth - 1} of its backbone, this model has "
                f"{join_names([str(number) for number in known])}. Give one of them, or leave resume out."
            )
        return found

    def _position_basis(self, size: Size) -> np.ndarray:
        """Return an orthonormal basis (C, rank) float64 of the features of a black image of `size` (H, W).

        These are the first left singular vectors of its features, normalised as others are, minus their mean over
        positions. Float64, since most singular values lie near the rounding of float32.
        """
        black = torch.zeros(1, self.backbone.channels, *size, device=self.device)
        values, _ = self.extract_patches(black)
        flat = values.reshape(-1, values.shape[-1])
        centred = flat - flat.mean(0)
        count, width = centred.shape
        rank = min(MAX_RANK, width // 2, count // 2) if self.rank is None else self.rank
        if rank >= width:
            raise UserError(
                f"rank={rank}: these features have {width} channels, so nothing is left. Give a lower rank."
            )
        return np.linalg.svd(centred, full_matrices=False)[2][:rank].T


def list_layers(backbone: Backbone) -> Sequence[int]:
    """Return the blocks whose features a model has: all that it holds, or without tokens those of its maps."""
    if backbone.has_tokens:
        return range(len(backbone.blocks))
    return backbone.layers or range(backbone.num_layers)
