import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinoseg.core.shapes import MaskOutputs
from dinoseg.models.heads import semantic
from dinoseg.models.heads.semantic import semantic_map


def draw(batch, queries, columns, grid):
    generator = torch.Generator().manual_seed(0)
    classes = 4 * torch.randn(batch, queries, columns, generator=generator)
    return MaskOutputs(classes, 5 * torch.randn(batch, queries, *grid, generator=generator))


def at(grid, y, x):
    """Bilinear value of a 2-D array at a position, held constant outside it."""
    y, x = min(max(y, 0), grid.shape[0] - 1), min(max(x, 0), grid.shape[1] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
    upper = grid[top, left] * (1 - x + left) + grid[top, right] * (x - left)
    lower = grid[bottom, left] * (1 - x + left) + grid[bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def written_out(outputs, size, valid, no_object):
    classes = outputs.class_logits.double().numpy()
    masks = outputs.mask_logits.double().numpy()
    height, width = masks.shape[2] * valid[0], masks.shape[3] * valid[1]
    weights = np.exp(classes - classes.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    count = weights.shape[2] - no_object
    scores = np.zeros((len(masks), count, *size))
    for image, query, y, x in np.ndindex(*masks.shape[:2], *size):
        logit = at(masks[image, query], (y + 0.5) * height / size[0] - 0.5, (x + 0.5) * width / size[1] - 0.5)
        scores[image, :, y, x] += weights[image, query, :count] / (1 + np.exp(-logit))
    return torch.from_numpy(scores)


@pytest.mark.parametrize(
    ("grid", "size", "valid", "no_object"),
    [
        ((3, 4), (12, 16), (1.0, 1.0), True),
        ((4, 6), (13, 9), (13 / 16, 9 / 24), False),
        ((1, 1), (1, 1), (1 / 8, 1 / 8), True),
        ((8, 8), (8, 8), (1.0, 1.0), False),
        ((6, 10), (4, 7), (0.9, 0.71), True),
        ((2, 4), (1, 16), (0.125, 1.0), False),
    ],
)
def test_the_map_is_the_sum_over_queries_of_class_times_mask(monkeypatch, grid, size, valid, no_object):
    outputs = draw(2, 5, 4, grid)
    expected = written_out(outputs, size, valid, no_object)
    for budget, gradients in itertools.product((1, 2 * size[0] * size[1], 2**25), (True, False)):
        monkeypatch.setattr(semantic, "_AT_ONCE", budget)
        with torch.set_grad_enabled(gradients):
            found = semantic_map(outputs, size, valid, no_object)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


class Storages(TorchDispatchMode):
    """Keep every storage that is made, so that none is given again."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                self.found[storage.data_ptr()] = storage
        return made


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_inference_allocates_only_the_resulting_semantic_map(monkeypatch, inference):
    monkeypatch.setattr(semantic, "_AT_ONCE", 3 * 20 * 30)
    outputs = draw(2, 7, 6, (4, 6))
    with inference(), Storages() as storages:
        found = semantic_map(outputs, (20, 30), (1.0, 1.0))
    one_map = 5 * 20 * 30 * 4
    large = [storage for storage in storages.found.values() if storage.nbytes() >= one_map]
    assert [(storage.data_ptr(), storage.nbytes()) for storage in large] == [(found.data_ptr(), 2 * one_map)]
    torch.testing.assert_close(found, semantic_map(outputs, (20, 30), (1.0, 1.0)))


def test_gradients_are_those_of_the_whole_sum_at_once(monkeypatch):
    monkeypatch.setattr(semantic, "_AT_ONCE", 2 * 9 * 11)
    outputs = draw(2, 5, 4, (3, 4))
    weight = torch.randn(2, 3, 9, 11)
    gradients = []
    for whole in (False, True):
        classes = outputs.class_logits.clone().requires_grad_()
        masks = outputs.mask_logits.clone().requires_grad_()
        if whole:
            pixels = torch.nn.functional.interpolate(masks, (9, 11), mode="bilinear").sigmoid()
            found = (classes.softmax(-1)[..., :-1, None, None] * pixels[:, :, None]).sum(1)
        else:
            found = semantic_map(MaskOutputs(classes, masks), (9, 11), (1.0, 1.0))
        (found * weight).sum().backward()
        gradients.append((classes.grad, masks.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_half_precision_around_it_changes_nothing():
    outputs = draw(1, 6, 4, (5, 7))
    low = MaskOutputs(outputs.class_logits.bfloat16(), outputs.mask_logits.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = semantic_map(low, (11, 13), (0.8, 0.9))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), written_out(low, (11, 13), (0.8, 0.9), True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_scores_in_bfloat16_equal_metas_contraction(gradients):
    """facebookresearch/dinov3, dinov3/eval/segmentation/inference.py: both factors, and the result, are bfloat16."""
    outputs = draw(2, 40, 6, (5, 7))
    masks = torch.nn.functional.interpolate(outputs.mask_logits, (20, 28), mode="bilinear").sigmoid()
    classes = outputs.class_logits.softmax(-1)[..., :-1]
    expected = torch.einsum("bqc,bqhw->bchw", classes.bfloat16(), masks.bfloat16()).float()
    with torch.set_grad_enabled(gradients):
        found = semantic_map(outputs, (20, 28), (1.0, 1.0), dtype=torch.bfloat16)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    assert (found == expected).float().mean() > 0.99  # sums in another order may round to the neighbour
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
