"""Predictors that initialise the slots of a frame from those of the previous one."""

from typing import Literal

from torch import Tensor, nn

from dinoseg.extensions.slots.head.transformer import NUM_HEADS, SlotBlock
from dinoseg.utils.errors import UserError

PredictorKind = Literal["savi", "transformer", "carry", "none"]


class SaviPredictor(nn.Module):
    """Self-attention between slots, then a feed-forward layer, both post-norm (Kipf et al., arXiv 2111.12594).

    The feed-forward part is a single layer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, NUM_HEADS, batch_first=True)
        self.norm_attention = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.norm_mlp = nn.LayerNorm(dim)

    def forward(self, slots: Tensor) -> Tensor:
        """Return the predicted slots (B, S, D)."""
        # post-norm, LN(x + f(x)) twice, as in SAVi; the MLP of one layer is DINOSAVi's
        attended, _ = self.attention(slots, slots, slots, need_weights=False)
        slots = self.norm_attention(slots + attended)
        return self.norm_mlp(slots + self.mlp(slots))


def make_predictor(kind: PredictorKind, dim: int) -> nn.Module | None:
    """Return the predictor of slots in the next frame, or None to initialise slots again in every frame.

    `transformer` is the block of VideoSAUR and SlotContrast.

    Raises:
        UserError: a width not divisible by the attention heads.
    """
    if kind in ("savi", "transformer"):
        check_heads(dim, f"predictor={kind}")
        return SaviPredictor(dim) if kind == "savi" else SlotBlock(dim)
    # DINOSAVi's baselines: slots pass unchanged, or are sampled anew in each frame, as by DINOSAUR
    return nn.Identity() if kind == "carry" else None


def check_heads(dim: int, user: str) -> None:
    """Refuse a slot width that is not divisible by the number of attention heads."""
    if dim % NUM_HEADS:
        raise UserError(
            f"slot_dim={dim} is not a multiple of {NUM_HEADS}, the heads of {user}. Choose "
            f"slot_dim={dim // NUM_HEADS * NUM_HEADS or NUM_HEADS} or {(dim // NUM_HEADS + 1) * NUM_HEADS}."
        )
