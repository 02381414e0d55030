"""DINOv3 ConvNeXt backbone, built on the model of Hugging Face transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.core.contracts import Backbone
from dinoseg.models.backbones.layers import Layers, resolve_layers
from dinoseg.models.backbones.normalisation import ColourMean, ColourStd, register_colours, resolve_colours
from dinoseg.models.backbones.patch_projection import ChannelWeight, adapt_input
from dinoseg.models.backbones.pretrained import configuration, exported_state, load_model
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Channels, Count

STEM = 4  # stride of the first stage in pixels; each later stage doubles it


class ConvNext(Backbone):
    """DINOv3 ConvNeXt that returns the outputs of its four stages as maps.

    Images (B, 3, H, W), float RGB in 0..1, any H and W; returns L maps (B, C, h, w), one for each of `layers`. Stage
    s has a stride of 4 * 2^s px and its own width. The final LayerNorm is applied to the map of the last stage only,
    as in Meta's `get_intermediate_layers(norm=True)`. Images are normalised, then padded with zeros (the mean colour)
    at the bottom and on the right. Stages after the last of `layers` are removed.

    Args:
        arch: values of transformers' `dinov3_convnext` configuration, so that the model can be built without weights.
        weights: a hub id (`id` or `id@revision`), a local folder, a weights file, or `random`.
        patch_size: stride in pixels of the coarsest of `layers` (32 for the last stage); validated.
        layers: 0-based stages to return; negative numbers count from the last; `quarters` for all four.
        mean: RGB mean of the images the weights were trained on, in 0..1; None: ImageNet's, or those of satellite
            images if the name of the weights contains `sat493m`.
        std: RGB standard deviation of the same images.
        checkpointing: recompute block activations in the backward pass: less memory, about a third more time.
        channels: number of channels of the images; three are RGB.
        channel_weights: factor of each channel's kernel in the first convolution, such as `[1, 1, 1, 0]` for a fourth
            channel that starts without influence, see `adapt_input_kernel`; None: as timm adapts it.

    Raises:
        UserError: invalid key or value in `arch`, wrong patch size, layer out of range, invalid colour statistics, or
            weights that are not available or do not fit.
    """

    is_pyramid = True

    def __init__(
        self,
        arch: Mapping[str, Any],
        weights: str,
        patch_size: Count,
        layers: Layers = (-1,),
        mean: Sequence[ColourMean] | None = None,
        std: Sequence[ColourStd] | None = None,
        checkpointing: bool = False,
        channels: Channels = 3,
        channel_weights: Sequence[ChannelWeight] | None = None,
    ) -> None:
        super().__init__()
        config = configuration("dinov3_convnext", arch)
        self.depth = len(config.hidden_sizes)
        self.layers = resolve_layers(layers, self.depth)
        self.num_layers = len(self.layers)
        self.patch_size = patch_size
        stride = STEM * 2 ** max(self.layers)
        if patch_size != stride:
            raise UserError(
                f"patch_size={patch_size}: the coarsest of these layers has a stride of {stride} px: set "
                f"patch_size={stride}."
            )
        widths = [config.hidden_sizes[layer] for layer in self.layers]
        self.dim: int | list[int] = widths if self.num_layers > 1 else widths[0]
        self.weights = weights
        self.checkpointing = checkpointing
        self.unused: list[str] = []
        self.model = load_model(config, weights, self._cut)
        adapt_input(self.model.model.stages[0].downsample_layers[0], channels, channel_weights)
        self.model.config.num_channels = channels
        register_colours(self, *resolve_colours(weights, mean, std, channels=channels))

    @property
    def blocks(self) -> nn.ModuleList:
        """The stages up to the last tapped one, in order."""
        return self.model.model.stages

    @property
    def norm(self) -> nn.Module | None:
        """The final LayerNorm, or None if the last stage is not tapped."""
        return self.model.layer_norm

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, C, h, w) for each tapped stage."""
        x = self.pixels(images)
        maps = {}
        for number, stage in enumerate(self.blocks):
            x = self._run(stage, x)
            maps[number] = x
        if self.norm is not None:
            maps[self.depth - 1] = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # over the channels
        return [maps[layer].contiguous() for layer in self.layers]  # the memory format affects rounding in heads

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names that `weights` accepts in a file.

        Raises:
            UserError: the model has LoRA updates that are not merged.
        """
        return exported_state(self.model)

    def _cut(self, model: Any) -> None:
        """Remove the stages after the last tapped one, and the final norm if unused."""
        if max(self.layers) + 1 < self.depth:
            del model.model.stages[max(self.layers) + 1 :]
            model.layer_norm = None

    def _run(self, stage: Any, x: Tensor) -> Tensor:
        for part in stage.downsample_layers:
            x = part(x)
        for block in stage.layers:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return x
