import pytest

from dinoseg.core.sizes import evenly_spaced


@pytest.mark.parametrize(
    ("length", "count", "indices"),
    [
        (0, 3, []),
        (1, 3, [0]),
        (5, 1, [0]),
        (5, 2, [0, 4]),
        (5, 3, [0, 2, 4]),
        (4, 9, [0, 1, 2, 3]),
        (101, 5, [0, 25, 50, 75, 100]),
    ],
)
def test_evenly_spaced_indices(length, count, indices):
    assert evenly_spaced(length, count) == indices


def test_evenly_spaced_indices_differ_and_reach_both_ends():
    for length in range(2, 40):
        for count in range(2, 50):
            found = evenly_spaced(length, count)
            assert found == sorted({*found}) and len(found) == min(count, length)
            assert (found[0], found[-1]) == (0, length - 1)
