"""Background estimation from the attention of the class token."""

from torch import Tensor

from dinoseg.utils.precision import at_least_float32


def background_mask(attention: Tensor) -> Tensor:
    """Return the background (B, h, w), bool, True = background, from the attention of the class token.

    Heads that attend to few cells get a higher weight (after Siméoni et al., FOUND, arXiv 2212.07834). A head attends
    to the cells above the mean over all heads. Its weight is the logarithm of the number of such cells of all heads
    divided by its own. Background is where the weighted mean over the heads lies below its mean over the grid.

    Args:
        attention: (B, heads, h, w), at least 0.
    """
    attention = at_least_float32(attention)
    num_attended = (attention > attention.mean(dim=(1, 2, 3), keepdim=True)).sum(dim=(2, 3)).clamp(min=1)  # (B, heads)
    num_attended = num_attended.to(attention.dtype)
    # DINOSAVi's weights: log(cells of all heads / own cells), so a head that attends everywhere counts little
    weights = (num_attended.sum(dim=1, keepdim=True) / num_attended).log()
    if attention.shape[1] == 1:
        weights = weights + 1  # with a single head the weight would be log(1) = 0
    mean_attention = (attention * weights[:, :, None, None]).mean(dim=1)  # (B, h, w)
    return mean_attention < mean_attention.mean(dim=(1, 2), keepdim=True)
