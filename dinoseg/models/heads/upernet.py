"""UPerNet, on transformers' decoder."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.models.heads.pyramid import NUM_LEVELS, Reassemble, refuse_unless_four
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count


class UperNetHead(Head[Tensor]):
    """Pooled context on the coarsest of four maps, and a feature pyramid above it (Xiao et al., arXiv 1807.10221).

    A transformer's maps are first made a pyramid, at 4, 2, 1 and half of the patch grid; those of a pyramid backbone
    are taken as they are. The auxiliary head of the original is left out.

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: maps, four.
        num_classes: classes to score.
        channels: of the decoder.

    Raises:
        UserError: another number of maps than four; in training, batches of one image.
    """

    least_batch = 2  # training images per rank at once: one alone leaves nothing to normalise its pooled average over
    one_size = "the windows of its pooling depend on the size (head=upernet)"

    def __init__(self, in_dim: int | Sequence[int], num_layers: int, num_classes: Count, channels: Count = 512) -> None:
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetHead as Decoder

        super().__init__()
        refuse_unless_four("upernet", num_layers)
        if channels < 1:
            raise UserError(f"head.channels={channels}: give a number of at least 1.")
        config = UperNetConfig(hidden_size=channels)
        config.num_labels = num_classes
        pyramid = None if isinstance(in_dim, int) else list(in_dim)
        self.reassemble = nn.Identity() if pyramid else Reassemble(in_dim, [channels] * NUM_LEVELS)
        self.decoder = Decoder(config, pyramid or [channels] * NUM_LEVELS)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores (B, K, 4h, 4w) of a transformer's maps, or on the finest grid of a pyramid."""
        if self.training and len(features[0]) == 1:
            raise UserError(
                "head=upernet cannot train on batches of one image: it normalises an average over each whole image by "
                "the batch. Set data.batch_size to at least 2 for each device, or choose head=dpt."
            )
        return self.decoder(self.reassemble(features))

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs: `predict` is bilinear between them."""
        return outputs
