"""A loss that keeps its contract passes, and one broken rule each is refused by the sentence of that rule."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from dinoseg.core.contracts import Loss
from dinoseg.testing import check_loss


class Entropy(Loss):
    """Cross-entropy, averaged over the labelled pixels."""

    def __init__(self, ignore_index=255):
        super().__init__()
        self.ignore_index = ignore_index

    def costs(self, logits, labels):
        return cross_entropy(logits, labels, reduction="none")

    def logits(self, prediction, size):
        return prediction.logits(size)

    def forward(self, prediction, batch):
        labelled = batch.mask != self.ignore_index
        costs = self.costs(self.logits(prediction, batch.mask.shape[-2:]), batch.mask.long() * labelled)
        weight = labelled.sum()
        return (costs * labelled).sum() / weight.clamp(min=1), {"weight": weight}


class PerImage(Entropy):
    """Cross-entropy as the mean of those of the images."""

    def forward(self, prediction, batch):
        means = [super(PerImage, self).forward(prediction.of_images(slice(n, n + 1)), part)[0]
                 for n, part in enumerate(batch.split(len(batch.names)))]  # fmt: skip
        return torch.stack(means).mean(), {}


class PlainWeights(Entropy):
    def __init__(self, class_weights):
        super().__init__()
        self.class_weights = class_weights


def with_members(**members):
    return type("Changed", (Entropy,), members)


def with_result(change):
    """Return a loss that returns something else of its prediction, mean and parts."""
    return with_members(forward=lambda self, *given: change(given[0], *Entropy.forward(self, *given)))


def with_forward(mean):
    """Return a loss whose mean is a function of the logits at full size and the mask."""
    return with_members(
        forward=lambda _, given, batch: (mean(given.logits(batch.mask.shape[-2:]), batch.mask.long()), {})
    )


def pixel_costs(logits, mask):
    return cross_entropy(logits, mask % 3, reduction="none")


def mean_of_labelled(logits, mask):
    return cross_entropy(logits, mask, ignore_index=255)


def log_of_softmax(_, logits, labels):
    return -logits.softmax(1).gather(1, labels[:, None])[:, 0].log()


NoWeight = with_result(lambda _, mean, parts: (mean, {}))
HalfPrecision = with_result(lambda prediction, mean, parts: (mean.to(prediction.outputs.dtype), parts))
SinglePrecision = with_members(logits=lambda _, prediction, size: prediction.logits(size).float())


class InPlace(Entropy):
    def forward(self, prediction, batch):
        batch.mask[batch.mask == self.ignore_index] = 0
        return super().forward(prediction, batch)


class FirstImage(Entropy):
    sums_over_batch = True

    def forward(self, prediction, batch):
        value, parts = super().forward(prediction, batch)
        return value + super().forward(prediction.of_images(slice(1)), batch.split(len(batch.names))[0])[0], parts


class DetachedWeight(Entropy):
    """Focal costs whose factor has no gradient."""

    def costs(self, logits, labels):
        costs = super().costs(logits, labels)
        return costs * (1 - (-costs.detach()).exp())


@pytest.mark.parametrize("loss", [Entropy, PerImage, type("Sums", (NoWeight,), {"sums_over_batch": True})])
def test_a_loss_that_keeps_its_contract_passes(loss):
    check_loss(loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.nn.Identity, "it must inherit dinoseg.core.contracts.Loss"),
        (with_members(needs={"mask"}), r"`needs` must name outputs of LossCase \(layers, masks\), but it is mask;"),
        (PlainWeights, "but PlainWeights.class_weights would stay; use self.register_buffer"),
        (with_result(lambda _, mean, parts: mean), "a dict of named parts, but it returned a Tensor"),
        (with_forward(pixel_costs), "the mean must be a finite scalar"),
        (
            with_result(lambda _, mean, parts: (mean, {**parts, "entropy": mean})),
            "parts must be scalar tensors without a gradient, but entropy is not",
        ),
        (InPlace, "must not change its inputs"),
        (with_members(costs=log_of_softmax), "must be finite for scores of 1000, .* log_softmax"),
        (HalfPrecision, "must be finite and float32, but it is .* in torch.bfloat16"),
        (with_forward(lambda *given: pixel_costs(*given).mean()), "ignored pixels must get no gradient, but they do"),
        (
            with_result(lambda _, mean, parts: (0 * mean, parts)),
            "labelled pixels must get a gradient, but none does; .* `ignore_index` of the loss is 255",
        ),
        (with_forward(mean_of_labelled), "a batch of ignored pixels must give .* 0, but the loss is nan"),
        (FirstImage, "the order of the images must not change the loss"),
        (NoWeight, r"two batches must add up .*; return the divisor of the mean as parts\['weight'\]"),
        (with_members(divisor="pixels"), r"divisors\(batch\) must return parts\['weight'\] .*, but it is \[4.0\]"),
        (DetachedWeight, "must agree with finite differences in float64"),
        (SinglePrecision, "the mean of float64 outputs must be float64, but it is torch.float32"),
    ],
)
def test_a_loss_that_breaks_a_rule_is_refused(loss, message):
    with pytest.raises(AssertionError, match=f"^{loss.__name__}: .*{message}"):
        check_loss(loss)


def test_a_loss_that_ignores_another_id_is_refused():
    check_loss(partial(Entropy, ignore_index=9), ignore_index=9)
    with pytest.raises(AssertionError, match="ignored pixels must get no gradient"):
        check_loss(partial(Entropy, ignore_index=2), ignore_index=0)
