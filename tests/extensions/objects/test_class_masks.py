"""Class ids of models of instances: those of the highest `pixel_scores`."""

import pytest
import torch

from dinoseg.core.shapes import MaskOutputs, Prediction
from dinoseg.extensions.objects.tasks import InstanceTask
from dinoseg.models.heads.semantic import semantic_map, weighted_masks


def make_prediction(seed, things, background):
    torch.manual_seed(seed)
    outputs = MaskOutputs(torch.randn(2, 7, 5) * 2, torch.randn(2, 7, 6, 5) * 3)
    task = InstanceTask([*"abcd"], things, background)
    return Prediction(outputs, (37, 29), (0.9, 1.0), semantic_map, True, None, weighted_masks(outputs), task)


@pytest.mark.parametrize(("things", "background"), [(None, 0), (["a", "b"], 3), (None, None)])
def test_class_ids_are_those_of_the_highest_score(things, background):
    found = set()
    for seed in range(30):
        prediction = make_prediction(seed, things, background)
        scores = prediction.scores().double()
        best = scores.topk(2, dim=1)
        is_clear = best.values[:, 0] - best.values[:, 1] > 1e-5
        ids = prediction.class_ids()
        assert torch.equal(ids[is_clear].long(), best.indices[:, 0][is_clear]) and is_clear.float().mean() > 0.99
        both, logits = prediction.class_ids_and_logits((slice(3, 30, 2), slice(0, 29, 5)))
        assert torch.equal(both, ids)
        expected = prediction.logits()[:, :, 3:30:2, ::5]
        assert torch.allclose(logits.softmax(dim=1), expected.softmax(dim=1), atol=1e-5)
        found |= {*ids.unique().tolist()}
    assert found == ({0, 1, 3} if things else {0, 1, 2, 3})
