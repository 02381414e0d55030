"""The Mask2Former head: what it takes, refuses, returns and trains."""

import pytest
import torch
import torch.nn.functional as F

from dinoseg.core.shapes import MaskOutputs
from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead
from dinoseg.models.heads.semantic import semantic_map

DIM = 16
TINY = {"hidden_dim": 64, "num_heads": 4, "feedforward_dim": 24, "num_queries": 5}


def tiny(num_classes=3, **options):
    torch.manual_seed(0)
    return Mask2FormerHead(DIM, 4, num_classes, **{**TINY, **options})


def random_inputs():
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(2, DIM, 3, 2, generator=generator) for _ in range(4)]
    return features, torch.randn(2, 3, 48, 32, generator=generator)


def test_sizes_follow_the_backbone_unless_they_are_given():
    with torch.device("meta"):
        followed = Mask2FormerHead(384, 4, 2)
        set_apart = Mask2FormerHead(384, 4, 2, hidden_dim=64, feedforward_dim=40)
    assert followed.predictor.query_feat.weight.shape == (100, 192)
    assert followed.predictor.transformer_ffn_layers[0].linear1.out_features == 768
    assert followed.predictor.class_embed.out_features == 3
    assert set_apart.predictor.query_feat.weight.shape == (100, 64)
    assert set_apart.pixel_decoder.encoder.encoder["layers"][5].linear1.out_features == 40


@pytest.mark.parametrize(
    ("width", "heads", "hidden"),
    [
        *((160, 16, 96), (24, 4, 64), (24, 12, 96), (216, 12, 192)),  # rounded up
        *((192, 16, 96), ([1280] * 4, 16, 640), (4096, 16, 2048)),  # published widths fit as they are
    ],
)
def test_hidden_width_is_half_of_the_backbone_or_rounded_up(width, heads, hidden):
    with torch.device("meta"):
        assert Mask2FormerHead(width, 4, 2, num_heads=heads).predictor.post_norm.normalized_shape == (hidden,)


def objective(outputs):
    layers = [outputs, *outputs.aux]
    return sum(part.square().sum() for layer in layers for part in (layer.class_logits, layer.mask_logits))


def test_every_parameter_gets_a_gradient():
    head = tiny().eval()  # in train mode the batch norms take away what two of the biases add
    for name, parameter in head.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):  # these start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    features, pixels = random_inputs()
    features = [feature.requires_grad_() for feature in features]
    objective(head.decode(features, pixels)).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert all(feature.grad.abs().sum() > 0 for feature in features)


def test_maps_and_pixels_in_half_precision_are_taken_to_float32():
    features, pixels = random_inputs()
    halved = [part.bfloat16() for part in (*features, pixels)]
    with torch.no_grad():
        outputs = tiny().eval().decode(halved[:4], halved[4])
        expected = tiny().eval().decode([part.float() for part in halved[:4]], halved[4].float())
    assert outputs.mask_logits.dtype == torch.float32
    assert torch.equal(outputs.mask_logits, expected.mask_logits)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        head = tiny(drop_path=0.5, checkpointing=checkpointing).train()
        torch.manual_seed(4)  # the same paths are dropped, in the recomputation too
        objective(head.decode(*random_inputs())).backward()
        gradients.append({name: parameter.grad for name, parameter in head.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-3, msg=name)


def test_paths_are_dropped_in_training_only():
    head = tiny(drop_path=0.5)
    case = random_inputs()
    still, again = (head.eval().decode(*case) for _ in range(2))
    trained, other = (head.train().decode(*case) for _ in range(2))
    assert torch.equal(still.mask_logits, again.mask_logits) and not still.aux
    assert not torch.equal(trained.mask_logits, other.mask_logits) and len(trained.aux) == 9


@pytest.mark.parametrize("no_object", [True, False])
def test_scores_are_the_published_semantic_map(no_object):
    """Which tests/models/heads/test_semantic.py compares with loops."""
    generator = torch.Generator().manual_seed(5)
    masks = 4 * torch.randn(2, 7, 8, 12, generator=generator)
    outputs = MaskOutputs(torch.randn(2, 7, 4, generator=generator), masks)
    found = tiny(4 - no_object, no_object=no_object).predict(outputs, (21, 45), (0.7, 0.9))
    assert torch.equal(found, semantic_map(outputs, (21, 45), (0.7, 0.9), no_object))


class WatchedBackbone:
    """Four maps made of the pixels alone, with a record of whether autocast was on."""

    def pixels(self, images):
        return images - 0.5

    def __call__(self, images):
        self.in_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        coarse = F.avg_pool2d(self.pixels(images), 16)
        return [torch.cat([coarse * (number + 1)] * 6, dim=1)[:, :DIM] for number in range(4)]


@pytest.mark.parametrize("half", [True, False])
def test_precision_of_backbone_and_scores_is_set_by_part(half):
    head = tiny(backbone_in_bfloat16=half, scores_in_bfloat16=half).eval()
    backbone = WatchedBackbone()
    states = []
    head.adapter.register_forward_pre_hook(lambda *_: states.append(torch.is_autocast_enabled("cpu")))
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = head.run(backbone, images)
        scores = head.predict(outputs, (32, 48), (1.0, 1.0))
    assert backbone.in_bfloat16 == half and states == [False]
    assert torch.equal(scores, scores.bfloat16().float()) == half
    assert (head.weighted_masks(outputs) is None) == half
