"""Linear head, as in the linear probe of DINOv2."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import concatenate, widths
from dinoseg.utils.ranges import Count, LowShare, check_annotations

_STD = 0.01  # of the weights of init=normal


class LinearHead(Head[Tensor]):
    """Dropout, BatchNorm and one 1x1 convolution over the concatenated feature maps (Oquab et al., arXiv 2304.07193).

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: number of maps, concatenated.
        num_classes: number of classes K.
        dropout: probability of dropping a whole channel, before BatchNorm and in training only, as in DINOv3
            (facebookresearch/dinov3, dinov3/eval/segmentation/models/heads/linear_head.py).
        init: initialisation of a new training: `probe`, from the closed-form linear probe (`dinoseg.extensions.probe`);
            `normal`, weights from N(0, 0.01^2) and biases of 0, as in DINOv2 and DINOv3; or None, PyTorch's default.

    Raises:
        UserError: unknown `init`, or a `dropout` that is no probability below 1.
    """

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        dropout: LowShare = 0.0,
        init: Literal["probe", "normal"] | None = None,
    ) -> None:
        super().__init__()
        width = sum(widths(in_dim, num_layers))
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)
        self.init = init if init == "probe" else None
        if init == "normal":
            nn.init.normal_(self.classify.weight, std=_STD)
            nn.init.zeros_(self.classify.get_parameter("bias"))

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
        return self.classify(self.norm(self.dropout(concatenate(features))))

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs
