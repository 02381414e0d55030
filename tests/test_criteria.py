from types import SimpleNamespace

import pytest
import torch

from dinoseg.experiment import criteria
from dinoseg.utils.errors import UserError

CAMVID = ("data=camvid", "data.root=x", "loss=cross_entropy")
SLOTS = ("trainer=slots", "head=slots", "loss=feature_reconstruction", "data=movi", "data.root=x")


def test_each_class_weighs_the_same_where_no_labels_are_counted(compose):
    plain, by_rarity = (compose(*CAMVID, f"loss.weights={weights}") for weights in ("none", "median"))
    names = [str(name) for name in plain.data.classes]
    unread = SimpleNamespace(classes=names)  # masks that nobody may read
    for loss in (criteria.unweighted(plain), criteria.unweighted(by_rarity), criteria.loss(plain, unread)):
        assert torch.equal(loss.weight, torch.ones(len(names)))
    with pytest.raises(TypeError, match="has no len"):  # it counts them
        criteria.loss(by_rarity, unread)


def test_a_loss_that_knows_no_classes_gets_no_weights(compose):
    cfg = compose(*SLOTS)
    assert criteria.unweighted(cfg).needs_slots and criteria.loss(cfg, None).needs_slots
    with pytest.raises(UserError, match="which clips have none of"):
        criteria.loss(compose(*CAMVID), None)
