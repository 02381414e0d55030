"""Features of a backbone in Python: one basis for many images, their colours, and similarities of patches."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import numpy as np
import torch

from dinoseg.core.sizes import Size
from dinoseg.extensions.feature_views.basis import HIGHEST, LOWEST, Basis, Moments, Projections, check_components
from dinoseg.extensions.feature_views.drawing import Upsample, enlarge, to_bytes
from dinoseg.extensions.feature_views.patches import Patches, PatchFeatures
from dinoseg.models.model import SegmentationModel
from dinoseg.segmenter.inputs import pictures
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.torch_runtime import TorchRuntime
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import compute_dtype
from dinoseg.utils.ranges import Count, check_annotations

_TINY = float(np.finfo(np.float32).tiny)


class ImageFeatures(NamedTuple):
    """Features of an image, which a `FeatureView` takes instead of the image.

    Attributes:
        patches: the features.
        size: (H, W) of the image.
    """

    patches: Patches
    size: Size


class FeatureView:
    """View of the features of a model's backbone, after its adapter, in one basis for any number of images.

    Args:
        model: of `dinoseg.load` or `dinoseg.create_model`.
        layer: block whose output is shown; negative: counted from the last.
        normalise: divide the features of each patch by their L2 norm.
        position: keep | remove: whether the subspace of a constant image is projected out.
        rank: of that subspace; None: min(500, C // 2, N // 2) for C channels and N patches.
        basis: file of a basis that was fitted before; None: `fit` makes one.
        precision: auto, bf16, fp16 or fp32; None: that of the model.

    Attributes:
        basis: the basis; None before `fit`.
        layer: number of the block, from 0.
        patch_size: side of a patch in pixels of the resized image.

    Raises:
        UserError: the model has no such layer or no backbone in torch, or the file holds no basis of such features.

    Examples:
        >>> import dinoseg, numpy as np
        >>> view = dinoseg.FeatureView(dinoseg.create_model("rgb", classes=["ground", "leaf"]))
        >>> images = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3)).astype(np.uint8)
        >>> view.fit(images).shares.round(1).tolist()
        [0.6, 0.4, 0.1]
        >>> view.colours(images[0]).shape
        (32, 48, 3)
        >>> view.similarity(images[0], [(5, 20)], images[1]).shape
        (4, 6)
    """

    @check_annotations
    def __init__(
        self,
        model: Model,
        *,
        layer: int = -1,
        normalise: bool = True,
        position: str = "keep",
        rank: Count | None = None,
        basis: str | PathLike[str] | None = None,
        precision: str | None = None,
    ) -> None:
        runtime = model.runtime
        if not isinstance(runtime, TorchRuntime) or not isinstance(runtime.predictor.model, SegmentationModel):
            raise UserError(
                f"model={model.source}: an exported graph has no features. Load the run or the model.safetensors of it."
            )
        self._pixels = model.facts.format
        predictor = runtime.predictor
        autocast: Any = predictor.autocast
        if precision is not None:
            dtype = compute_dtype(precision, predictor.device)
            autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, predictor.device.type, dtype)
        self._features = PatchFeatures(
            predictor.model,
            predictor.device,
            autocast,
            layer=layer,
            normalise=normalise,
            removes_position=removes_position(position),
            rank=rank,
        )
        self.layer = self._features.layer
        self.patch_size = self._features.backbone.patch_size
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

    def extract(self, image: Any) -> ImageFeatures:
        """Return the features of an image, to compute them once: other methods take them instead of the image."""
        if isinstance(image, ImageFeatures):
            return image
        (_, pixels), *more = pictures(image, pixels=self._pixels)
        if more:
            raise UserError(f"{len(more) + 1} images were given where one is expected. Call this for each of them.")
        return ImageFeatures(self._features(pixels), (pixels.shape[0], pixels.shape[1]))

    def features(self, image: Any) -> np.ndarray:
        """Return the features of the patches of an image, (h, w, C) float32."""
        return self.extract(image).patches.values

    @check_annotations
    def colours(self, image: Any, upsample: Upsample = "nearest") -> np.ndarray:
        """Return the colours of an image in the basis, (H, W, 3) uint8 at the size of the image.

        Raises:
            UserError: there is no basis yet.
        """
        if self.basis is None:
            raise UserError("There is no basis yet. Call fit(images) first, or give basis=FILE.")
        patches, size = self.extract(image)
        self.basis.check(patches.values)
        colours = self.basis.colours(self.basis.project(patches.values))
        return to_bytes(enlarge(colours, size, patches.size, self.patch_size, upsample))

    def similarity(self, image: Any, points: Sequence[Sequence[float]], other: Any = None) -> np.ndarray:
        """Return the cosine similarity of all patches to those at some points, the mean over the points.

        Args:
            image: in which the points are.
            points: (x, y) in pixels of the image, from its upper left corner.
            other: image whose patches are compared; None: `image`.

        Returns:
            (h, w) float32 in -1..1, a value for each patch; 0 where its features are 0.

        Raises:
            UserError: there is no point, or one is outside of the image.
        """
        start = self.extract(image)
        values = start.patches.values if other is None else self.extract(other).patches.values
        rows, columns = self._find_patches(start, points)
        clicked = start.patches.values[rows, columns]
        query = (clicked / _norms(clicked)).mean(0)
        # a map is linear in the unit vector of its point: one product gives the mean of all maps
        return (values @ query / _norms(values)[..., 0]).clip(-1, 1)

    def _find_patches(self, image: ImageFeatures, points: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the rows and columns (2, N) of the patches at points; `enlarge` shows the same ones there."""
        height, width = image.size
        if np.array(points, object).shape[1:] != (2,) or not len(points):
            raise UserError(f"points={points}: give a list of at least one pair (x, y), such as [(40, 25)].")
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(
                    f"points: ({x:g}, {y:g}) is outside of the image. Give x from 0 to {width - 1} and y from 0 to "
                    f"{height - 1}."
                )
        centres = 2 * np.array(points)[:, ::-1].astype(int) + 1  # of pixels (y, x), in half pixels
        return (centres * image.patches.size // (2 * np.array(image.size) * self.patch_size)).T


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


def _norms(values: np.ndarray) -> np.ndarray:
    """Return the norms (..., 1) of features (..., C), at least the smallest normal number."""
    return np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), _TINY)
