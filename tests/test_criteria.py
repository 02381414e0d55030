from types import SimpleNamespace

import pytest
import torch

from dinoseg.experiment.builder import Builder
from dinoseg.utils.errors import UserError

CAMVID = ("data=camvid", "data.root=x", "loss=cross_entropy")
SLOTS = ("trainer=slots", "head=slots", "loss=feature_reconstruction", "data=movi", "data.root=x")


def test_each_class_weighs_the_same_where_no_labels_are_counted(compose):
    plain, by_rarity = (compose(*CAMVID, f"loss.weights={weights}") for weights in ("none", "median"))
    names = [str(name) for name in plain.data.classes]
    unread = SimpleNamespace(classes=names)  # masks that nobody may read
    for loss in (Builder(plain).unweighted_loss(), Builder(by_rarity).unweighted_loss(), Builder(plain).loss(unread)):
        assert torch.equal(loss.weight, torch.ones(len(names)))
    with pytest.raises(TypeError, match="has no len"):  # it counts them
        Builder(by_rarity).loss(unread)


def test_a_loss_that_knows_no_classes_gets_no_weights(compose):
    cfg = compose(*SLOTS)
    assert Builder(cfg).unweighted_loss().needs_slots and Builder(cfg).loss(None).needs_slots
    with pytest.raises(UserError, match="which clips do not have"):
        Builder(compose(*CAMVID)).loss(None)
