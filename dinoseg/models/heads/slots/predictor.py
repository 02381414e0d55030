"""From the slots of one frame to a first guess of those of the next."""

from torch import Tensor, nn

from dinoseg.models.heads.options import check_choice
from dinoseg.utils.errors import UserError

HEADS = 4  # of every attention between slots
PREDICTORS = ("savi", "carry", "none")


class SaviPredictor(nn.Module):
    """Slots look at one another, then each at itself; normalised after each residual (Kipf et al., arXiv 2111.12594).

    Its feed-forward part is a single layer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.norm_attention = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.norm_mlp = nn.LayerNorm(dim)

    def forward(self, slots: Tensor) -> Tensor:
        """Return slots (B, S, D)."""
        seen, _ = self.attention(slots, slots, slots, need_weights=False)
        slots = self.norm_attention(slots + seen)
        return self.norm_mlp(slots + self.mlp(slots))


def make_predictor(kind: str, dim: int) -> nn.Module | None:
    """Return what takes slots to the next frame; None draws them anew in every frame.

    Raises:
        UserError: an unknown kind, or a width that the attention cannot split.
    """
    check_choice("predictor", kind, PREDICTORS)
    if kind == "savi":
        check_heads(dim, f"head.predictor={kind}")
        return SaviPredictor(dim)
    return nn.Identity() if kind == "carry" else None


def check_heads(dim: int, user: str) -> None:
    """Refuse a slot width that attention heads cannot share evenly."""
    if dim % HEADS:
        raise UserError(
            f"head.slot_dim={dim} is no multiple of {HEADS}, the heads of {user}. "
            f"Choose head.slot_dim={dim // HEADS * HEADS or HEADS} or {(dim // HEADS + 1) * HEADS}."
        )
