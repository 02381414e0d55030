"""Temporal similarity loss: slots predict the cells of the next frame with similar features."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Prediction, StackedSamples
from dinoseg.extensions.slots.losses.feature_reconstruction import ADVICE, slot_outputs
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Positive, Range, check_annotations

Similarity = Annotated[float, Range("a cosine similarity from -1 (no threshold) to below 1", -1, 1, open_at=(1,))]


def similarity_targets(
    current: Tensor, following: Tensor, temperature: float, threshold: float, *, uniform: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the soft assignment of a frame's cells to those of the next frame, and which cells have one.

    Args:
        current: features (B, C, N) of a frame.
        following: features (B, C, M) of the next frame.
        temperature: divisor of the cosine similarities before their softmax.
        threshold: pairs with a lower similarity get no share.
        uniform: give all cells the same share where none is similar enough.

    Returns:
        Shares (B, M, N), which sum to 1 over M, or to 0 where no cell is similar enough; and whether a cell has
        shares (B, N), bool.
    """
    current, following = F.normalize(at_least_float32(current), dim=1), F.normalize(at_least_float32(following), dim=1)
    similarity = following.transpose(1, 2) @ current  # (B, M, N)
    unlike = similarity < threshold
    unmatched = unlike.all(dim=1)  # their softmax would be NaN; NaN features still propagate
    # VideoSAUR's order: cosine, -inf below the threshold, temperature, softmax over the cells of the next frame
    shares = similarity.div_(temperature).masked_fill_(unlike, -math.inf).softmax(dim=1)
    if uniform:
        return shares.masked_fill_(unmatched[:, None], 1 / shares.shape[1]), torch.ones_like(unmatched)
    return shares.masked_fill_(unmatched[:, None], 0), ~unmatched


class TemporalSimilarity(Loss):
    """VideoSAUR's temporal feature similarity loss (Zadaianchuk et al., arXiv 2306.04829).

    Targets are the softmax over the cells of frame t + 1 of the cosine similarities with a cell of frame t. The loss
    is their cross-entropy with the head's `similarity`, averaged over cells, frames and clips. A cell without a
    similar one in the next frame adds 0, or gets a uniform target with `unmatched=uniform`, as in VideoSAUR's code
    (martius-lab/videosaur, videosaur/modules/utils.py).

    Cells are compared by the features that the head receives, or by the keys of the last attention block, as in
    VideoSAUR, with `head.similarity_of=keys`.

    The loss is computed frame by frame at N = h w cells. Each frame of a clip stores one target matrix of N x N
    float32 until the backward pass: 2.5 MB at 28 x 28 cells and 7.5 MB at 37 x 37. The logits themselves and, for
    half-precision logits, a float32 copy come on top.

    Args:
        temperature: divisor of the similarities; the lower, the fewer cells share a target.
        threshold: pairs with a lower similarity get no share, in [-1, 1).
        unmatched: target of a cell without a similar one: `skip` (none) or `uniform`.
    """

    needs = frozenset({"slots", "similarity"})
    advice = ADVICE
    divisor = "clips"  # equal clip lengths: a mean over frames is a mean over clips

    @check_annotations
    def __init__(
        self,
        temperature: Positive = 0.075,
        threshold: Similarity = 0.0,
        unmatched: Literal["skip", "uniform"] = "skip",
    ) -> None:
        super().__init__()
        self.unmatched = unmatched
        self.temperature = temperature
        self.threshold = threshold

    def forward(self, prediction: Prediction, batch: StackedSamples) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of frames with a next one, over all clips.

        Raises:
            UserError: the head has no slots or predicts no similarity, or the clips have a single frame.
        """
        outputs = slot_outputs(prediction)
        if outputs.features.shape[1] < 2:
            raise UserError(
                "The loss compares each frame with the next, but the clips have 1 frame. Give clips of 2 frames or "
                "more; feature_reconstruction takes single frames."
            )
        if outputs.similarity is None:
            raise UserError(
                "The head does not predict the similarity with the next frame, which this loss trains. Give the head "
                "similarity=true."
            )
        # VideoSAUR compares the keys of the last block
        compared = outputs.features if outputs.keys is None else outputs.keys
        features = compared.detach().flatten(3).unbind(1)  # T of (B, C, N)
        logits = outputs.similarity.flatten(3).unbind(1)  # T' of (B, N of the next frame, N)
        pairs = list(zip(logits, features, features[1:], strict=False))  # drops a last frame without a next one
        value = torch.stack([self._frame(*pair) for pair in pairs]).mean()
        return value, {"weight": value.new_full((), len(outputs.features) * len(pairs))}

    def _frame(self, logits: Tensor, current: Tensor, following: Tensor) -> Tensor:
        """Return the mean cross-entropy of one frame's cells.

        Written out, it stores only the targets and the logits for the backward pass, but not the log-softmax.
        """
        shares, has_target = similarity_targets(
            current, following, self.temperature, self.threshold, uniform=self.unmatched == "uniform"
        )
        assert shares.shape == logits.shape
        logits = at_least_float32(logits)
        # -sum_m p_m log softmax(l)_m = logsumexp(l) sum_m p_m - sum_m p_m l_m; p sums to 1, without target to 0
        return (torch.logsumexp(logits, dim=1) * has_target - (shares * logits).sum(dim=1)).mean()
