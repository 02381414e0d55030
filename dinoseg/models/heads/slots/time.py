"""How far ahead slots tell of, and what they become on the way."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinoseg.models.heads.options import check_choice
from dinoseg.models.heads.slots.predictor import HEADS, check_heads
from dinoseg.utils.errors import UserError

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
