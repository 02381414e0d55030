"""Channels of mean 0 and variance 1, over all that training has seen."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.models.heads.options import check_choice
from dinoseg.models.heads.slots.predictor import HEADS, check_heads
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32


class Standard(nn.BatchNorm2d):
    """Standardises channels of features (B, C, h, w): in training over the batch, else by the mean over all batches.

    What is frozen gives the same features from first to last, so no batch counts more than another. That is
    `momentum=None` of BatchNorm, which reads its own count, and so waits for the device, in each step; this does not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False, momentum=None)

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardised features.

        Raises:
            UserError: a single cell to train on.
        """
        if not self.training:
            return super().forward(features)
        if features.numel() == self.num_features:
            raise UserError(
                "head.standardise=true takes mean and variance over the cells of a batch, and this one has a single "
                "cell. Enlarge data.batch_size or resolution.crop, or set head.standardise=false."
            )
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and variance is not None and count is not None  # it tracks them
        with torch.no_grad():
            of_batch = torch.var_mean(at_least_float32(features), (0, 2, 3))
            count += 1
            for running, now in zip((variance, mean), of_batch, strict=True):
                running.lerp_(now.to(running.dtype), count.to(running.dtype).reciprocal())
        return F.batch_norm(features, None, None, training=True, eps=self.eps)


GROUPS = ("off", "initial", "always")


def slot_sizes(num_slots: int | Sequence[int], groups: str) -> list[int]:
    """Return the number of slots in each group, all in one without groups."""
    sizes = [num_slots] if isinstance(num_slots, int) else list(num_slots)
    shown = str(sizes).replace(" ", "") if not isinstance(num_slots, int) else num_slots
    if min(sizes, default=0) < 1:
        raise UserError(f"head.num_slots={shown}: give at least 1 slot, with head.groups two such numbers.")
    if groups == "off" and not isinstance(num_slots, int):
        raise UserError(
            f"head.num_slots={shown} with head.groups=off: without groups give one number, such as "
            f"head.num_slots={sum(sizes)}, or set head.groups=initial or always."
        )
    if groups != "off" and len(sizes) != 2:
        raise UserError(
            f"head.num_slots={shown} with head.groups={groups}: give the numbers of background and of foreground "
            f"slots, such as head.num_slots=[5,5]."
        )
    return sizes


def allowed_cells(background: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return which cells each slot may see (B, S, h, w), bool, True = may.

    Args:
        background: where it is (B, h, w), bool.
        sizes: slots of the background and of the foreground, which come in this order.
    """
    cells = background[:, None]
    num_background, num_foreground = sizes
    return torch.cat([cells.expand(-1, num_background, -1, -1), ~cells.expand(-1, num_foreground, -1, -1)], dim=1)


TIME_DECODERS = ("none", "linear", "attention")


def resolve_steps(steps: int | Sequence[int]) -> list[int]:
    """Return the offsets in frames: a number n means 0 to n, a list itself.

    Raises:
        UserError: none, a negative one or one twice.
    """
    offsets = list(range(steps + 1)) if isinstance(steps, int) else list(steps)
    if not offsets or min(offsets) < 0 or len(set(offsets)) < len(offsets):
        raise UserError(
            f"head.steps={steps}: give the last frame to reconstruct, counted from the one that is seen (0 = that one "
            f"alone), or a list of such numbers, 0 or more, each once."
        )
    return offsets


class SlotsToSlots(nn.Module):
    """Attention of slots to one another, and nothing beside it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)

    def forward(self, slots: Tensor) -> Tensor:
        """Return slots (B, S, D)."""
        return self.attention(slots, slots, slots, need_weights=False)[0]


def make_time_decoders(kind: str, dim: int, count: int) -> nn.ModuleList:
    """Return a module for each of `count` steps, slots (B, S, D) to slots.

    Raises:
        UserError: an unknown kind, or a width that the attention cannot split.
    """
    check_choice("time_decoder", kind, TIME_DECODERS)
    if kind == "attention":
        check_heads(dim, f"head.time_decoder={kind}")
        return nn.ModuleList(SlotsToSlots(dim) for _ in range(count))
    return nn.ModuleList(nn.Linear(dim, dim) if kind == "linear" else nn.Identity() for _ in range(count))
