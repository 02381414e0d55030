"""Conformance of heads that score classes."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.shapes import Prediction, collect_tensors
from dinoseg.models.model import SegmentationModel
from dinoseg.testing.modules import (
    IMAGE_SIZE,
    MODULE_RULES,
    ModuleCase,
    are_close,
    autocast,
    check_class,
    check_unchanged,
    fixed_seed,
    random_images,
    require,
)

SIZES = (IMAGE_SIZE, (64, 96), (95, 64), (1, 1))  # (H, W)


class CheckBackbone(Backbone):
    """Small random backbone with patches of 8 px, 16 wide."""

    dim = 16
    patch_size = 8

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.patches = nn.Conv2d(3, num_layers * self.dim, self.patch_size, self.patch_size)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps, each a linear function of the patches."""
        return list(self.patches(self.pixels(images)).split(self.dim, dim=1))


def check_head(
    make_head: Callable[..., Head[Any]],
    backbone: Backbone | None = None,
    *,
    num_layers: int = 1,
    num_classes: int = 3,
) -> None:
    """Check that a head which scores classes keeps the contract of `dinoseg.core.contracts.Head`.

    Args:
        make_head: the class, or a `functools.partial` of it with small sizes. It is called with `in_dim`, `num_layers`
            and `num_classes`.
        backbone: one that the head can use; None: a random one with patches of 8 px.
        num_layers: number of maps of the random backbone.
        num_classes: K.

    Raises:
        AssertionError: it breaks a rule; the message names the rule, the result and the remedy.

    Examples:
        >>> from functools import partial
        >>> from dinoseg.models.heads.linear import LinearHead
        >>> from dinoseg.testing import check_head
        >>> check_head(partial(LinearHead, dropout=0.1), num_layers=2)
    """
    with fixed_seed():
        used = (CheckBackbone(num_layers) if backbone is None else deepcopy(backbone)).requires_grad_(False).eval()

        def make() -> Head[Any]:
            return make_head(in_dim=used.dim, num_layers=used.num_layers, num_classes=num_classes)

        def predict(head: Any, images: Tensor) -> Prediction:
            return SegmentationModel(used, head).train(head.training)(images)

        def predict_all(head: Any, images: Tensor) -> list[Tensor]:
            prediction = predict(head, images)
            return [prediction.scores(), *collect_tensors(prediction.outputs)]

        head = make().eval()
        check_class(head, Head)
        if type(head).run is Head.run:
            check_unchanged(type(head).__name__, head, used.maps(random_images(1)))
        for size in SIZES:
            check_scores(head, predict(head, random_images(1, size)), num_classes)
        prediction = predict(head, random_images(2))
        check_padding(head, prediction, used.patch_size)
        check_fast_scores(head, prediction)
        check_outputs(head, prediction)
        case = ModuleCase(
            make,
            run=lambda part, images: [predict(part, images).scores()],
            run_training=predict_all,
            batch_size=max(2, head.min_batch_size),
        )
        for rule in MODULE_RULES:
            rule(case)
        with autocast():  # bfloat16 scores would tie neighbouring classes
            check_scores(head, predict(head, random_images(1)), num_classes)


def check_scores(head: Head[Any], prediction: Prediction, num_classes: int) -> None:
    """Check the shape, dtype and values of the class scores, at the size of the image and at another one."""
    for size in (prediction.size, (23, 61)):
        scores = prediction.scores(size)
        require(
            scores.shape == (1, num_classes, *size) and scores.dtype == torch.float32,
            f"{type(head).__name__}: for one image and size={size}, `predict` must return float32 scores of shape "
            f"{(1, num_classes, *size)} in any precision, but it returned {scores.dtype} of {tuple(scores.shape)}; "
            "resize them by dinoseg.core.geometry.upsample(scores, size, valid).",
        )
        require(
            bool(scores.isfinite().all()) and not (prediction.mixture and bool((scores < 0).any())),
            f"{type(head).__name__}: class scores must be finite, and at least 0 with `mixture`, but for size={size} "
            "they are not; check divisions, and set `mixture` only for sums of probabilities.",
        )


def check_padding(head: Head[Any], prediction: Prediction, patch_size: int) -> None:
    """Check that the scores of an image are a crop of those of the padded image."""
    height, width = prediction.size
    padded = (height + -height % patch_size, width + -width % patch_size)
    whole = prediction.to_pixels(prediction.outputs, padded, (1.0, 1.0))
    require(
        are_close([prediction.scores()], [whole[..., :height, :width]]),
        f"{type(head).__name__}: `predict` must crop the padding, which `valid` leaves out, but its scores for "
        f"{prediction.size} are not the top left of those for {padded}; resize by "
        "dinoseg.core.geometry.upsample(scores, size, valid).",
    )


def check_fast_scores(head: Head[Any], prediction: Prediction) -> None:
    """Check that `grid_scores` and `weighted_masks` give the scores of `predict`."""
    _, logits = prediction.class_ids_and_logits((slice(None), slice(None)))
    require(
        are_close([logits], [prediction.logits()]),
        f"{type(head).__name__}: `grid_scores` and `weighted_masks` must give the scores of `predict`, but they give "
        "others; return None where `predict` does more than upsample or mix them.",
    )


def check_outputs(head: Head[Any], prediction: Prediction) -> None:
    """Check that the outputs hold the images along dimension 0: a validation computes the loss of each."""
    require(
        are_close([prediction.of_images(slice(1, 2)).scores()], [prediction.scores()[1:2]]),
        f"{type(head).__name__}: outputs must be tensors (B, ...), alone or in lists, dicts or dataclasses, but their "
        "second image gives other scores than before; put the batch first in every tensor.",
    )
