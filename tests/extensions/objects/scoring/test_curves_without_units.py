"""The average precision without each unit, by shifts and by a curve for each unit."""

import numpy as np
import pytest

from dinoseg.extensions.objects.scoring import precision_curves
from dinoseg.extensions.objects.scoring.precision_curves import PrecisionCurves, leave_units_out


def draw_curves(seed):
    """Return curves of up to 40 units, some without predicted or reference objects, with ignored ones and few hits."""
    rng = np.random.default_rng(seed)
    units = rng.choice(99, rng.integers(1, 40), replace=False)
    holders = rng.choice(units, rng.integers(1, 80))
    owners = rng.choice(rng.permutation(units)[: max(1, len(units) // 2)], rng.integers(0, 120))
    positives = rng.random((len(holders), 4)) < rng.choice([0.1, 0.6, 1])
    hits = rng.random((len(owners), 4, 10)) < rng.choice([0.05, 0.5, 1])
    for unit in units:  # an object of the reference is hit once
        own = owners == unit
        hits[own] &= hits[own].cumsum(axis=0) <= positives[holders == unit].sum(axis=0)[:, None]
    misses = ~hits & (rng.random(hits.shape) < rng.choice([0.1, 0.9]))
    return PrecisionCurves(hits, misses, owners, positives, holders)


def test_shifted_curves_equal_new_ones(monkeypatch):
    monkeypatch.setattr(precision_curves, "_is_shifting_cheaper", lambda *_: True)
    for seed in range(200):
        monkeypatch.setattr(precision_curves, "_TABLE_SIZE", (1, 300, 2**22)[seed % 3])
        curves = draw_curves(seed)
        units, found = leave_units_out(curves)
        expected = [curves.average(without=unit) for unit in units]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("units", "shifted"), [(2000, True), (20, False)])
def test_many_small_units_are_shifted(monkeypatch, units, shifted):
    chosen = []
    monkeypatch.setattr(precision_curves, "_leave_out", lambda *sides: chosen.append(True) or np.zeros(units))
    owners = np.arange(2000) % units
    flags = np.ones((2000, 4, 10), bool)
    leave_units_out(PrecisionCurves(flags, ~flags, owners, flags[:, :, 0], owners))
    assert bool(chosen) == shifted
