"""The benchmark of intervals: its BCa is scipy's, and its table comes without data."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dinoseg.evaluation.class_scores import ClassScores
from dinoseg.evaluation.scoring.intervals import leave_one_out

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import interval_coverage  # type: ignore[import-not-found]

    return interval_coverage


@pytest.mark.parametrize("units", [4, 12, 40])
def test_bca_is_scipys_on_the_same_draws(script, units):
    population = script.drawn_population(np.random.default_rng(units), 200)
    sums, kind = population.sums[:units, :18], ClassScores(6)

    def miou(places, axis=-1):
        return kind.scores(sums[places.astype(int)].sum(axis=-2))["miou"]

    places, options = np.arange(units, dtype=float), {"vectorized": True, "method": "BCa", "batch": 1}
    reference = stats.bootstrap((places,), miou, n_resamples=999, rng=np.random.default_rng(1), **options)
    left_out = leave_one_out(kind, sums)["miou"]
    value = float(kind.scores(sums.sum(axis=0))["miou"])
    found = script.bca_limits(reference.bootstrap_distribution, value, left_out)
    assert found == pytest.approx([*reference.confidence_interval], abs=1e-12)
    assert script.percentile_limits(reference.bootstrap_distribution) == pytest.approx(
        [
            *stats.bootstrap(
                (places,), miou, n_resamples=0, bootstrap_result=reference, method="percentile"
            ).confidence_interval
        ],
        abs=1e-12,
    )


def test_a_table_comes_without_data(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "UNITS", (5, 20))
    monkeypatch.setattr(script, "DRAWS", 20)
    monkeypatch.setattr(sys, "argv", ["interval_coverage.py", "--simulations", "4"])
    script.main()
    said = capsys.readouterr().out
    assert all(said.count(f"| {method} ") == 3 for method in script.METHODS) and "seeds left out" in said
