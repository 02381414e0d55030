"""A head that keeps its contract passes, and one broken rule each is refused by the sentence of that rule."""

from functools import partial

import pytest
import torch
from torch import nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import WeightedMasks
from dinoseg.testing import check_head


class Cells(Head):
    def __init__(self, in_dim, num_layers, num_classes):
        super().__init__()
        self.classify = nn.Conv2d(in_dim * num_layers, num_classes, 1)

    def forward(self, features):
        return self.classify(torch.cat(features, 1))

    def grid_scores(self, outputs):
        return outputs


class Pixels(Cells):
    """A head that resizes by itself."""

    def grid_scores(self, outputs):
        return None

    def predict(self, outputs, size, valid):
        return upsample(outputs, size, valid)


def with_members(base=Cells, **members):
    return type("Changed", (base,), members)


def with_features(change):
    """Return a head that gets changed feature maps."""
    return with_members(forward=lambda self, features: Cells.forward(self, [change(part) for part in features]))


def with_predict(predict):
    """Return a head with another `predict`: a function of its outputs, the size and the valid part."""
    return with_members(Pixels, predict=lambda self, *given: predict(*given))


def mask_each_class(_, outputs):
    return WeightedMasks(outputs, torch.eye(3).expand(len(outputs), 3, 3))


AGREE = "`grid_scores` and `weighted_masks` must give the scores of `predict`"
ImageSizeOnly = with_predict(lambda outputs, _, valid: upsample(outputs, (37, 50), valid))
Stretched = with_predict(lambda outputs, size, _: nn.functional.interpolate(outputs, size, mode="bilinear"))
HalfScores = with_predict(lambda outputs, *given: upsample(outputs, *given).to(outputs.dtype))


class OneClassMore(Cells):
    def __init__(self, in_dim, num_layers, num_classes):
        super().__init__(in_dim, num_layers, num_classes + 1)


class ClassesFirst(Pixels):
    def forward(self, features):
        return super().forward(features).transpose(0, 1)

    def predict(self, outputs, size, valid):
        return super().predict(outputs.transpose(0, 1), size, valid)


class UnusedOutput(Pixels):
    def __init__(self, in_dim, num_layers, num_classes):
        super().__init__(in_dim, num_layers, num_classes)
        self.edges = nn.Conv2d(in_dim, 1, 1)


class EdgeOutput(UnusedOutput):
    """A second output that only a loss reads."""

    def forward(self, features):
        return {"scores": super().forward(features), "edges": self.edges(features[0])}

    def predict(self, outputs, size, valid):
        return super().predict(outputs["scores"], size, valid)


@pytest.mark.parametrize(
    ("head", "sizes"),
    [(Cells, {}), (Cells, {"num_layers": 3, "num_classes": 5}), (Pixels, {}), (EdgeOutput, {})],
)
def test_a_head_that_keeps_its_contract_passes(head, sizes):
    check_head(head, **sizes)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Identity, "it must inherit dinoseg.core.contracts.Head, .* derive the class"),
        (with_features(lambda part: part.mul_(2)), "must not change its input"),
        (OneClassMore, r"must return float32 scores of shape \(1, 3, 37, 50\) .* but .*\(1, 4, 37, 50\); resize"),
        (ImageSizeOnly, r"size=\(23, 61\).*scores of shape \(1, 3, 23, 61\) .* but .*\(1, 3, 37, 50\)"),
        (with_predict(lambda *given: upsample(*given).double()), "must return float32 .* returned torch.float64"),
        (with_members(mixture=True), r"and at least 0 with `mixture`, but for size=\(37, 50\) they are not"),
        (with_features(lambda part: part / 0), "class scores must be finite"),
        (Stretched, r"`predict` must crop the padding, .* for \(37, 50\) are not the top left of those for \(40, 56\)"),
        (with_members(Pixels, grid_scores=lambda _, outputs: 2 * outputs), AGREE),
        (with_members(Pixels, weighted_masks=mask_each_class), AGREE),
        (ClassesFirst, r"outputs must be tensors \(B, ...\).* put the batch first"),
        (HalfScores, "must return float32 scores .* in any precision, but it returned torch.bfloat16"),
        (with_features(lambda part: part - part.mean(0)), "the same results alone and in a batch"),
        (UnusedOutput, "edges.weight, edges.bias got no gradient"),
    ],
)
def test_a_head_that_breaks_a_rule_is_refused(head, message):
    with pytest.raises(AssertionError, match=f"^{head.__name__}: .*{message}"):
        check_head(head)


def test_a_head_is_checked_on_a_backbone_of_its_own(tiny_backbone):
    backbone = tiny_backbone((0, 1))
    check_head(partial(Cells), backbone)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
