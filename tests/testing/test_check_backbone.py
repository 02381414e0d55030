"""A backbone that keeps its contract passes, and one broken rule each is refused by the sentence of that rule."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from dinoseg.core.contracts import Backbone
from dinoseg.core.geometry import pad_to_multiple
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.testing import check_backbone

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


class Patches(Backbone):
    depth, dim, patch_size = 2, 6, 8

    def __init__(self, layers):
        super().__init__()
        self.layers = resolve_layers(layers, self.depth)
        self.num_layers = len(self.layers)
        self.embedding = nn.Conv2d(3, self.dim, 8, 8)
        self.blocks = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(self.depth))
        register_colours(self, MEAN, STD)

    def forward(self, images):
        return self.blocks_of(self.embedding(self.pixels(images)))

    def blocks_of(self, cells):
        maps = [cells]
        for block in self.blocks:
            maps.append(maps[-1] + block(maps[-1]).tanh())
        return [maps[layer + 1] for layer in self.layers]


class TwoGrids(Patches):
    def forward(self, images):
        first, last = super().forward(images)
        return [first.repeat_interleave(2, 2), last]


class NoTrain(Patches):
    def train(self, mode=True):
        self.training = mode
        return self


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


def with_members(**members):
    return type("Changed", (Patches,), members)


def with_maps(change):
    """Return a backbone of which each map is changed."""
    return with_members(forward=lambda self, images: [change(part) for part in Patches.forward(self, images)])


def with_attribute(name, make):
    """Return a backbone that gets an attribute once it is made: a function of its argument `layers`."""

    def init(self, layers):
        Patches.__init__(self, layers)
        setattr(self, name, make(layers))

    return with_members(__init__=init)


def with_pixels(prepare):
    """Return a backbone that prepares images otherwise: a function of them, the mean and the standard deviation."""
    return with_members(pixels=lambda self, images: prepare(images, self.mean, self.std))


OtherSplit = with_members(forward_frozen=lambda self, images: Patches.forward_frozen(self, images)[::-1])
OtherTokens = with_members(
    has_tokens=True,
    forward_frozen=lambda self, images: self(images),
    forward_trainable=lambda self, frozen, _: frozen,
    trainable_tokens=lambda self, frozen, _: [part.flatten(2).mT.flip(1) for part in frozen],
)
COLOURS = [torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)]
pad = partial(pad_to_multiple, multiple=8)


def test_a_backbone_that_keeps_its_contract_passes():
    state = torch.get_rng_state()
    check_backbone(Patches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (nn.Identity, "it must inherit dinoseg.core.contracts.Backbone, .* derive the class"),
        (with_attribute("depth", lambda _: None), "must set its members .* but depth is missing; set it"),
        (with_attribute("layers", list), r"`layers` must be \[0, 1\] .* are \[0, -1\] and 2; use .*resolve_layers"),
        (with_attribute("dim", lambda _: [6, 6]), r"must be a list for a pyramid .* is_pyramid=False and dim=\[6, 6\]"),
        (
            with_pixels(lambda images, mean, std: pad(images[..., 8:, :])),
            r"grid of \(8, 12\), but it gave \[\(1, 6, 7, 12",
        ),
        (TwoGrids, r"all maps must have one grid .*\(1, 6, 16, 12\).* set is_pyramid"),
        (with_maps(lambda part: part.half()), "maps must be finite and float32"),
        (with_maps(lambda part: part / (part - part).abs()), "maps must be finite and float32"),
        (with_pixels(lambda images, mean, std: pad(images.sub_(mean).div_(std))), "must not change its input"),
        (with_pixels(lambda images, *_: pad((images - COLOURS[0]) / COLOURS[1])), "by the buffers `mean` and `std`"),
        (
            with_pixels(lambda images, mean, std: (pad(images) - mean) / std),
            "with `mean` at the bottom and on the right",
        ),
        (OtherSplit, r"forward_trainable\(forward_frozen\(images\)\) must give the maps"),
        (OtherTokens, r"the last h \* w tokens of trainable_tokens.* must be those of the maps"),
        (NoTrain, r"after train\(False\) .* but embedding, blocks.* did not change; call super"),
        (with_maps(lambda part: dropout(part, 0.1)), "equal in eval mode, but they differ; .*self.training"),
        (with_maps(lambda part: part - part.mean(0)), "alone and in a batch, but they differ; compute no statistics"),
        (PlainTensor, "a new instance with the same state dict .*`register_buffer`"),
        (LazyWeight, "load_state_dict failed; create all parameters in `__init__`"),
        (KeptFunction, "must use its own weights, but it uses those of the original; .*lambda"),
        (with_attribute("left", lambda _: nn.Linear(2, 2)), "but left.weight, left.bias got no gradient; use them"),
        (with_members(unused=("embedding.weight",)), "`unused` must get no gradient, but embedding.weight did"),
        (
            with_maps(lambda part: part + (part * 0).abs().sqrt()),
            "finite in float32, but those of embedding.weight.* are not",
        ),
        (with_maps(lambda part: (part + 1000) - 1000), "under torch.autocast in bfloat16 must be finite and near"),
    ],
)
def test_a_backbone_that_breaks_a_rule_is_refused(backbone, message):
    with pytest.raises(AssertionError, match=f"^{backbone.__name__}: .*{message}"):
        check_backbone(backbone)
