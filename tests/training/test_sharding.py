"""What cannot be shared out over ranks is refused before they meet for it."""

import pytest
import torch
from tiny_parts import tiny_vit

from dinoseg.models.adapters import Full
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training import sharding
from dinoseg.utils.errors import UserError


class SlotHead(LinearHead):
    slots = "not None"


@pytest.mark.parametrize(
    ("head", "quantised", "said"), [(SlotHead, [], "slot models"), (LinearHead, ["a"], "4-bit and 8-bit layers")]
)
def test_model_that_cannot_be_sharded_is_refused(monkeypatch, head, quantised, said):
    monkeypatch.setattr(sharding, "quantised_names", lambda _: quantised)
    with pytest.raises(UserError, match=said):
        sharding.shard(SegmentationModel(Full()(tiny_vit()), head(24, 1, 3)), torch.device("cpu"), 2)
