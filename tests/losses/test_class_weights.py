import pytest
import torch

from dinoseg.losses.class_weights import SCHEMES, class_weights
from dinoseg.utils.errors import UserError

COUNTS = [700_000, 200_000, 100_000, 0]
NAMES = ["road", "car", "pole", "cat"]


def test_one_minus_frequency():
    torch.testing.assert_close(class_weights(COUNTS, NAMES, "one_minus_frequency"), torch.tensor([0.3, 0.8, 0.9, 1.0]))


def test_inverse_and_median_weights_have_exact_ratios_and_mean_1():
    for scheme in ("inverse", "median"):
        weights = class_weights(COUNTS, NAMES, scheme)
        torch.testing.assert_close(weights[1] / weights[0], torch.tensor(3.5))
        torch.testing.assert_close(weights[2] / weights[1], torch.tensor(2.0))
        torch.testing.assert_close(weights[:3].mean(), torch.tensor(1.0))
        assert weights[3] == 1


def test_the_median_is_of_the_classes_that_occur():
    weights = class_weights([0, 0, 0, 100, 300, 600], list("abcdef"), "median")
    torch.testing.assert_close(weights, torch.tensor([1.0, 1, 1, 6 / 3, 2 / 3, 1 / 3]))


def test_effective_number_by_hand():
    expected = torch.tensor([(1 - 0.9) / (1 - 0.9**n) for n in (70, 20, 10)])
    weights = class_weights(COUNTS, NAMES, "effective_number", beta=0.9)
    torch.testing.assert_close(weights[:3], expected / expected.mean())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_class_weights_are_finite_and_favour_rare_classes(scheme):
    weights = class_weights(COUNTS, NAMES, scheme)
    assert weights.dtype == torch.float32 and bool((weights > 0).all()) and bool(weights.isfinite().all())
    if scheme != "none":
        assert weights[0] < weights[1] < weights[2]


def test_a_single_class_set_is_allowed():
    assert class_weights([5], ["a"], "inverse").tolist() == [1.0]


def test_weights_by_name_are_used_unchanged():
    weights = class_weights(COUNTS, NAMES, {"pole": 3, "cat": 0.5})
    assert weights.tolist() == [1.0, 1.0, 3.0, 0.5] and weights.dtype == torch.float32
    assert class_weights(COUNTS, NAMES, {}).tolist() == [1.0] * 4
    assert class_weights(COUNTS, NAMES, {"car": 1e-6, "cat": 1e6}).tolist() == pytest.approx([1, 1e-6, 1, 1e6])


@pytest.mark.parametrize(
    "weight", [0, -1, float("nan"), float("inf"), True, "3", None, 1e39, 1e-46, 10**400, {"a": 1}, [3]]
)
def test_a_weight_by_name_is_a_number_above_0_that_float32_has(weight):
    with pytest.raises(UserError, match=r"^scheme: pole=.+ is not a weight. Give a number from 1e-06 to 1e\+06"):
        class_weights(COUNTS, NAMES, {"pole": weight})


def test_a_class_whose_name_is_a_number_to_yaml_is_weighed():
    assert class_weights([5, 5, 5], ["0", "1", "2.5"], {1: 3, 2.5: 2}).tolist() == [1.0, 3.0, 2.0]


def test_names_of_strangers_are_shown_in_one_short_line():
    with pytest.raises(UserError) as refused:
        class_weights([5] * 200, [f"class {number}" for number in range(200)], {"a\n\x1b" + "b" * 10**6: 2})
    said = str(refused.value)
    assert "\n" not in said and "\x1b" not in said and len(said) < 700 and "class 29 and 170 more" in said


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="^scheme: dog is not a class. The classes are road, car, pole, cat"):
        class_weights(COUNTS, NAMES, {"dog": 2.0})
    with pytest.raises(UserError, match="^scheme=best is unknown. Choose one of none, one_minus_frequency"):
        class_weights(COUNTS, NAMES, "best")
    with pytest.raises(UserError, match="no labelled pixel"):
        class_weights([0, 0], ["a", "b"], "inverse")
