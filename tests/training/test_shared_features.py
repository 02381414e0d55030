import pytest
import torch
from torch import nn

from dinoseg.core.contracts import Head
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import Segmenter
from dinoseg.training.shared_features import SharedFeatures, SharingSegmenter
from dinoseg.utils.errors import UserError

IMAGES = torch.randint(0, 256, (2, 3, 17, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(tiny_backbone):
    """Return what is shared, a maker of segmenters that share it, and the passes of the backbone so far."""
    whole = tiny_backbone((0, 1)).requires_grad_(False)
    shared, passes = SharedFeatures(Segmenter(whole, Head()).eval()), []
    whole.norm.register_forward_hook(lambda *_: passes.append(1))

    def model(layers, head):
        own = tiny_backbone(layers).requires_grad_(False)
        return SharingSegmenter(own, head, shared, scale=1.0, longest=None).eval()

    return shared, model, passes


@pytest.mark.parametrize("layers", [(-1,), (0,), (0, 1), (1, 0)])
def test_each_gets_its_own_blocks(made, tiny_backbone, layers):
    head = LinearHead(24, len(layers), 3)
    alone = Segmenter(tiny_backbone(layers).requires_grad_(False), head).eval()
    for images in (IMAGES, IMAGES[:, :, :1, :1], IMAGES.float() / 255):
        assert torch.equal(made[1](layers, head)(images).scores(), alone(images).scores())


def test_the_same_images_are_looked_at_once_within_the_block(made):
    shared, model, passes = made
    one, other = model((1,), LinearHead(24, 1, 3)), model((0, 1), LinearHead(24, 2, 3))
    with shared.held(IMAGES):
        one(IMAGES), other(IMAGES), other(IMAGES[:])
        assert len(passes) == 2, "a norm for each of two blocks"
        one(IMAGES.clone())
        assert len(passes) == 4
        IMAGES.add_(0)  # as far as anybody knows they are others now
        one(IMAGES)
        assert len(passes) == 6
    one(IMAGES), one(IMAGES)
    assert len(passes) == 10


def test_nothing_is_kept_after_the_block_nor_for_images_that_may_not_be_reduced(made):
    shared, _, passes = made
    for _ in range(2):
        with shared.held(IMAGES):
            for reduce in (True, False, True):
                shared.of(IMAGES, reduce=reduce)
    assert len(passes) == 2 * 2 * 2, "a norm for each of two blocks"


def test_of_windows_that_each_cuts_for_itself_nothing_is_kept(made):
    shared, model, passes = made
    one = model((1,), LinearHead(24, 1, 3))
    with shared.held(IMAGES):
        one(torch.stack([IMAGES[0, :, :8, :8], IMAGES[1, :, :8, :8]]))
        assert len(passes) == 2 and not shared._held
        one(IMAGES[:1]), one(IMAGES[:1])
        assert len(passes) == 4, "a part of a batch is of it"
        one(IMAGES[:1], reduce=False)
        assert len(passes) == 6, "seen at another size, it may be"
    assert not shared._held, "nothing is kept for later"


def test_a_head_that_changes_its_features_is_told_so(made):
    class Rough(LinearHead):
        def forward(self, features):
            return super().forward([nn.functional.relu_(part) for part in features])

    shared, model, _ = made
    rough, other = model((1,), Rough(24, 1, 3)), model((1,), LinearHead(24, 1, 3))
    with shared.held(IMAGES), pytest.raises(UserError, match="A head has changed the features it was given in place"):
        rough(IMAGES), other(IMAGES)


def test_a_head_with_a_way_of_its_own_runs_the_backbone(made):
    class Own(LinearHead):
        def run(self, backbone, images):
            return self(backbone(images))

    shared, model, passes = made
    head = Own(24, 1, 3)
    with shared.held(IMAGES):
        assert torch.equal(
            model((1,), head)(IMAGES).scores(), Segmenter(model((1,), head).backbone, head)(IMAGES).scores()
        )
    assert not passes
