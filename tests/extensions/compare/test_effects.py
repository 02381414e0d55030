"""Main effects of swept settings: equal to a plain script, estimable or undefined, with their assumption stated."""

from itertools import product
from math import nan

import numpy as np
import pytest
from scipy import linalg, stats

from dinoseg.extensions.compare.effects import FOLD, SEED, estimate_effects

CASES = 200


def draw_design(rng):
    """Return the settings and scores of a sweep: seeds, folds, missing runs, runs without a score, aliased keys."""
    keys = {
        f"key{number}": [f"v{level}" for level in range(rng.integers(1, 5))] for number in range(rng.integers(1, 4))
    }
    if rng.random() < 0.3:
        keys[FOLD] = [str(fold) for fold in range(rng.integers(2, 4))]
    if rng.random() < 0.6:
        keys[SEED] = [str(seed) for seed in range(rng.integers(2, 4))]
    cells = [dict(zip(keys, values, strict=True)) for values in product(*keys.values())]
    effects = {(key, level): rng.normal() / 10 for key, levels in keys.items() if key != SEED for level in levels}
    scores = [0.7 + sum(effects.get(each, 0) for each in cell.items()) + rng.normal() / 50 for cell in cells]
    missing = rng.choice([0, 0, 0.2, 0.5])
    scores = [[None, nan][rng.integers(2)] if rng.random() < missing / 2 else score for score in scores]
    if rng.random() < 0.15:  # all runs of a level have failed
        level = rng.choice(keys["key0"])
        scores = [None if cell["key0"] == level else score for cell, score in zip(cells, scores, strict=True)]
    kept = [index for index in range(len(cells)) if rng.random() >= missing / 2] or [0]
    order = rng.permutation(kept)
    cells, scores = [cells[index] for index in order], [scores[index] for index in order]
    if rng.random() < 0.15:  # a key that always changes with another
        cells = [{**cell, "alias": f"of {cell['key0']}"} for cell in cells]
    return cells, scores


def plain_effects(cells, scores):
    """Return mean, difference, error and degrees of freedom by key and level: treatment coding, QR, null space.

    A contrast is determined if it is orthogonal to the null space of the model matrix.
    """
    known = [(cell, score) for cell, score in zip(cells, scores, strict=True) if score is not None and score == score]
    keys = [key for key in cells[0] if key != SEED]
    scored = {item for cell, _ in known for item in cell.items()}
    seen = {key: [v for v in dict.fromkeys(cell[key] for cell in cells) if (key, v) in scored] for key in keys}

    def code(shares):
        """Return the row of a run, from the share of each level of each key."""
        return [1.0] + [shares[key].get(level, 0) for key in keys for level in seen[key][1:]]

    if not known or not {*keys} - {FOLD}:
        return None
    model = np.array([code({key: {cell[key]: 1} for key in keys}) for cell, _ in known])
    target = np.array([score for _, score in known])
    free = linalg.null_space(model, rcond=1e-10)
    rank = model.shape[1] - free.shape[1]
    freedom = len(known) - rank
    if freedom == 0:
        return None
    _, _, pivots = linalg.qr(model, mode="economic", pivoting=True)
    columns = sorted(pivots[:rank])  # the others follow from these
    solution, *_ = linalg.lstsq(model[:, columns], target)
    rest = target - model[:, columns] @ solution
    inner = np.linalg.inv(model[:, columns].T @ model[:, columns])
    found = {}
    for key in keys:
        if key == FOLD:
            continue
        for level in seen[key]:
            shares = {other: {value: 1 / len(seen[other]) for value in seen[other]} for other in keys}
            here = np.array(code({**shares, key: {level: 1}}))
            there = np.array(code({**shares, key: {seen[key][0]: 1}}))

            def value(row, solution=solution):
                return None if np.abs(row @ free).max(initial=0) > 1e-8 else float(row[columns] @ solution)

            gap = here - there
            difference = None if level == seen[key][0] else value(gap)
            interval = None
            if difference is not None and freedom >= 3:
                reach = stats.t.ppf(0.975, freedom) * np.sqrt(
                    rest @ rest / freedom * (gap[columns] @ inner @ gap[columns])
                )
                interval = [difference - reach, difference + reach]
            found[key, level] = value(here), difference, interval
    return found, freedom


def about(value):
    return value if value is None else pytest.approx(value, rel=1e-7, abs=1e-9)


def test_effects_equal_a_plain_script_on_random_designs():
    kinds = {"none": 0, "one level": 0, "undetermined": 0, "no interval": 0, "interval": 0, "level without score": 0}
    for seed in range(CASES):
        cells, scores = draw_design(np.random.default_rng(seed))
        expected, (found, freedom) = plain_effects(cells, scores), estimate_effects(cells, scores)
        assert bool(found) == (expected is not None), seed
        if expected is None:
            kinds["none"] += 1
            continue
        assert freedom == expected[1], seed
        assert sorted((each.key, each.level) for each in found) == sorted(expected[0]), seed
        for each in found:
            mean, difference, interval = expected[0][each.key, each.level]
            assert (each.mean and each.mean.value) == about(mean), (seed, each)
            assert (each.difference and each.difference.value) == about(difference), (seed, each)
            assert (each.difference and each.difference.ci95) == about(interval), (seed, each)
            kinds["undetermined"] += mean is None
            kinds["interval" if interval else "no interval"] += 1
        kinds["one level"] += len({each.level for each in found if each.key == "key0"}) == 1
        kinds["level without score"] += len(found) < len(
            {item for cell in cells for item in cell.items() if item[0] not in (FOLD, SEED)}
        )
    assert min(kinds.values()) >= 8, kinds
