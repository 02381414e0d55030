"""Channels of mean 0 and variance 1, over all that training has seen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
