"""Features of a backbone in Python: one basis for many images, their colours, and similarities of patches."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

from dinoseg.extensions.feature_views.basis import HIGHEST, LOWEST, Basis, Moments, Projections, check_components
from dinoseg.extensions.feature_views.drawing import Upsample, enlarge, to_bytes
from dinoseg.extensions.feature_views.patches import Patches, PatchFeatures
from dinoseg.segmenter.inputs import pictures
from dinoseg.segmenter.segmenter import Segmenter
from dinoseg.segmenter.torch_runtime import replicate_in_eval_mode
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import compute_dtype
from dinoseg.utils.ranges import Count, check_annotations


class FeatureView:
    """View of the features of a model's backbone, after its adapter, in one basis for any number of images.

    Args:
        model: of `dinoseg.load` or `dinoseg.create_model`.
        layer: block whose output is shown; negative: counted from the last.
        normalise: divide the features of each patch by their L2 norm.
        position: keep | remove: whether the subspace of a constant image is projected out.
        rank: of that subspace; None: min(500, C // 2, N // 2) for C channels and N patches.
        basis: file of a basis that was fitted before; None: `fit` makes one.
        precision: auto, bf16, fp16 or fp32.

    Attributes:
        basis: the basis; None before `fit`.

    Raises:
        UserError: the backbone has no such layer, or the file holds no basis of such features.

    Examples:
        >>> import dinoseg, numpy as np
        >>> view = dinoseg.FeatureView(dinoseg.create_model("rgb", classes=["ground", "leaf"]))
        >>> images = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3)).astype(np.uint8)
        >>> view.fit(images).shares.round(1).tolist()
        [0.6, 0.4, 0.1]
        >>> view.colours(images[0]).shape
        (32, 48, 3)
    """

    @check_annotations
    def __init__(
        self,
        model: Segmenter,
        *,
        layer: int = -1,
        normalise: bool = True,
        position: str = "keep",
        rank: Count | None = None,
        basis: str | PathLike[str] | None = None,
        precision: str = "auto",
    ) -> None:
        self._pixels = model.facts.format
        dtype = compute_dtype(precision, model.device)
        context = nullcontext if dtype == torch.float32 else partial(torch.autocast, model.device.type, dtype)
        self._features = PatchFeatures(
            replicate_in_eval_mode(model.model),
            model.device,
            context,
            layer=layer,
            normalise=normalise,
            removes_position=removes_position(position),
            rank=rank,
        )
        self._info = describe(self._features, model.facts.choices.get("backbone"))
        self.basis = None if basis is None else Basis.load(basis, self._info)

    def fit(self, images: Any, components: Sequence[int] = (1, 2, 3)) -> Basis:
        """Fit the basis to all patches of all images, and return it; each image is read twice, one at a time.

        Args:
            images: as `model.predict` takes them: paths, arrays, a folder, a pattern, or a list of them.
            components: that are drawn as red, green and blue, from 1.

        Raises:
            UserError: an image cannot be read, or there are fewer components.
        """
        images = images if isinstance(images, Sequence | np.ndarray | str | PathLike) else list(images)

        def read() -> Iterable[Patches]:
            return (self._features(image) for _, image in pictures(images, pixels=self._pixels))

        self.basis = fit_basis(read, check_components(components), self._info)
        return self.basis

    def features(self, image: Any) -> np.ndarray:
        """Return the features of the patches of an image, (h, w, C) float32."""
        return self._features(self._read(image)).values

    @check_annotations
    def colours(self, image: Any, upsample: Upsample = "nearest") -> np.ndarray:
        """Return the colours of an image in the basis, (H, W, 3) uint8 at the size of the image.

        Raises:
            UserError: there is no basis yet.
        """
        if self.basis is None:
            raise UserError("There is no basis yet. Call fit(images) first, or give basis=FILE.")
        pixels = self._read(image)
        patches = self._features(pixels)
        self.basis.check(patches.values)
        colours = self.basis.colours(self.basis.project(patches.values))
        size = (pixels.shape[0], pixels.shape[1])
        return to_bytes(enlarge(colours, size, patches.size, self._features.backbone.patch_size, upsample))

    def _read(self, image: Any) -> np.ndarray:
        (_, pixels), *more = pictures(image, pixels=self._pixels)
        if more:
            raise UserError(f"{len(more) + 1} images were given where one is expected. Call this for each of them.")
        return pixels


def fit_basis(
    read: Callable[[], Iterable[Patches]],
    components: Sequence[int],
    info: dict[str, Any],
    folder: Path | None = None,
) -> Basis:
    """Return the basis of all patches that `read` yields, which is called twice.

    Args:
        read: returns the features of all images, in the same order.
        components: that are drawn, from 1.
        info: what the features are.
        folder: of the temporary file of projections; None: the system's.
    """
    moments = Moments()
    for patches in read():
        moments += Moments.of(patches.values)
    if not moments.count:
        raise UserError("There is no image to fit a basis to. Give at least one.")
    basis = Basis.fit(moments, components, info)
    with Projections(Path(gettempdir()) if folder is None else folder, len(basis.directions)) as projections:
        for patches in read():
            projections.add(basis.project(patches.values))
        basis.low, basis.high = projections.quantiles(LOWEST, HIGHEST)
    return basis


def describe(features: PatchFeatures, backbone: str | None) -> dict[str, Any]:
    """Return what a basis of features depends on, besides weights and images."""
    position = "remove" if features.removes_position else "keep"
    known = {"backbone": backbone, "layer": features.layer, "normalise": features.normalise, "position": position}
    return known | ({"rank": features.rank} if features.removes_position else {})


def removes_position(position: str) -> bool:
    """Return whether `position` is remove.

    Raises:
        UserError: it is neither of the two.
    """
    if position not in ("keep", "remove"):
        raise UserError(f"position={position}: give keep or remove.")
    return position == "remove"
