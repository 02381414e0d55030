"""Matcher of images with references: concepts of pixels and scores of patches from features of a backbone."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import resize, to_unit_range
from dinoseg.core.sizes import Size
from dinoseg.extensions.example.discriminant import Discriminant, share_likelihoods
from dinoseg.extensions.example.insid3 import (
    ReferencePatches,
    TargetPatches,
    choose_concepts,
    enlarge_ids,
    find_largest,
    match,
    normalise,
    reduce_mask,
)
from dinoseg.extensions.feature_views.patches import PatchFeatures
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError

MAX_PATCHES = 4096  # of an image of free size: the linkage holds the distance of each pair, 134 MB
Rule = Literal["discriminant", "insid3"]


class ReferenceImage(NamedTuple):
    """Image with masks of the background and K concepts.

    Attributes:
        image: (H, W, C), uint8 or uint16.
        masks: (K + 1, H, W) bool, the background first.
    """

    image: np.ndarray
    masks: np.ndarray


class ConceptMap(NamedTuple):
    """Concepts found in an image.

    Attributes:
        concepts: (H, W) uint8, the number of the concept, from 1; 0: none.
        scores: (K, h, w), of each patch: its probabilities, or the scores of its cluster.
    """

    concepts: np.ndarray
    scores: np.ndarray


class ExampleMatcher:
    """Segmenter of images by the concepts of a few references, whose features are computed once.

    Args:
        features: extractor of normalised features.
        references: at least one, of which one shows a concept.
        rule: see `segment_by_example`.
        size: (H, W) to which all images are resized; None: their own, in whole patches, at most 4,096.

    Raises:
        UserError: `size` holds no multiples of the patch size, or the rank of the features is too high.
    """

    def __init__(
        self,
        features: PatchFeatures,
        references: Sequence[ReferenceImage],
        *,
        rule: Rule,
        size: Sequence[int] | None = None,
    ) -> None:
        self._features = features
        self._size = None if size is None else _check_size(size, features.backbone.patch_size)
        self._shots = [self._shot(reference) for reference in references]
        self._discriminant = Discriminant(self._shots) if rule == "discriminant" else None

    def __call__(self, image: np.ndarray) -> ConceptMap:
        """Return the concepts in an image (H, W, C), uint8 or uint16."""
        raw, free, grid, seen = self._patches(image)
        size = (image.shape[0], image.shape[1])
        if self._discriminant is not None:
            values, classes = self._discriminant(free), self._discriminant.classes
            probabilities = np.zeros((len(self._shots[0].masks), len(free)))
            probabilities[classes] = share_likelihoods(values)
            concepts = classes[find_largest(values.reshape(-1, *grid), size)]
            return ConceptMap(concepts, probabilities[1:].reshape(-1, *grid))
        shots = [ReferencePatches(shot.features, shot.masks[1:]) for shot in self._shots]
        scores = match(shots, TargetPatches.of(raw, free))
        concepts = choose_concepts(scores).astype(np.uint8).reshape(grid)
        return ConceptMap(enlarge_ids(enlarge_ids(concepts, seen), size), scores.reshape(-1, *grid))

    def _shot(self, reference: ReferenceImage) -> ReferencePatches:
        _, free, grid, seen = self._patches(reference.image)
        return ReferencePatches(free, np.stack([reduce_mask(mask, seen, grid).ravel() for mask in reference.masks]))

    def _patches(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, Size, Size]:
        """Return raw and de-biased features (N, C) of an image, their grid (h, w), and the size (H, W) seen."""
        seen = self._size or self._whole_patches((image.shape[0], image.shape[1]))
        stack = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2)  # (1, C, H, W)
        raw, _ = self._features.extract_patches(to_device(_resize(stack, seen), self._features.device))
        # without a subspace, its image and SVD would be in vain
        free = normalise(self._features.without_position(raw, seen)) if self._features.rank != 0 else raw
        grid = (raw.shape[0], raw.shape[1])
        return raw.reshape(-1, raw.shape[2]), free.reshape(-1, raw.shape[2]), grid, seen

    def _whole_patches(self, size: Size) -> Size:
        """Return the size (H, W) in whole patches, at most `MAX_PATCHES`, at which an image of `size` is seen."""
        patch = self._features.backbone.patch_size
        height, width = self._features.model.input_size(size)
        factor = min(1.0, math.sqrt(MAX_PATCHES * patch**2 / (height * width)))
        rows, columns = (max(1, round(side * factor / patch)) for side in (height, width))
        if rows * columns > MAX_PATCHES:  # of long images, or after rounding up
            rows, columns = min(rows, MAX_PATCHES), max(1, MAX_PATCHES // rows)
        return rows * patch, columns * patch


def _check_size(size: Sequence[int], patch: int) -> Size:
    if len(size) != 2 or any(side % patch for side in size):
        raise UserError(
            f"size={list(size)}: give height and width in multiples of the patch size {patch}, such as "
            f"{[64 * patch, 64 * patch]}."
        )
    return size[0], size[1]


def _resize(images: Tensor, size: Size) -> Tensor:
    """Return images (1, C, H, W) as floats in 0..1 at `size`, bilinear, antialiased; 8 bits are rounded to 8 bits."""
    if images.dtype != torch.uint8:
        return resize(to_unit_range(images), size)
    return to_unit_range(resize(images, size))
