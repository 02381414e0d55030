"""Differences over units and seeds, against loops in plain Python and scipy's tests."""

import numpy as np
import pytest
from scipy import stats

from dinoseg.evaluation.scoring.intervals import Estimate, UnitScore, estimate_difference
from dinoseg.evaluation.unit_scores import ClassScores
from dinoseg.extensions.compare import comparison
from dinoseg.extensions.compare.comparison import (
    SideScores,
    _verdict,
    average_seeds,
    image_contributions,
    mean_scores,
    score_runs,
)

KIND = ClassScores(3)


def run_of(seed, units=9, better=0.0):
    """Return sums (U, 9): pixels that are right, of the reference (the same for all) and predicted."""
    reference = np.random.default_rng(0).integers(50, 500, (units, 3))
    draw = np.random.default_rng(seed)
    right = (reference * np.clip(draw.normal(0.6 + better, 0.1, reference.shape), 0, 1)).astype(int)
    return np.concatenate([right, reference, right + draw.integers(0, 60, reference.shape)], axis=1)


def differences(kind, sides):
    """Return the differences of sides of runs from the first."""
    scores = [score_runs(kind, side) for side in sides]
    return comparison.differences([SideScores(runs, average_seeds(runs)) for runs in scores])


def miou(run, units):
    ious = []
    for label in range(3):
        right, reference, predicted = (sum(int(run[unit][part + label]) for unit in units) for part in (0, 3, 6))
        ious.append(right / (reference + predicted - right))
    return sum(ious) / 3


def side_miou(side, units):
    return sum(miou(run, units) for run in side) / len(side)


@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (2, 1)])
def test_the_error_is_over_units_and_seeds(seeds):
    first, second = ([run_of(10 * side + seed) for seed in range(count)] for side, count in enumerate(seeds, start=1))
    found = differences(KIND, [first, second])[0]["miou"]
    units = range(9)
    value = side_miou(second, units) - side_miou(first, units)
    without = [side_miou(second, {*units} - {unit}) - side_miou(first, {*units} - {unit}) for unit in units]
    parts = [(8 / 9 * sum((each - sum(without) / 9) ** 2 for each in without), 8)]
    for side in (first, second):
        if len(side) > 1:
            parts.append((np.var([miou(run, units) for run in side], ddof=1) / len(side), len(side) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / each for part, each in parts)
    of_means = mean_scores(KIND, second)["miou"] - mean_scores(KIND, first)["miou"]
    assert found["value"] == pytest.approx(value) and found["value"] == pytest.approx(of_means)
    assert found["ci95"] == pytest.approx(stats.t.interval(0.95, freedom, value, variance**0.5))
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(value) / variance**0.5, freedom))


def test_verdicts_hold_together_over_sides_and_classes():
    sides = [[run_of(1)], [run_of(2, better=0.3)], [run_of(3, better=-0.3)], [run_of(4)]]
    found = differences(KIND, sides)
    said = ["significantly better", "significantly worse", "no significant difference"]
    assert [gaps["miou"]["verdict"] for gaps in found] == said
    alone = [differences(KIND, [sides[0], side])[0] for side in sides[1:]]
    assert found[2]["miou"]["p"] == alone[2]["miou"]["p"]  # the largest
    ratios = sorted(found[n]["miou"]["p"] / alone[n]["miou"]["p"] for n in (0, 1))
    assert ratios == [pytest.approx(2), pytest.approx(3)]
    assert all(found[n]["iou/0"]["ci95"] == alone[n]["iou/0"]["ci95"] for n in range(3))
    assert found[0]["iou/0"]["p"] > alone[0]["iou/0"]["p"]  # over the classes of all sides


def test_a_unit_that_one_side_alone_scores_counts():
    first = UnitScore(0.5, [0.4, 0.5, 0.6, 0.5], [True, False, True, False])
    second = UnitScore(0.7, [0.5, 0.6, 0.9, 0.7], [True, True, True, False])
    gap = estimate_difference([first], [second])
    assert gap.value == pytest.approx(0.2) and gap.freedom == 2
    assert gap.error == pytest.approx((2 / 3 * (2 * (0.1 - 0.5 / 3) ** 2 + (0.3 - 0.5 / 3) ** 2)) ** 0.5)


def test_one_unit_has_no_verdict_unless_seeds_have():
    first, second = ([run_of(10 * side + seed, units=1, better=0.1 * side) for seed in range(3)] for side in (1, 2))
    found = differences(KIND, [first[:1], second])[0]["miou"]
    assert found["ci95"] is found["p"] is None and found["verdict"] == "no verdict"
    found = differences(KIND, [first, second])[0]["miou"]
    scores = [[miou(run, [0]) for run in side] for side in (second, first)]
    assert found["p"] == pytest.approx(stats.ttest_ind(*scores, equal_var=False).pvalue)


def test_a_class_of_one_unit_has_no_verdict():
    runs = [run_of(seed) for seed in (1, 2)]
    for run in runs:
        run[1:, [1, 4, 7]] = 0
    found = differences(KIND, [[run] for run in runs])[0]
    assert found["iou/1"]["verdict"] == "no verdict" and found["iou/1"]["value"] is not None
    assert found["iou/0"]["p"] is not None
    for run in runs:
        run[:, [1, 4, 7]] = 0
    assert mean_scores(KIND, runs)["iou/1"] is differences(KIND, [[run] for run in runs])[0]["iou/1"]["value"] is None


@pytest.mark.parametrize(("units", "predicted"), [(1, 0), (9, 0), (9, 5)])
def test_a_class_that_seeds_never_see_has_no_score(units, predicted):
    first, second = ([run_of(10 * side + seed, units=units) for seed in range(2)] for side in (1, 2))
    for run in (*first, *second):
        run[:, [1, 4, 7]] = 0
    second[1][0, 7] = predicted  # by one seed, whose IoU is then 0, that of the others undefined
    found = differences(KIND, [first, second])[0]
    assert found["iou/1"] == {"value": None, "ci95": None, "p": None, "verdict": "no verdict"}
    assert found["iou/0"]["p"] is not None and found["miou"]["ci95"] is not None


def test_deciding_images_change_the_difference_most():
    first, second = [run_of(1), run_of(2)], [run_of(3, better=0.2)]
    units = range(9)
    whole = side_miou(second, units) - side_miou(first, units)
    expected = [whole - side_miou(second, {*units} - {unit}) + side_miou(first, {*units} - {unit}) for unit in units]
    counts = [[run.reshape(9, 3, 3) for run in side] for side in (first, second)]
    assert image_contributions(KIND, *counts) == pytest.approx(expected)
    assert image_contributions(KIND, *([each[:1] for each in side] for side in counts)) == [None]


def test_difference_is_significant_below_p_of_5_percent():
    cases = ((0.1, 0.049), (-0.1, 0.049), (0.1, 0.05), (0.1, None))
    said = [_verdict(Estimate(value), chance) for value, chance in cases]
    assert said == ["significantly better", "significantly worse", "no significant difference", "no verdict"]
