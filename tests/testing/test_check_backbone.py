"""A backbone that keeps its contract passes, and one broken rule each is refused by the sentence of that rule."""

import pytest
import torch
from torch import nn

from dinoseg.core.contracts import Backbone
from dinoseg.core.geometry import pad_to_multiple
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.testing import check_backbone


class Patches(Backbone):
    depth, dim, patch_size = 2, 6, 8

    def __init__(self, layers):
        super().__init__()
        self.layers = resolve_layers(layers, self.depth)
        self.num_layers = len(self.layers)
        self.embedding = nn.Conv2d(3, self.dim, 8, 8)
        self.blocks = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(self.depth))
        register_colours(self, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])

    def forward(self, images):
        return self.blocks_of(self.embedding(self.pixels(images)))

    def blocks_of(self, cells):
        maps = [cells]
        for block in self.blocks:
            maps.append(maps[-1] + block(maps[-1]).tanh())
        return [maps[layer + 1] for layer in self.layers]


class NoContract(nn.Module):
    def __init__(self, layers):
        super().__init__()


class NoDepth(Patches):
    def __init__(self, layers):
        super().__init__(layers)
        self.depth = None


class UnresolvedLayers(Patches):
    def __init__(self, layers):
        super().__init__(layers)
        self.layers = layers


class UndeclaredPyramid(Patches):
    dim = 6

    def __init__(self, layers):
        super().__init__(layers)
        self.dim = [6, 6]


class FlooredGrid(Patches):
    def pixels(self, images):
        return nn.functional.pad(super().pixels(images)[..., 8:, :], (0, 0, 0, 8))[..., 8:, :]


class TwoGrids(Patches):
    def forward(self, images):
        first, last = super().forward(images)
        return [first.repeat_interleave(2, 2), last]


class HalfMaps(Patches):
    def forward(self, images):
        return [part.half() for part in super().forward(images)]


class DivisionByZero(Patches):
    def forward(self, images):
        return [part / (part - part).abs() for part in super().forward(images)]


class InPlace(Patches):
    def pixels(self, images):
        return pad_to_multiple(images.sub_(self.mean).div_(self.std), 8)


class FixedColours(Patches):
    def pixels(self, images):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
        return pad_to_multiple((images - mean) / std, 8)


class BlackPadding(Patches):
    def pixels(self, images):
        return (pad_to_multiple(images, 8) - self.mean) / self.std


class OtherSplit(Patches):
    def forward_frozen(self, images):
        return super().forward_frozen(images)[::-1]


class NoTrain(Patches):
    def train(self, mode=True):
        self.training = mode
        return self


class ConstantDropout(Patches):
    def forward(self, images):
        return [nn.functional.dropout(part, 0.1) for part in super().forward(images)]


class BatchMean(Patches):
    def forward(self, images):
        return [part - part.mean(0) for part in super().forward(images)]


class PlainTensor(Patches):
    def __init__(self, layers):
        super().__init__(layers)
        self.offset = torch.randn(self.dim, 1, 1)

    def forward(self, images):
        return [part + self.offset for part in super().forward(images)]


class LazyWeight(Patches):
    def forward(self, images):
        if "late" not in self._parameters:
            self.late = nn.Parameter(torch.ones(()))
        return [part * self.late for part in super().forward(images)]


class KeptFunction(Patches):
    def __init__(self, layers):
        super().__init__(layers)
        self.embed_pixels = lambda pixels: self.embedding(pixels)

    def forward(self, images):
        return self.blocks_of(self.embed_pixels(self.pixels(images)))


class UnusedWeight(Patches):
    def __init__(self, layers):
        super().__init__(layers)
        self.left = nn.Linear(2, 2)


class WronglyUnused(Patches):
    unused = ("embedding.weight",)


class InfiniteSlope(Patches):
    def forward(self, images):
        return [part + (part * 0).abs().sqrt() for part in super().forward(images)]


class RoundedSum(Patches):
    def forward(self, images):
        return [(part + 1000) - 1000 for part in super().forward(images)]


def test_a_backbone_that_keeps_its_contract_passes():
    state = torch.get_rng_state()
    check_backbone(Patches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (NoContract, "it must inherit dinoseg.core.contracts.Backbone, .* derive the class"),
        (NoDepth, "must set its members .* but depth is missing; set it"),
        (UnresolvedLayers, r"`layers` must be \[0, 1\] .* but they are \[0, -1\] and 2; use .*resolve_layers"),
        (UndeclaredPyramid, r"`dim` must be a list for a pyramid .* is_pyramid=False and dim=\[6, 6\]"),
        (FlooredGrid, r"on a grid of \(8, 12\), but it gave \[\(1, 6, 7, 12\)"),
        (TwoGrids, r"all maps must have one grid .*\(1, 6, 16, 12\).* set is_pyramid"),
        (HalfMaps, "maps must be finite and float32"),
        (DivisionByZero, "maps must be finite and float32"),
        (InPlace, "must not change its input"),
        (FixedColours, "must be normalised by the buffers `mean` and `std`"),
        (BlackPadding, "padded with `mean` at the bottom and on the right"),
        (OtherSplit, r"forward_trainable\(forward_frozen\(images\)\) must give the maps"),
        (NoTrain, r"after train\(False\) .* but embedding, blocks.* did not change; call super"),
        (ConstantDropout, "must be equal in eval mode, but they differ; .*self.training"),
        (BatchMean, "the same results alone and in a batch, but they differ; compute no statistics"),
        (PlainTensor, "a new instance with the same state dict .*`register_buffer`"),
        (LazyWeight, "load_state_dict failed; create all parameters in `__init__`"),
        (KeptFunction, "must use its own weights, but it uses those of the original; .*lambda"),
        (UnusedWeight, "but left.weight, left.bias got no gradient; use them"),
        (WronglyUnused, "parameters in `unused` must get no gradient, but embedding.weight did"),
        (InfiniteSlope, "gradients must be finite in float32, but those of embedding.weight.* are not"),
        (RoundedSum, "under torch.autocast in bfloat16 must be finite and near"),
    ],
)
def test_a_backbone_that_breaks_a_rule_is_refused(backbone, message):
    with pytest.raises(AssertionError, match=f"^{backbone.__name__}: .*{message}"):
        check_backbone(backbone)
