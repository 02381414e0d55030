import numpy as np
import pytest

from dinoseg.extensions.example.discriminant import SHRINKAGE, Discriminant, share_likelihoods
from dinoseg.extensions.example.insid3 import ReferencePatches, normalise


def log_likelihoods(shots, patch):
    """Return the log-density of a patch in each class (R,), by a Gaussian around each mean; -inf without patches."""
    classes = [
        [features[n] for features, masks in shots for n in np.flatnonzero(masks[number])]
        for number in range(len(shots[0][1]))
    ]
    shown = [np.array(each) for each in classes if each]
    spread = sum(sum(np.outer(x, x) for x in each - each.mean(0)) / len(each) for each in shown) / len(shown)
    spread = (1 - SHRINKAGE) * spread + SHRINKAGE * np.diag(spread).mean() * np.eye(len(spread))
    gaps = [patch - np.mean(each, axis=0) if each else None for each in classes]
    return np.array([-np.inf if gap is None else -gap @ np.linalg.inv(spread) @ gap / 2 for gap in gaps])


@pytest.mark.parametrize("seed", range(10))
def test_probabilities_equal_those_of_gaussians(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, size=(1 + seed % 3, 30))  # the class 2 in no shot
    centres = rng.normal(size=(4, 5))
    shots = [
        (normalise(centres[row] + rng.normal(size=(30, 5))), np.arange(4)[:, None] == np.where(row == 2, 0, row))
        for row in labels
    ]
    fitted = Discriminant([ReferencePatches(*shot) for shot in shots])
    patches = normalise(rng.normal(size=(20, 5)))
    likelihoods = np.exp([log_likelihoods(shots, patch) for patch in patches]).T
    expected = likelihoods / likelihoods.sum(0)
    assert fitted.classes.tolist() == [0, 1, 3] and not expected[2].any()
    np.testing.assert_allclose(share_likelihoods(fitted(patches)), expected[[0, 1, 3]], atol=1e-12)


def test_equal_patches_have_a_class():
    features = np.eye(3)[[0, 0, 1]]
    fitted = Discriminant([ReferencePatches(features, np.array([[True, True, False], [False, False, True]]))])
    assert fitted(features).argmax(0).tolist() == [0, 0, 1]
    assert share_likelihoods(fitted(features)).max(0) == pytest.approx(1)
