"""Segmentation by example in Python."""

from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.channels import PixelFormat
from dinoseg.extensions.example.matcher import ExampleMatcher, ReferenceImage, Rule
from dinoseg.extensions.example.references import ONE_CONCEPT, check_pairs, make_reference, object_reader
from dinoseg.extensions.feature_views.patches import PatchFeatures
from dinoseg.segmenter.inputs import pictures
from dinoseg.segmenter.segmenter import Segmenter
from dinoseg.segmenter.torch_runtime import replicate_in_eval_mode
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, check_annotations


@check_annotations
def segment_by_example(
    references: Sequence[Any],
    targets: Any,
    *,
    backbone: Segmenter,
    rule: Rule = "discriminant",
    rank: Natural | None = 0,
    size: Sequence[Count] | None = None,
) -> list[np.ndarray]:
    """Return masks of a concept in images from one or a few images with masks, without training.

    The features are computed in float32.

    Args:
        references: pairs (image, mask). A mask is a file or an array (H, W); any value above 0 is the concept.
        targets: images as `model.predict` takes them: paths, arrays, a folder, a pattern, or a list of them.
        backbone: model of `dinoseg.create_model` or `dinoseg.load`, whose head is not used.
        rule: `discriminant`, linear discriminant analysis of the concept's patches against all others; or `insid3`,
            which uses the background less (arXiv 2603.28480).
        rank: dimensions of the subspace of positions; None: min(500, C // 2, N // 2) for C channels and N patches; 0:
            positions stay.
        size: (H, W) to which all images are resized; None: their own, in whole patches, at most 4,096.

    Returns:
        A mask (H, W) uint8 for each target, 1 where it shows the concept.

    Raises:
        UserError: an image cannot be read, a mask has another size than its image or shows nothing, or an option does
            not fit the model.

    Examples:
        >>> import dinoseg, numpy as np
        >>> image = np.zeros((64, 64, 3), np.uint8)
        >>> image[16:48, 16:48] = 200, 60, 0
        >>> mask = image[..., 0] > 0
        >>> model = dinoseg.create_model("rgb", classes=["background", "object"])
        >>> (found,) = dinoseg.segment_by_example([(image, mask)], [image[:, ::-1]], backbone=model)
        >>> round(float((found == mask[:, ::-1]).mean()), 2)
        0.99
    """
    pixels = backbone.facts.format
    read = [_read_reference(image, mask, pixels) for image, mask in check_pairs(references)]
    features = PatchFeatures(replicate_in_eval_mode(backbone.model), backbone.device, nullcontext, rank=rank)
    matcher = ExampleMatcher(features, read, rule=rule, size=size)
    return [matcher(image).concepts for _, image in pictures(targets, pixels=pixels)]


def _read_reference(image: Any, mask: Any, pixels: PixelFormat) -> ReferenceImage:
    if isinstance(mask, str | PathLike):
        ids = object_reader().read(Path(mask).expanduser())
    else:
        ids = (np.asarray(mask) > 0).astype(np.uint8)
        mask = f"mask of type {type(mask).__name__}"
    (_, shown), *more = pictures(image, pixels=pixels)
    if more:
        raise UserError(f"references: {len(more) + 1} images have one mask. Give a pair for each image.")
    return make_reference(shown, ids, ONE_CONCEPT, 0, [1], mask)
