"""What the class token does not look at is background."""

from torch import Tensor

from dinoseg.utils.precision import at_least_float32


def background_mask(attention: Tensor) -> Tensor:
    """Return where the background is (B, h, w), bool, True = background, from attention of the class token.

    Heads that look at few places count more (after Siméoni et al., FOUND, arXiv 2212.07834). A head looks at the cells
    above the mean of all heads; its weight is the logarithm of all heads' number of such cells over its own. Background
    is where the weighted mean of the heads lies below its mean over the grid.

    Args:
        attention: (B, heads, h, w), at least 0.
    """
    attention = at_least_float32(attention)
    looked_at = (attention > attention.mean(dim=(1, 2, 3), keepdim=True)).sum(dim=(2, 3)).clamp(min=1)  # (B, heads)
    looked_at = looked_at.to(attention.dtype)
    weights = (looked_at.sum(dim=1, keepdim=True) / looked_at).log()
    if attention.shape[1] == 1:
        weights = weights + 1  # a head alone has no other to be weighed against: log(1) would leave nothing of it
    seen = (attention * weights[:, :, None, None]).mean(dim=1)  # (B, h, w)
    return seen < seen.mean(dim=(1, 2), keepdim=True)
