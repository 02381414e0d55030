import itertools

import numpy as np
import pytest

from dinoseg.metrics.assignment import best_assignment


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (4, 6), (0, 3)])
def test_no_other_assignment_has_a_greater_sum(shape):
    scores = np.random.default_rng(sum(shape)).normal(size=shape)
    columns = best_assignment(scores)
    assert len(set(columns.tolist())) == len(columns) == shape[0]
    sums = [
        sum(scores[row, each] for row, each in enumerate(p)) for p in itertools.permutations(range(shape[1]), shape[0])
    ]
    assert scores[np.arange(shape[0]), columns].sum() == pytest.approx(max(sums))


def test_impossible_assignment_is_refused():
    with pytest.raises(ValueError, match="3 rows cannot each have a column of their own among 2"):
        best_assignment(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="invalid"):
        best_assignment(np.array([[np.nan, 1.0], [0.0, 1.0]]))
