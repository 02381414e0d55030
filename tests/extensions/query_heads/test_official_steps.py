"""Training steps of the official recipes, written out in float64: loss and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eomt_making import pair
from scipy.optimize import linear_sum_assignment
from torch import nn

from dinoseg.core.shapes import Batch
from dinoseg.losses import mask_classification, points
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.models.adapters import Frozen
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel

K, POINTS = 4, 40


def make_batch(size, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, *size, dtype=torch.float64, generator=draw)
    blocks = torch.randint(0, K, (3, 4, 4), generator=draw).to(torch.uint8)
    mask = F.interpolate(blocks[None].float(), size)[0].to(torch.uint8)
    mask[torch.rand(mask.shape, generator=draw) < 0.2] = 255
    mask[1, size[0] // 2 :] = 255  # padding
    return Batch(images, mask, ["a", "b", "c"])


def linear_model():
    backbone, _ = pair(adapter=Frozen())
    backbone.register_forward_hook(lambda _, __, maps: [each.double() for each in maps])  # maps are in float32
    head = LinearHead(24, 1, K, init="normal")
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.classify.weight)
    return SegmentationModel(backbone, head).double()


def official_linear_loss(features, mask, parameters):
    """Return mmseg's and DINOv3's loss of a linear head: SyncBN, 1x1 convolution, and a mean over all pixels."""
    gain, shift, weight, bias = parameters
    scores = F.conv2d(F.batch_norm(features, None, None, gain, shift, training=True, eps=1e-5), weight, bias)
    scores = F.interpolate(scores, mask.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, mask.long(), ignore_index=255, reduction="none").mean()


@pytest.mark.parametrize(("size", "seed"), [((48, 48), 0), ((32, 80), 1), ((64, 48), 2)])
def test_linear_probe_step_equals_the_official_code(size, seed):
    model = linear_model().train()
    batch = make_batch(size, seed)
    with torch.no_grad():
        (features,) = model.backbone(batch.image)
    own = [model.head.norm.weight, model.head.norm.bias, model.head.classify.weight, model.head.classify.bias]
    copies = [parameter.detach().clone().requires_grad_() for parameter in own]
    expected = official_linear_loss(features, batch.mask, copies)
    value, _ = CrossEntropy(torch.ones(K), average="all")(model(batch.image), batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    slopes = torch.autograd.grad(value, own), torch.autograd.grad(expected, copies)
    for found, wanted in zip(*slopes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def read(maps, places):
    """Return maps (M, h, w) at places (P, 2) in 0..1, bilinear with zero padding."""
    return F.grid_sample(maps[:, None], 2 * places[None, None].expand(len(maps), -1, -1, -1) - 1, align_corners=False)[
        :, 0, 0
    ]


def official_layer_loss(layer, mask, draws):
    """Return the summed loss of one layer's outputs: Mask2Former's criterion with the recorded draws."""
    places = draws.pop(0).double()
    pairs = []
    targets = []
    for image in range(len(mask)):
        classes = torch.tensor(sorted(set(mask[image].flatten().tolist()) - {255}))
        masks = torch.stack([(mask[image] == k).double() for k in classes])
        x, t = read(layer.mask_logits[image], places[image]), read(masks, places[image])  # (Q, P), (M, P)
        entropy = (F.softplus(-x) @ t.T + F.softplus(x) @ (1 - t).T) / t.shape[1]
        p = x.sigmoid()
        dice = 1 - (2 * p @ t.T + 1) / (p.sum(1)[:, None] + t.sum(1) + 1)
        cost = 5 * entropy + 5 * dice - 2 * layer.class_logits[image].softmax(-1)[:, classes]
        queries, order = linear_sum_assignment(cost.detach().numpy())
        wanted = torch.full((layer.class_logits.shape[1],), K)
        wanted[queries] = classes[order]
        targets.append(wanted)
        # the draws are for matched masks in the order of their classes
        pairs += [(layer.mask_logits[image, queries[n]], masks[order[n]]) for n in np.argsort(order)]
    candidates, fresh = draws.pop(0).double(), draws.pop(0).double()
    entropies, dices = [], []
    for row, (logits, truth) in enumerate(pairs):
        with torch.no_grad():
            chosen = read(logits[None], candidates[row])[0].abs().topk(int(0.75 * POINTS), largest=False).indices
        at = torch.cat([candidates[row][chosen], fresh[row]])
        a, b = read(logits[None], at)[0], read(truth[None], at)[0]
        entropies.append((F.softplus(a) - a * b).mean())
        p = a.sigmoid()
        dices.append(1 - (2 * (p * b).sum() + 1) / (p.sum() + b.sum() + 1))
    weights = torch.tensor([1.0] * K + [0.1], dtype=torch.float64)
    of_class = F.cross_entropy(layer.class_logits.flatten(0, 1), torch.cat(targets), weights)
    return 2 * of_class + 5 * torch.stack(entropies).mean() + 5 * torch.stack(dices).mean()


@pytest.mark.parametrize(("size", "seed"), [((48, 48), 0), ((32, 80), 1), ((64, 48), 2)])
def test_eomt_step_equals_the_official_code(size, seed, monkeypatch):
    model = SegmentationModel(*pair(anneal=[[0, 50], [50, 90]])).double().train()
    batch = make_batch(size, seed)
    draws = []
    draw = points.random_points
    for module in (points, mask_classification):
        monkeypatch.setattr(module, "random_points", lambda *given: draws.append(draw(*given)) or draws[-1])
    loss = MaskClassification(torch.ones(K), num_points=POINTS, ignored="background", interpolation="bilinear")
    model.set_progress(20, 100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slopes, values = [], []
    for criterion in ("dinoseg", "official"):
        torch.manual_seed(seed)
        prediction = model(batch.image)
        if criterion == "dinoseg":
            value, _ = loss(prediction, batch)
        else:
            layers = [prediction.outputs, *prediction.outputs.aux]
            # draws: the points of the matching of each layer, then candidates and further points of each layer
            matching, rest = draws[: len(layers)], draws[len(layers) :]
            value = sum(
                official_layer_loss(layer, batch.mask, [matching[n], *rest[2 * n : 2 * n + 2]])
                for n, layer in enumerate(layers)
            )
        values.append(value.item())
        slopes.append(torch.autograd.grad(value, trained, allow_unused=True))
    assert values[0] == pytest.approx(values[1], rel=1e-9) and len(draws) == 9
    largest = max(slope.abs().max() for slope in slopes[1] if slope is not None)
    reached = [(a, b) for a, b in zip(*slopes, strict=True) if b is not None]
    assert len(reached) > 40 and [a is None for a in slopes[0]] == [b is None for b in slopes[1]]
    for found, wanted in reached:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9 * largest.item())
