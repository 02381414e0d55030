import numpy as np
import pytest
from plain_insid3 import average_linkage, bilinear, scores_of

from dinoseg.extensions.example.insid3 import (
    ReferencePatches,
    TargetPatches,
    choose_concepts,
    enlarge_ids,
    find_candidates,
    find_clusters,
    match,
    normalise,
    reduce_mask,
    resize_bilinear,
)


def draw_features(rng, count, centres):
    """Return normalised features near some centres, raw and without their part along one direction."""
    raw = normalise(
        centres[rng.integers(len(centres), size=count)] + rng.uniform(0.2, 1.2) * rng.normal(size=(count, 6))
    )
    return raw, normalise(raw * [0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("seed", range(40))
def test_scores_equal_plain_loops(seed):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(3, 6))
    shots = [(draw_features(rng, 20, centres)[1], rng.random((2, 20)) < 0.4) for _ in range(1 + seed % 4)]
    shots[0][1][0, 0] = True
    if seed % 3 == 0:
        shots[-1][1][1] = False  # which has one concept at most
    raw, features = draw_features(rng, 24, centres if seed % 5 else -centres)
    tau = (0.6, 0.3)[seed % 2]
    found = match([ReferencePatches(*shot) for shot in shots], TargetPatches.of(raw, features, tau))
    for concept in (0, 1):
        having = [(others, masks[concept]) for others, masks in shots if masks[concept].any()]
        expected = scores_of(having, raw, features, tau) if having else np.zeros(24)
        np.testing.assert_allclose(found[concept], expected, atol=1e-12)
    clusters = {tuple(sorted(cluster)) for cluster in average_linkage(raw, 1 - tau)}
    numbers = find_clusters(raw, tau)
    assert {tuple(np.flatnonzero(numbers == number)) for number in numbers} == clusters


def test_clusters_merge_below_the_threshold_only():
    quarter = np.array([[1.0, 0.0], [0.0, 1.0]])  # a distance of exactly 1
    assert len(set(find_clusters(quarter, tau=0.0))) == 2
    assert len(set(find_clusters(quarter, tau=0.0 - 1e-9))) == 1
    assert find_clusters(quarter[:1]).tolist() == [0]


def test_candidates_need_half_of_the_votes():
    votes = np.array([[True, True, False, True], [False, True, False, True]])
    assert find_candidates(np.array([0.1, 0.1, 0.1, -0.1]), votes).tolist() == [True, True, False, False]
    ranks = find_candidates(-np.arange(1.0, 12), np.ones((1, 11), bool))  # none is positive: above the 0.9 quantile, -2
    assert np.flatnonzero(ranks).tolist() == [0]


@pytest.mark.parametrize(("size", "seen", "grid"), [((48, 32), (48, 32), (3, 2)), ((37, 51), (32, 64), (2, 4))])
def test_masks_are_reduced_as_plain_loops(size, seen, grid):
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.7):
        mask = rng.random(size) < share
        near = np.array(
            [[mask[y * size[0] // seen[0], x * size[1] // seen[1]] for x in range(seen[1])] for y in range(seen[0])]
        )
        expected = bilinear(near, grid) > 0.5
        found = reduce_mask(mask, seen, grid)
        assert np.array_equal(found, expected) or not expected.any()


def test_a_small_object_has_one_patch():
    mask = np.zeros((64, 64), bool)
    assert not reduce_mask(mask, (64, 64), (4, 4)).any()
    mask[17:19, 35:37] = True  # in no centre and no corner of a patch
    assert np.argwhere(reduce_mask(mask, (64, 64), (4, 4))).tolist() == [[1, 2]]
    assert np.argwhere(reduce_mask(mask, (16, 16), (1, 1))).tolist() == [[0, 0]]
    mask[16, 32] = True  # a corner
    assert np.argwhere(reduce_mask(mask, (64, 64), (4, 4))).tolist() == [[1, 2]]


@pytest.mark.parametrize("size", [(48, 32), (13, 21), (3, 2)])
def test_ids_are_enlarged_as_plain_loops(size):
    ids = np.random.default_rng(1).integers(0, 3, (3, 4)).astype(np.uint8)
    shares = np.stack([bilinear(ids == number, size) for number in range(3)])
    np.testing.assert_allclose(resize_bilinear(ids, size), bilinear(ids, size), atol=1e-12)
    found = enlarge_ids(ids, size)
    clear = np.sort(shares, 0)[-1] - np.sort(shares, 0)[-2] > 1e-9
    assert found.dtype == np.uint8 and np.array_equal(found[clear], shares.argmax(0)[clear]) and clear.mean() > 0.5
    assert np.array_equal(enlarge_ids(np.minimum(ids, 1), size) > 0, bilinear(ids > 0, size) > 0.5)


def test_the_highest_score_above_alpha_wins():
    scores = np.array([[0.5, 0.2, 0.1, 0.3], [0.4, 0.1, 0.6, 0.3]])
    assert choose_concepts(scores).tolist() == [1, 0, 2, 1]
    assert choose_concepts(scores, alpha=0.55).tolist() == [0, 0, 2, 0]
