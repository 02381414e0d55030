"""The rule of each range, which messages quote, states the numbers that the range allows."""

import math
import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
from mistakes import assert_refused

from dinoseg.utils import ranges

RULES = {
    name: rule
    for name, annotation in vars(ranges).items()
    for rule in get_args(annotation)
    if isinstance(rule, ranges.Range)
}


@pytest.mark.parametrize("name", RULES)
def test_rule_states_the_ends_of_its_range(name):
    rule = RULES[name]
    words = rule.rule.partition(" (")[0]  # without a remark
    least, most = rule.least, rule.most
    stated = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", words)]
    assert stated == [end for end in (least, most) if math.isfinite(end)]
    assert (least not in rule) == ("above" in words)
    assert (most not in rule) == ("below" in words)


def test_only_functions_are_given_for_functions():
    annotation = Callable[..., Any] | None
    for value in (None, len, dict):
        ranges.check_value("pack", value, annotation)
    for value, kind in ((5, "int"), ("os.system", "str"), ([len], "list of builtin_function_or_method")):
        said = f"is of type {kind}. Give a function or null."
        assert_refused(lambda value=value: ranges.check_value("pack", value, annotation), said)
