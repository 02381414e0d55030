import pytest
import torch
from mistakes import assert_refused

from dinoseg.losses.class_weights import class_weights

COUNTS = [700_000, 200_000, 100_000, 0]
NAMES = ["road", "car", "pole", "cat"]
INVERSE = [6 / 23, 21 / 23, 42 / 23, 1.0]  # ratios of 2 : 7 : 14, and a mean of 1 over the classes that occur


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        ("one_minus_frequency", [0.3, 0.8, 0.9, 1.0]),
        ("inverse", INVERSE),
        ("median", INVERSE),
        ({"pole": 3, "cat": 0.5}, [1.0, 1.0, 3.0, 0.5]),
        ({"car": 1e-6, "cat": 1e6}, [1.0, 1e-6, 1.0, 1e6]),
        ({}, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights_equal_those_by_hand(scheme, expected):
    torch.testing.assert_close(class_weights(COUNTS, NAMES, scheme), torch.tensor(expected))


def test_the_median_is_of_the_classes_that_occur():
    weights = class_weights([0, 0, 0, 100, 300, 600], list("abcdef"), "median")
    torch.testing.assert_close(weights, torch.tensor([1.0, 1, 1, 6 / 3, 2 / 3, 1 / 3]))
    assert class_weights([5], ["a"], "inverse").tolist() == [1.0]


def test_effective_number_by_hand():
    expected = torch.tensor([(1 - 0.9) / (1 - 0.9**n) for n in (70, 20, 10)])
    weights = class_weights(COUNTS, NAMES, "effective_number", beta=0.9)
    torch.testing.assert_close(weights[:3], expected / expected.mean())
    usual = class_weights(COUNTS, NAMES, "effective_number")
    assert bool(usual.isfinite().all()) and 0 < usual[0] < usual[1] < usual[2]


def test_names_that_are_numbers_to_yaml_are_known():
    assert class_weights([5, 5, 5], ["0", "1", "2.5"], {1: 3, 2.5: 2}).tolist() == [1.0, 3.0, 2.0]


@pytest.mark.parametrize("scheme", ["one_minus_frequency", "inverse", "median", "effective_number"])
def test_masks_without_labels_have_no_weights(scheme):
    assert_refused(lambda: class_weights([0, 0], ["a", "b"], scheme), f"scheme={scheme}: ", "no labelled pixel")
    assert class_weights([0, 0], ["a", "b"], "none").tolist() == [1.0, 1.0]
