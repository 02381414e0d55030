"""Building blocks of the slot head: feature standardisation, slot groups, step offsets and time decoders."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.models.heads.options import check_choice
from dinoseg.models.heads.slots.predictor import HEADS, check_heads
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32


class Standard(nn.BatchNorm2d):
    """Standardise channels of features (B, C, h, w): by the batch in training, by running statistics in eval mode.

    The running statistics are the mean over all training batches with equal weight, since frozen features do not
    change during training. `momentum=None` of BatchNorm gives the same, but reads its batch counter in each step and
    so synchronises with the device; this class does not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False, momentum=None)

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardised features.

        Raises:
            UserError: a training batch has a single cell.
        """
        if not self.training:
            return super().forward(features)
        if features.numel() == self.num_features:
            raise UserError(
                "head.standardise=true computes mean and variance over the cells of a batch, but this batch has a "
                "single cell. Enlarge data.batch_size or resolution.crop, or set head.standardise=false."
            )
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and variance is not None and count is not None  # running stats are enabled
        with torch.no_grad():
            of_batch = torch.var_mean(at_least_float32(features), (0, 2, 3))
            count += 1
            for running, now in zip((variance, mean), of_batch, strict=True):
                running.lerp_(now.to(running.dtype), count.to(running.dtype).reciprocal())
        return F.batch_norm(features, None, None, training=True, eps=self.eps)


GROUPS = ("off", "initial", "always")


def slot_sizes(num_slots: int | Sequence[int], groups: str) -> list[int]:
    """Return the number of slots in each group; a single group if groups are off."""
    sizes = [num_slots] if isinstance(num_slots, int) else list(num_slots)
    shown = str(sizes).replace(" ", "") if not isinstance(num_slots, int) else num_slots
    if min(sizes, default=0) < 1:
        raise UserError(f"head.num_slots={shown}: give at least 1 slot; with head.groups, two such numbers.")
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
    """Return which cells each slot may attend to (B, S, h, w), bool, True = may.

    Args:
        background: background mask (B, h, w), bool.
        sizes: number of background and of foreground slots, in the order of the output.
    """
    cells = background[:, None]
    num_background, num_foreground = sizes
    return torch.cat([cells.expand(-1, num_background, -1, -1), ~cells.expand(-1, num_foreground, -1, -1)], dim=1)


TIME_DECODERS = ("none", "linear", "attention")


def resolve_steps(steps: int | Sequence[int]) -> list[int]:
    """Return the offsets in frames: 0 to n for a number n, a list unchanged.

    Raises:
        UserError: no offset, a negative one, or a duplicate.
    """
    offsets = list(range(steps + 1)) if isinstance(steps, int) else list(steps)
    if not offsets or min(offsets) < 0 or len(set(offsets)) < len(offsets):
        raise UserError(
            f"head.steps={steps}: give the last frame to reconstruct, counted from the input frame (0 = only that "
            "frame), or a list of such numbers, 0 or more, each once."
        )
    return offsets


class SlotsToSlots(nn.Module):
    """Self-attention of slots, without residual or norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)

    def forward(self, slots: Tensor) -> Tensor:
        """Return updated slots (B, S, D)."""
        return self.attention(slots, slots, slots, need_weights=False)[0]


def make_time_decoders(kind: str, dim: int, count: int) -> nn.ModuleList:
    """Return a module from slots (B, S, D) to slots for each of `count` steps.

    Raises:
        UserError: unknown kind, or a width not divisible by the attention heads.
    """
    check_choice("time_decoder", kind, TIME_DECODERS)
    if kind == "attention":
        check_heads(dim, f"head.time_decoder={kind}")
        return nn.ModuleList(SlotsToSlots(dim) for _ in range(count))
    return nn.ModuleList(nn.Linear(dim, dim) if kind == "linear" else nn.Identity() for _ in range(count))
