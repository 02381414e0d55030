import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import assert_refused

from dinoseg.core.geometry import upsample
from dinoseg.extensions.probe.sums import Sums, cell_labels, solve
from dinoseg.models.heads.linear import LinearHead

UGLY = [  # image, grid, share of the grid that the image covers
    ((13, 17), (3, 4), (13 / 15, 17 / 20)),
    ((24, 16), (3, 1), (1.0, 1.0)),
    ((7, 1), (2, 1), (1.0, 1.0)),
    ((1, 1), (1, 1), (1.0, 1.0)),
    ((4, 5), (4, 5), (1.0, 1.0)),  # each pixel is a cell
    ((3, 3), (5, 6), (1.0, 0.9)),  # fewer pixels than cells
]
WEIGHTINGS = torch.tensor([[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]], dtype=torch.float64)


def random_features(size, grid, images=3, dim=4, classes=3):
    torch.manual_seed(hash((size, grid)) % 1000)
    mask = torch.randint(0, classes + 1, (images, *size))
    return torch.randn(images, dim, *grid, dtype=torch.float64), mask.where(mask < classes, 255)


def sums_of(features, mask, valid, weightings=WEIGHTINGS):
    sums = Sums(features.shape[1], weightings)
    sums.add(features, cell_labels(mask, weightings, 255, features.shape[-2:], valid))
    return sums


def pixels(features, mask, valid):
    """Return features with a 1 behind them (P, D + 1), labels (P,) of all labelled pixels: each one brought up."""
    rows = F.pad(upsample(features, mask.shape[-2:], valid).permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1)
    return rows[mask.flatten() != 255], mask.flatten()[mask.flatten() != 255]


@pytest.mark.parametrize(("size", "grid", "valid"), UGLY)
def test_sums_over_cells_are_sums_over_all_pixels(size, grid, valid):
    features, mask = random_features(size, grid)
    sums, (rows, labels) = sums_of(features, mask, valid), pixels(features, mask, valid)
    for gram, weights in zip(sums.gram, WEIGHTINGS, strict=True):
        torch.testing.assert_close(gram, (rows * weights[labels, None]).T @ rows, rtol=0, atol=1e-8)
    torch.testing.assert_close(sums.cross, rows.T @ F.one_hot(labels, 3).double(), rtol=0, atol=1e-8)
    mean, variance = sums.statistics
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(mean, cells.mean(dim=0))
    torch.testing.assert_close(variance, cells.var(dim=0))
    single = Sums(4, WEIGHTINGS)  # of batches of one image
    for one in (slice(image, image + 1) for image in range(3)):
        single.add(features[one], cell_labels(mask[one], WEIGHTINGS, 255, grid, valid))
    for name, value in sums.tensors().items():
        torch.testing.assert_close(value, single.tensors()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strength", [1e-8, 1e-2, 1.0])
@pytest.mark.parametrize("cells", [(6, 5), (2, 2)])  # the latter: fewer cells than features
def test_solutions_are_those_of_least_squares(strength, cells):
    features, mask = random_features((24, 20), cells, dim=13)
    features = features * torch.linspace(0.1, 9, 13).double()[:, None, None] + 3
    rows, labels = pixels(features, mask, (1, 1))
    for weights, (found,) in zip(WEIGHTINGS, solve(sums_of(features, mask, (1, 1)), [strength]), strict=True):
        # rows of zeros that ask for small weights make least squares a ridge
        share = (weights[labels] / weights[labels].sum()).numpy()
        x = rows[:, :-1].numpy()
        y = F.one_hot(labels, 3).double().numpy()
        spread = np.sqrt(share @ (x - share @ x) ** 2)
        penalty = np.hstack([np.diag(spread) * strength**0.5, np.zeros((13, 1))])
        left = np.vstack([np.hstack([x, np.ones((len(x), 1))]) * share[:, None] ** 0.5, penalty])
        right = np.vstack([y * share[:, None] ** 0.5, np.zeros((13, 3))])
        expected = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(found.weight.numpy().T, expected[:-1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.bias.numpy(), expected[-1], rtol=1e-5, atol=1e-5)


def test_constant_features_and_absent_classes_get_zero_weights():
    features, mask = random_features((12, 12), (3, 3))
    features[:, 1], mask = 1e3, mask.where(mask != 2, 255)
    (found,) = next(solve(sums_of(features, mask, (1, 1)), [1e-3]))
    assert (found.weight[:, 1] == 0).all() and (found.weight[2] == 0).all() and found.bias[2] == 0
    assert found.weight[0].abs().max() > 0
    torch.testing.assert_close(found.weight[0], -found.weight[1])  # the scores of all classes add up to 1
    torch.testing.assert_close(found.bias.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_unsolvable_probe_is_refused():
    features, mask = random_features((12, 12), (3, 3))
    bare = sums_of(features, torch.full_like(mask, 255), (1, 1))
    assert_refused(lambda: list(solve(bare, [1.0])), "No pixel of the training masks is labelled")
    features[0, 0, 0, 0] = torch.inf
    infinite = sums_of(features, mask, (1, 1))
    assert_refused(lambda: list(solve(infinite, [1.0])), "Features are not finite")
    mask[0, 0, 0] = 7
    said = "id 7, which is neither one of the classes 0..2"
    assert_refused(lambda: sums_of(features, mask, (1, 1)), said)


def test_linear_head_reproduces_the_solved_weights():
    torch.manual_seed(0)
    head = LinearHead(5, 2, 3, init="probe")
    x = torch.randn(2, 10, 4, 4) * 7 + 2
    weight, bias = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    head(list(x.split(5, dim=1)))  # which moves the running means
    head.start(weight, bias, x.mean(dim=(0, 2, 3)).double(), x.var(dim=(0, 2, 3)).double())
    expected = torch.einsum("kd,bdhw->bkhw", weight, x.double()) + bias[:, None, None]
    torch.testing.assert_close(head.eval()(list(x.split(5, dim=1))).double(), expected, rtol=1e-4, atol=1e-4)
    # of all images at once, training's own statistics are these
    torch.testing.assert_close(head.train()(list(x.split(5, dim=1))).double(), expected, rtol=2e-2, atol=0.2)
