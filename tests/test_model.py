from functools import partial

import pytest
import torch
from mistakes import assert_refused
from torch import nn

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import WeightedMasks
from dinoseg.models.adapters import Frozen, Full, Lora
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.model import SegmentationModel, backbone_size, fingerprint, trained_names


@pytest.fixture(params=["linear", "mlp"])
def head(request):
    """Return a function from a number of classes to a head."""
    return {"linear": partial(LinearHead, 24, 1), "mlp": partial(MlpHead, 24, 1, patch_size=8)}[request.param]


def test_a_pixel_block_lands_on_its_patch():
    head = MlpHead(24, 1, 3, 8)
    features = [torch.zeros(1, 24, 3, 4)]
    with torch.no_grad():
        block = torch.arange(3 * 64, dtype=torch.float32)
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.copy_(block)
    scores = head(features)
    assert scores.shape == (1, 3, 24, 32)
    assert torch.equal(scores[0, :, 8:16, 24:32], block.view(3, 8, 8))


def test_bytes_and_floats_give_the_same(tiny_backbone, head):
    model = SegmentationModel(tiny_backbone(), head(2)).eval()
    images = torch.randint(0, 256, (1, 3, 19, 23), dtype=torch.uint8)
    assert torch.equal(model(images).logits(), model(images.float() / 255).logits())


def test_a_frozen_backbone_stays_in_eval_mode(tiny_backbone, head):
    model = SegmentationModel(Frozen()(tiny_backbone()), head(2)).train()
    assert not model.backbone.training and model.head.training
    model = SegmentationModel(Lora(rank=1, alpha=1)(tiny_backbone()), head(2)).train()
    assert model.backbone.training
    assert not model.eval().backbone.training


@pytest.mark.parametrize(
    ("size", "scale", "longest", "expected"),
    [
        ((1080, 1920), 0.5, None, (540, 960)),
        ((1080, 1920), 1.0, 640, (360, 640)),
        ((100, 50), 1.0, 640, (100, 50)),
        ((1, 3000), 1.0, 30, (1, 30)),
    ],
)
def test_backbone_size_only_ever_reduces_to_longest(size, scale, longest, expected):
    assert backbone_size(size, scale, longest) == expected


@pytest.mark.parametrize(
    ("resolution", "seen"),
    [({}, (33, 41)), ({"scale": 0.5}, (16, 20)), ({"scale": 2.0}, (66, 82)), ({"longest": 20}, (16, 20))],
)
def test_model_resizes_images_and_passes_the_valid_grid_share(tiny_backbone, head, resolution, seen):
    model = SegmentationModel(tiny_backbone(), head(2), **resolution).eval()
    images = torch.full((2, 3, 33, 41), 51, dtype=torch.uint8)
    pixels = model.pixels(images)
    prediction = model(images)
    assert pixels.shape == (2, 3, *seen)
    torch.testing.assert_close(pixels, torch.full_like(pixels, 0.2))
    assert prediction.size == (33, 41)
    assert prediction.valid == tuple(side / (8 * -(-side // 8)) for side in seen)


@pytest.mark.parametrize("key", ["scale", "longest"])
def test_resolution_out_of_range_is_refused(tiny_backbone, head, key):
    assert_refused(lambda: SegmentationModel(tiny_backbone(), head(2), **{key: 0}), f"{key}=0 ")


def test_checkpoint_stores_only_trained_tensors(tiny_backbone):
    def names(adapter, weights):
        backbone = adapter(tiny_backbone())
        backbone.weights = weights
        return trained_names(SegmentationModel(backbone, LinearHead(24, 1, 2)))

    head = {f"head.{name}" for name in ("norm.weight", "norm.bias", "classify.weight", "classify.bias")}
    head |= {f"head.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert names(Frozen(), "some/hub-id") == head
    adapted = names(Lora(rank=1, alpha=1), "some/hub-id")
    assert head < adapted and all(".lora_" in name for name in adapted - head)
    assert len(names(Full(), "some/hub-id")) > len(adapted)
    whole = names(Frozen(), "random")
    assert "backbone.model.embeddings.cls_token" in whole


@pytest.mark.parametrize(("adapter", "kept"), [(Frozen(), False), (Full(), True)])
def test_a_checkpoint_holds_running_means_of_trained_parts_alone(tiny_backbone, adapter, kept):
    backbone = tiny_backbone()
    backbone.extra = nn.BatchNorm2d(3)
    backbone.register_buffer("constant", torch.ones(1))  # of a part with no parameter of its own
    backbone.weights = "some/hub-id"
    names = trained_names(SegmentationModel(adapter(backbone), LinearHead(24, 1, 2)))
    assert {"backbone.extra.running_mean" in names, "backbone.extra.weight" in names} == {kept}
    assert "backbone.constant" not in names


def test_fingerprint_depends_on_names_shapes_and_values():
    zeros = torch.zeros(2, 3)
    others = [("b", zeros)], [("a", zeros.T)], [("a", zeros + 1)], [("a", zeros), ("b", zeros)], []
    assert len({fingerprint(tensors) for tensors in ([("a", zeros)], *others)}) == 6
    assert fingerprint([("a", zeros)]) == fingerprint([("a", torch.zeros(2, 3))])


class MaskHead(LinearHead):
    """Two masks of shares of each class."""

    def grid_scores(self, outputs):
        return None

    def weighted_masks(self, outputs):
        return WeightedMasks(outputs[:, :2], torch.ones(len(outputs), 2, outputs.shape[1]))


class PixelHead(LinearHead):
    """Scores of pixels alone, neither a grid nor masks."""

    def grid_scores(self, outputs):
        return None

    def predict(self, outputs, size, valid):
        return upsample(outputs, size, valid)


@pytest.mark.parametrize("kind", [LinearHead, MaskHead, PixelHead])
@pytest.mark.parametrize("outputs", [2, 4])
def test_scores_of_unnamed_classes_are_refused(tiny_backbone, kind, outputs):
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    SegmentationModel(tiny_backbone(), kind(24, 1, outputs), num_classes=outputs)(images).class_ids()
    model = SegmentationModel(tiny_backbone(), kind(24, 1, outputs), num_classes=3)
    words = (f"{kind.__name__} scores {outputs} classes, and the model has 3",)
    assert_refused(lambda: model(images).class_ids(), *words)
