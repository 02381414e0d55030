"""UPerNet head, built on the decoder of Hugging Face transformers."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.models.heads.pyramid import NUM_LEVELS, Reassemble, refuse_unless_four
from dinoseg.utils.ranges import Count, check_annotations


class UperNetHead(Head[Tensor]):
    """Pyramid pooling on the coarsest of four maps, and a feature pyramid above it (Xiao et al., arXiv 1807.10221).

    A transformer's maps are first converted to a pyramid at 4, 2, 1 and half of the patch grid; the maps of a pyramid
    backbone are used unchanged. The auxiliary head of the original is omitted.

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: number of maps, four.
        num_classes: number of classes K.
        channels: width of the decoder.

    Raises:
        UserError: the number of maps is not four.
    """

    min_batch_size = 2  # minimum images per rank in training: BatchNorm on 1x1 pooled maps needs two values
    fixed_size_reason = "its pooling windows depend on the size (UPerNet)"

    @check_annotations
    def __init__(self, in_dim: int | Sequence[int], num_layers: int, num_classes: Count, channels: Count = 512) -> None:
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetHead as Decoder

        super().__init__()
        refuse_unless_four("upernet", num_layers)
        config = UperNetConfig(hidden_size=channels)
        config.num_labels = num_classes
        pyramid = None if isinstance(in_dim, int) else list(in_dim)
        self.reassemble = nn.Identity() if pyramid else Reassemble(in_dim, [channels] * NUM_LEVELS)
        self.decoder = Decoder(config, pyramid or [channels] * NUM_LEVELS)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores (B, K, 4h, 4w) for a transformer, or on the finest grid of a pyramid."""
        return self.decoder(self.reassemble(features))

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs
