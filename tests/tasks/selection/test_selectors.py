"""What each selector chooses, against its definition written out, on ordinary and on degenerate sets of features."""

import itertools
import math

import numpy as np
import pytest

from dinoseg.tasks.selection.k_centre import KCentre
from dinoseg.tasks.selection.random_order import RandomOrder
from dinoseg.tasks.selection.selector import Known
from dinoseg.tasks.selection.typical import Typical, k_means
from dinoseg.tasks.selection.uncertainty import Uncertainty
from dinoseg.utils.errors import UserError

SETS = {
    "spread": (40, 5, False),
    "few": (6, 3, False),
    "alike": (25, 4, True),  # each point several times
    "one": (1, 2, False),
}


def known(name, labelled=(), doubts=False, seed=0):
    count, width, twins = SETS[name]
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(count, width))
    if twins:
        points = points[draw.integers(0, 5, count)]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points.setflags(write=False)
    return Known([f"im{n}" for n in range(count)], list(labelled), points, draw.random((count, 2)) if doubts else None)


def chosen(picks):
    indices = [pick.position for pick in picks]
    assert len(set(indices)) == len(indices) and all(pick.reason for pick in picks)
    return indices


def farthest(points, centres, among, count):
    """Go by the definition, with Python's own arithmetic."""
    centres, picks = list(centres), []
    mean = [math.fsum(points[i][d] for i in among) / len(among) for d in range(points.shape[1])]
    for _ in range(count):
        rest = [i for i in among if i not in picks]
        if centres:
            far = [min(math.dist(points[i], points[c]) for c in centres) for i in rest]
            best = rest[max(range(len(rest)), key=lambda at: (round(far[at], 9), -at))]
        else:
            near = [math.dist(points[i], mean) for i in rest]
            best = rest[min(range(len(rest)), key=lambda at: (round(near[at], 9), at))]
        picks.append(best)
        centres.append(best)
    return picks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "labelled", "count"), [("spread", (), 9), ("spread", (3, 17), 38), ("few", (0,), 5)])
def test_k_centre_takes_the_farthest(name, labelled, count, seed):
    given = known(name, labelled, seed=seed)
    assert chosen(KCentre().choose(given, count, 0)) == farthest(given.features, labelled, given.free.tolist(), count)


def test_k_centre_covers_within_twice_the_best():
    given = known("few")
    radius = lambda centres: max(min(math.dist(p, given.features[c]) for c in centres) for p in given.features)  # noqa: E731
    best = min(map(radius, itertools.combinations(range(6), 2)))
    assert radius(chosen(KCentre().choose(given, 2, 0))) <= 2 * best


@pytest.mark.parametrize("selector", [KCentre(), Typical(), RandomOrder(), Uncertainty()])
@pytest.mark.parametrize(("name", "labelled"), [("alike", ()), ("alike", (0, 1, 2)), ("one", ()), ("few", (5,))])
def test_all_that_is_not_labelled_can_be_asked_for(selector, name, labelled):
    given = known(name, labelled, doubts=True)
    assert sorted(chosen(selector.choose(given, len(given.free), 3))) == given.free.tolist()
    again = selector.choose(given, len(given.free), 3)
    assert again == selector.choose(known(name, labelled, doubts=True), len(given.free), 3)


def test_equal_images_are_taken_in_their_order():
    points = np.tile([[1.0, 0.0]], (5, 1))
    given = Known(list("abcde"), [1], points, np.full((5, 2), 0.5))
    for selector in (KCentre(), Typical(), Uncertainty()):
        assert chosen(selector.choose(given, 3, 0)) == [0, 2, 3]


def test_typical_images_are_the_densest_of_clusters_without_a_label():
    draw = np.random.default_rng(1)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    sizes = (8, 12, 5, 9)
    points = np.concatenate([c + draw.normal(size=(n, 2)) for c, n in zip(centres, sizes, strict=True)])
    starts = np.cumsum([0, *sizes])
    labelled = [int(starts[1])]  # in the largest
    found = chosen(Typical(neighbours=3).choose(Known([str(n) for n in range(34)], labelled, points), 3, 0))

    def densest(first, last):
        mean = [np.mean(sorted(math.dist(points[i], points[j]) for j in range(first, last) if j != i)[:3])
                for i in range(first, last)]  # fmt: skip
        return first + int(np.argmin(mean))

    assert found == [densest(starts[at], starts[at + 1]) for at in (3, 0, 2)]  # the larger first


def test_one_typical_image_is_the_densest_of_all():
    given = known("spread")
    mean = [np.mean([math.dist(one, other) for other in given.features]) for one in given.features]
    for seed in range(4):
        assert chosen(Typical(neighbours=99).choose(given, 1, seed)) == [int(np.argmin(mean))]


@pytest.mark.parametrize("name", ["spread", "alike", "one"])
def test_clusters_are_those_of_the_nearest_mean(name):
    points = known(name).features
    cluster = k_means(points, 4, 0)
    means = [points[cluster == each].mean(axis=0) for each in range(cluster.max() + 1)]
    assert cluster.max() + 1 <= 4 and sorted(set(cluster)) == list(range(len(means)))
    for point, own in zip(points, cluster, strict=True):
        assert math.dist(point, means[own]) <= min(math.dist(point, mean) for mean in means) + 1e-12


def test_uncertain_images_are_the_most_uncertain_that_differ():
    given = known("spread", (4,), doubts=True)
    for column, measure in enumerate(("entropy", "margin")):
        ranked = sorted(given.free.tolist(), key=lambda i: -given.uncertainty[i, column])
        alone = Uncertainty(measure, candidates=1).choose(given, 5, 0)
        assert sorted(chosen(alone)) == sorted(ranked[:5])
        spread = chosen(Uncertainty(measure, candidates=3).choose(given, 5, 0))
        assert spread == farthest(given.features, [4], sorted(ranked[:15]), 5)
    assert alone[0].reason.startswith("margin 0.") and "rank" in alone[0].reason
    first = Uncertainty().choose(known("spread", doubts=True), 3, 0)[0]
    assert first.position == int(np.argmax(given.uncertainty[:, 0]))
    assert "rank 1 of 40; the most uncertain" in first.reason


def test_drawn_images_are_the_seed_s_alone():
    given = known("spread", (0,))
    assert chosen(RandomOrder().choose(given, 4, 0)) == chosen(RandomOrder().choose(given, 9, 0))[:4]
    assert chosen(RandomOrder().choose(given, 9, 0)) != chosen(RandomOrder().choose(given, 9, 1))


def test_another_measure_is_refused():
    with pytest.raises(UserError, match=r"selection\.measure=variance is unknown\. Choose one of entropy, margin"):
        Uncertainty("variance")
