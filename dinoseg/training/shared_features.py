"""Features of a frozen backbone, computed once for all models that share it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.shapes import FrozenFeatures, Prediction
from dinoseg.models.model import Segmenter
from dinoseg.utils.errors import UserError


class SharedFeatures:
    """Features of every block that any of several heads reads, cached for a batch at a time.

    Args:
        model: a segmenter whose backbone reads all of these blocks, in order; its head is not used.
    """

    def __init__(self, model: Segmenter) -> None:
        self.model = model
        self._storages: set[int] = set()  # of the images whose features are cached
        self._held: dict[tuple, tuple[Tensor, FrozenFeatures, list[int]]] = {}

    @contextmanager
    def held(self, *images: Tensor) -> Iterator[None]:
        """Cache the features of these images (B, 3, H, W), or of slices of such a batch, within the block.

        Features of other images are not cached: each head cuts its own windows from an image and uses them once.
        """
        self._storages = {batch.untyped_storage().data_ptr() for batch in images}
        try:
            yield
        finally:
            self._storages = set()
            self._held.clear()

    def of(self, images: Tensor, *, reduce: bool = True) -> FrozenFeatures:
        """Return the features of images (B, 3, H, W), as `Segmenter.frozen` does.

        Raises:
            UserError: a head has modified cached features in place.
        """
        if images.untyped_storage().data_ptr() not in self._storages:
            return self.model.frozen(images, reduce=reduce)
        # the images are stored too, so that their memory is not reused for others
        key = (images.data_ptr(), images.shape, images.stride(), images.dtype, images._version, reduce)
        if key not in self._held:
            features = self.model.frozen(images, reduce=reduce)
            self._held[key] = images, features, _versions(features)
        _, features, versions = self._held[key]
        if _versions(features) != versions:
            raise UserError(
                "A head has changed the features it was given in place, and others of trainer=many_heads are given the "
                "same ones. Let it work on a copy, or train it by itself: head=NAME trainer=supervised."
            )
        return features


class SharingSegmenter(Segmenter):
    """A segmenter that shares its backbone's tensors and features with others.

    Args:
        backbone: the backbone that the head would have alone, with the tensors of the shared one.
        head: a head that splits the model in its own way runs the backbone by itself.
        shared: computes the features.
        scale: see `Segmenter`.
        longest: see `Segmenter`.

    Raises:
        UserError: the shared backbone pads images to other multiples.
    """

    def __init__(
        self, backbone: Backbone, head: Head, shared: SharedFeatures, *, scale: float, longest: int | None
    ) -> None:
        super().__init__(backbone, head, scale=scale, longest=longest)
        whole = shared.model.backbone
        if whole.patch_size != backbone.patch_size:
            raise UserError(
                f"head.layers={list(backbone.layers)}: the coarsest of these maps has a stride of "
                f"{backbone.patch_size} px, and that of all that the heads read together, {list(whole.layers)}, of "
                f"{whole.patch_size}. Let each head read the coarsest stage too, or train them apart, in a sweep."
            )
        self.shared = shared
        self._at = [whole.layers.index(layer) for layer in sorted({*backbone.layers})]
        self._takes_maps = type(head).run is Head.run and type(head).until is Head.until

    def forward(self, images: Tensor | FrozenFeatures, *, reduce: bool = True) -> Prediction:
        """Predict for images of one size, or for their shared features."""
        if not self._takes_maps:
            return super().forward(images, reduce=reduce)
        features = images if isinstance(images, FrozenFeatures) else self.shared.of(images, reduce=reduce)
        return super().forward(replace(features, tensors=[features.tensors[at] for at in self._at]))


def _versions(features: FrozenFeatures) -> list[int]:
    return [tensor._version for tensor in features.tensors]
