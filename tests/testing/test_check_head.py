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


class NoContract(nn.Module):
    def __init__(self, in_dim, num_layers, num_classes):
        super().__init__()


class InPlace(Cells):
    def forward(self, features):
        return super().forward([part.mul_(2) for part in features])


class OneClassMore(Cells):
    def __init__(self, in_dim, num_layers, num_classes):
        super().__init__(in_dim, num_layers, num_classes + 1)


class ImageSizeOnly(Pixels):
    def predict(self, outputs, size, valid):
        return upsample(outputs, (37, 50), valid)


class DoubleScores(Pixels):
    def predict(self, outputs, size, valid):
        return super().predict(outputs, size, valid).double()


class NegativeMixture(Cells):
    mixture = True


class DivisionByZero(Cells):
    def forward(self, features):
        return super().forward(features) / 0


class Stretched(Pixels):
    def predict(self, outputs, size, valid):
        return nn.functional.interpolate(outputs, size, mode="bilinear")


class OtherGrid(Pixels):
    def grid_scores(self, outputs):
        return 2 * outputs


class OtherMasks(Pixels):
    def weighted_masks(self, outputs):
        return WeightedMasks(outputs, torch.eye(3).expand(len(outputs), 3, 3))


class ClassesFirst(Pixels):
    def forward(self, features):
        return super().forward(features).transpose(0, 1)

    def predict(self, outputs, size, valid):
        return super().predict(outputs.transpose(0, 1), size, valid)


class HalfScores(Pixels):
    def predict(self, outputs, size, valid):
        return super().predict(outputs, size, valid).to(outputs.dtype)


class BatchMean(Cells):
    def forward(self, features):
        return super().forward([part - part.mean(0) for part in features])


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


class TwoImages(Cells):
    min_batch_size = 2

    def __init__(self, in_dim, num_layers, num_classes):
        super().__init__(in_dim, num_layers, num_classes)
        self.norm = nn.BatchNorm1d(in_dim)

    def forward(self, features):
        pooled = self.norm(features[0].mean((2, 3)))
        return super().forward([features[0] + pooled[:, :, None, None]])


@pytest.mark.parametrize("head", [Cells, Pixels, EdgeOutput, TwoImages])
def test_a_head_that_keeps_its_contract_passes(head):
    check_head(head)


def test_several_maps_and_another_number_of_classes():
    check_head(Cells, num_layers=3, num_classes=5)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (NoContract, "it must inherit dinoseg.core.contracts.Head, .* derive the class"),
        (InPlace, "must not change its feature maps"),
        (OneClassMore, r"must return float32 scores of shape \(1, 3, 37, 50\) .* but .*\(1, 4, 37, 50\); resize"),
        (ImageSizeOnly, r"size=\(23, 61\).*scores of shape \(1, 3, 23, 61\) .* but .*\(1, 3, 37, 50\)"),
        (DoubleScores, "must return float32 .* returned torch.float64"),
        (NegativeMixture, r"finite, and at least 0 with `mixture`, but for size=\(37, 50\) they are not"),
        (DivisionByZero, "class scores must be finite"),
        (Stretched, r"`predict` must crop the padding, .* for \(37, 50\) are not the top left of those for \(40, 56\)"),
        (OtherGrid, "`grid_scores` and `weighted_masks` must give the scores of `predict`"),
        (OtherMasks, "`grid_scores` and `weighted_masks` must give the scores of `predict`"),
        (ClassesFirst, r"outputs must be tensors \(B, ...\).* put the batch first"),
        (HalfScores, "must return float32 scores .* in any precision, but it returned torch.bfloat16"),
        (BatchMean, "the same results alone and in a batch"),
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
