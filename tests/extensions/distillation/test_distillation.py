"""The divergence from a teacher's scores against all pixels at once in float64, sampled as it is written down."""

import math

import numpy as np
import pytest
import torch
from full_logits import all_logits, refuse_scores

from dinoseg.core.geometry import valid_share
from dinoseg.core.shapes import Prediction, WeightedMasks
from dinoseg.extensions.distillation.loss import TeacherView, divergence
from dinoseg.losses import full_resolution

K = 4


def bilinear(grid, down, along):
    """Return what lies between four cells, those of the border beyond it."""
    total = torch.zeros(len(grid), dtype=torch.float64)
    for row in (math.floor(down), math.floor(down) + 1):
        for column in (math.floor(along), math.floor(along) + 1):
            share = (1 - abs(down - row)) * (1 - abs(along - column))
            place = min(max(row, 0), grid.shape[1] - 1), min(max(column, 0), grid.shape[2] - 1)
            total = total + share * grid[:, place[0], place[1]]
    return total


def expected_divergence(scores, seen, matrices, image, size, temperature, covered=(1.0, 1.0)):
    """Return T^2 KL of scores (B, K, H, W) and the teacher's: the mean over pixels inside, then over the views."""
    means = []
    for own, teacher, matrix in zip(scores, seen, matrices, strict=True):
        total = own.sum() * 0
        count = 0
        back = np.linalg.inv(matrix)
        for y in range(size[0]):
            for x in range(size[1]):
                at_x, at_y, _ = back @ (x, y, 1.0)
                if not (-0.5 <= at_x <= image[1] - 0.5 and -0.5 <= at_y <= image[0] - 0.5):
                    continue
                down = (at_y + 0.5) * teacher.shape[1] * covered[0] / image[0] - 0.5
                along = (at_x + 0.5) * teacher.shape[2] * covered[1] / image[1] - 0.5
                log_p = (bilinear(teacher, down, along) / temperature).log_softmax(0)
                log_q = (own[:, y, x] / temperature).log_softmax(0)
                total = total + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
                count = count + 1
        means.append(total / max(count, 1))
    return torch.stack(means).mean()


def matrix(zoom=1.0, turn=0.0, shift=(0.0, 0.0), mirrored=None):
    cosine, sine = zoom * math.cos(turn), zoom * math.sin(turn)
    found = np.array([[cosine, -sine, shift[0]], [sine, cosine, shift[1]], [0, 0, 1]])
    return found if mirrored is None else np.array([[-1.0, 0, mirrored - 1], [0, 1, 0], [0, 0, 1]]) @ found


CASES = [  # the image, the teacher's grid, the view, the student's patch, where the view lies
    ((12, 16), (3, 4), (12, 16), 4, [matrix(), matrix(mirrored=16)]),
    ((12, 16), (3, 4), (9, 7), 4, [matrix(1.7, 0.3, (-3, 2.5)), matrix(0.6, -0.2, (1, 1), mirrored=7)]),
    ((13, 5), (13, 5), (11, 6), 5, [matrix(1.3, shift=(0.4, -2)), matrix(0.5)]),
    ((1, 1), (1, 1), (1, 1), 3, [matrix(), matrix(9.0)]),
    ((6, 6), (2, 9), (5, 9), 1, [matrix(shift=(90, 0)), matrix(2.0, 0.1)]),  # one view shows nothing of its image
    ((6, 6), (2, 2), (3, 3), 2, [matrix(shift=(0, 50))] * 2),  # none does
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(full_resolution, "ROWS", 4)
    monkeypatch.setattr(full_resolution, "CACHED", 4 * K * 5)


@pytest.mark.parametrize(("case", "temperature"), list(zip(CASES, [1.0, 4.0] * 3, strict=True)))
def test_value_and_gradient_are_those_of_all_pixels_at_once(case, temperature):
    image, cells, size, patch, matrices = case
    draw = torch.Generator().manual_seed(hash(case[:4]) % 2**31)
    shape = -(-size[0] // patch), -(-size[1] // patch)
    grid = (3 * torch.randn(2, K, *shape, dtype=torch.float64, generator=draw)).requires_grad_()
    teacher = 3 * torch.randn(2, K, *cells, dtype=torch.float64, generator=draw)
    valid = valid_share(size, patch)
    covered = (0.8, 0.95) if cells == (3, 4) else (1.0, 1.0)
    made = [TeacherView.of(own, covered, where, image) for own, where in zip(teacher, matrices, strict=True)]
    exact = [torch.linalg.inv(torch.from_numpy(where)) for where in matrices]
    height, width = image
    share = torch.tensor([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1]], dtype=torch.float64)
    seen = [TeacherView(one.scores, one.valid, share @ back) for one, back in zip(made, exact, strict=True)]
    for one, own in zip(made, seen, strict=True):
        assert torch.allclose(one.place.double(), own.place, atol=1e-5)
    value = divergence(Prediction(grid, size, valid, refuse_scores, grid=grid), seen, size, temperature)
    found = torch.autograd.grad(value, grid)[0]
    whole = grid.detach().requires_grad_()
    scores = all_logits(whole, size, valid)
    reference = expected_divergence(scores, teacher, matrices, image, size, temperature, covered)
    assert value.item() == pytest.approx(reference.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(found, torch.autograd.grad(reference, whole)[0], atol=1e-12)


def test_divergence_of_mixture_compares_its_logarithm():
    draw = torch.Generator().manual_seed(1)
    masks = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=draw).requires_grad_()
    shares = torch.rand(1, 3, K, dtype=torch.float64, generator=draw).requires_grad_()
    teacher = torch.randn(1, K, 2, 2, dtype=torch.float64, generator=draw)
    mixture = WeightedMasks(masks, shares)
    prediction = Prediction(None, (6, 5), (1.0, 1.0), refuse_scores, mixture=True, masks=mixture)
    value = divergence(prediction, [TeacherView.of(teacher[0].float(), (1.0, 1.0), matrix(), (6, 5))], (6, 5), 2.0)
    found = torch.autograd.grad(value, [masks, shares])
    scores = torch.einsum("qk,qhw->khw", shares[0], all_logits(masks, (6, 5), (1.0, 1.0))[0].sigmoid()).log()
    reference = expected_divergence(scores[None], teacher, [matrix()], (6, 5), (6, 5), 2.0)
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    for own, wanted in zip(found, torch.autograd.grad(reference, [masks, shares]), strict=True):
        assert torch.allclose(own, wanted, atol=1e-6)
