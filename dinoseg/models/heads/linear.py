"""Linear head, as in the linear probe of DINOv2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import concatenate, widths
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count


class LinearHead(Head[Tensor]):
    """BatchNorm and one 1x1 convolution over the concatenated feature maps (Oquab et al., arXiv 2304.07193).

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: number of maps, concatenated.
        num_classes: number of classes K.
        min_maps: minimum number of maps.
        init: initialisation of a new training: `probe`, from the closed-form linear probe (`dinoseg.tasks.probing`),
            or None, at random.

    Raises:
        UserError: fewer maps than `min_maps`, or unknown `init`.
    """

    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        min_maps: Count = 1,
        init: str | None = None,
    ) -> None:
        super().__init__()
        if init not in (None, "probe"):
            raise UserError(f"head.init={init} is unknown. Choose probe, or null for a random initialisation.")
        if num_layers < min_maps:
            raise UserError(
                f"This head reads at least {min_maps} feature maps (head.min_maps), but backbone.layers gives "
                f"{num_layers}. Name more blocks, such as backbone.layers=[-4,-3,-2,-1], or choose a head that takes "
                f"one map: linear, mlp or cnn."
            )
        width = sum(widths(in_dim, num_layers))
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)
        self.init = init

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Initialise the head so that features x score `weight` (K, D) x + `bias` (K,) in eval mode.

        The running statistics of BatchNorm are set to the `mean` and `variance` (D,) of the features.
        """
        self.norm.reset_parameters()
        means, variances = self.norm.get_buffer("running_mean"), self.norm.get_buffer("running_var")
        means.copy_(mean)
        variances.copy_(variance)
        spread = (variances.to(weight) + self.norm.eps).sqrt()
        self.classify.weight.copy_((weight * spread)[..., None, None])
        self.classify.get_parameter("bias").copy_(bias + weight @ means.to(weight))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores on the patch grid (B, K, h, w)."""
        return self.classify(self.norm(concatenate(features)))

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs
