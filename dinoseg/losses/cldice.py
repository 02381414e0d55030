"""Soft clDice: overlap of soft skeletons, for thin structures such as threads, needles and poles."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torch.utils.checkpoint import checkpoint

from dinoseg.core.contracts import safe_divide
from dinoseg.core.geometry import upsample_at
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.labelled import ImageLoss, check_classes, labelled_images
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural, Range, check_annotations

# memory grows by the square of the number
Erosions = Annotated[int, Range("a whole number from 1 to 64", 1, 64)]
BAND = 2**20  # values of a band of rows: about 150 MiB with what the backward pass of 3 iterations keeps


def soft_skeleton(shares: Tensor, iterations: int) -> Tensor:
    """Return the soft skeleton (B, K, H, W) of soft masks (B, K, H, W) in 0..1 (arXiv 2003.07311, algorithm 1).

    Each iteration erodes the masks by the cross of 3 pixels, and adds what an opening removes. A pixel depends on
    those within `iterations` + 2 rows and columns. Beyond the border, pixels count neither as inside nor as outside.
    """
    skeleton = torch.zeros_like(shares)
    for _ in range(iterations + 1):
        # soft erosion: the minimum over a cross is minus the maximum of the negative. `max_pool2d` pads with -infinity,
        # so pixels beyond the border win nowhere
        eroded = -torch.maximum(max_pool2d(-shares, (3, 1), 1, (1, 0)), max_pool2d(-shares, (1, 3), 1, (0, 1)))
        # what an opening removes is thinner than its structuring element, and so part of the skeleton
        removed = (shares - max_pool2d(eroded, 3, 1, 1)).relu()
        # soft union: 1 - (1 - a)(1 - b)
        skeleton = skeleton + removed - skeleton * removed
        shares = eroded
    return skeleton


class SoftClDice(ImageLoss):
    """Soft clDice loss (Shit et al., CVPR 2021, arXiv 2003.07311), averaged over the classes that occur in the labels.

    It is 1 - 2 T_p T_s / (T_p + T_s) for each class. The topology precision T_p is the share of the predicted soft
    skeleton inside the labels, and the topology sensitivity T_s that of the labels' skeleton inside the prediction.
    Sums are over the batch, with 1 added to numerators and denominators as in the authors' code. Ignored pixels belong
    to no class on either side. A class occurs if its labels have a soft skeleton, which regions wider than the erosions
    reach lack where they fill the image.

    Scores are upsampled in bands of rows, and several bands again in the backward pass. Bands overlap by the reach of
    the skeleton, so that they change no value.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value of unlabelled pixels.
        iterations: erosions of a mask, at least half the width in pixels of the structures; 1 to 64.
        classes: ids of the classes with thin structures; None: all but class 0.

    Raises:
        UserError: `classes` is empty, or holds an id that is no class.
    """

    ids: Tensor

    @check_annotations
    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        iterations: Erosions = 3,
        classes: Sequence[Natural] | None = None,
    ) -> None:
        super().__init__(class_weights, ignore_index)
        check_classes(class_weights)
        ids = sorted({*(range(1, len(class_weights)) if classes is None else classes)})
        if not ids or ids[-1] >= len(class_weights):
            raise UserError(f"classes={ids}: give ids of classes, from 0 to {len(class_weights) - 1}.")
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.iterations = iterations

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of images with a labelled pixel."""
        images, height, width = batch.mask.shape
        grid = prediction.grid
        scores = prediction.logits((height, width)) if grid is None else grid
        valid = None if grid is None else prediction.valid
        reach = self.iterations + 2
        rows = max(4 * reach, BAND // (images * scores.shape[1] * width))
        band_sums: Callable[..., Tensor] = self._band_sums
        if rows < height:
            # a single band is not checkpointed: its backward pass would repeat it at once
            band_sums = partial(checkpoint, self._band_sums, use_reentrant=False, preserve_rng_state=False)
        sums = scores.new_zeros(4, len(self.ids))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            # with the rows that its skeleton depends on, so that bands change no value
            seen = slice(max(start - reach, 0), min(stop + reach, height))
            inner = slice(start - seen.start, stop - seen.start)
            sums = sums + band_sums(scores, batch.mask, valid, seen, inner)
        # 1 is added as in the authors' code: a prediction without skeleton has no sum to divide by
        precision, sensitivity = (sums[:2] + 1) / (sums[2:] + 1)
        weights = torch.where(sums[3] > 0, self.weight[self.ids].to(sums.dtype), 0)
        # one minus clDice, the harmonic mean of both
        losses = 1 - 2 * precision * sensitivity / (precision + sensitivity)
        value = safe_divide((weights * losses).sum(), weights.sum())
        return value, {"weight": labelled_images(batch.mask, self.ignore_index).to(value.dtype)}

    def _band_sums(
        self, scores: Tensor, mask: Tensor, valid: tuple[float, float] | None, seen: slice, inner: slice
    ) -> Tensor:
        """Return the sums (4, k) of a band's inner rows: of skeletons inside the other side, and of skeletons."""
        if valid is None:
            logits = scores[:, :, seen]
        else:
            logits = upsample_at(scores, (mask.shape[-2], mask.shape[-1]), valid, (seen, slice(None)))
        labels = mask[:, None, seen].long()
        known = (labels != self.ignore_index).to(logits.dtype)
        shares = logits.softmax(1)[:, self.ids] * known  # (B, k, rows, W)
        target = (labels == self.ids.view(-1, 1, 1)) * known
        of_shares, of_target = soft_skeleton(shares, self.iterations), soft_skeleton(target, self.iterations)
        parts = torch.stack([of_shares * target, of_target * shares, of_shares, of_target])
        return parts[..., inner, :].sum((1, 3, 4))
