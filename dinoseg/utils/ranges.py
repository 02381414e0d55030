"""Value ranges of config keys, as annotations of signatures; `checks.check_arguments` enforces them."""

import math
import operator
from dataclasses import dataclass
from typing import Annotated, Any, SupportsIndex

from dinoseg.utils.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, described by `rule`.

    Args:
        rule: what to give, such as "a number above 0".
        least: the smallest number.
        most: the largest number.
        open_at: ends that are excluded.
    """

    rule: str
    least: float = -math.inf
    most: float = math.inf
    open_at: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        return self.least <= value <= self.most and value not in self.open_at


def whole_number(value: Any, name: str, rule: Range) -> int:
    """Return an argument as an int, which may be an integer of another library, such as NumPy's.

    Args:
        value: of the argument.
        name: of the argument.
        rule: its allowed values.

    Raises:
        UserError: it is no integer, or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or operator.index(value) not in rule:
        raise UserError(f"{name}={value}: give {rule.rule}.")
    return operator.index(value)


INTEGERS = Range("a whole number")
AT_LEAST_1 = Range("a whole number of at least 1", 1)
Count = Annotated[int, AT_LEAST_1]
Few = Annotated[int, Range("a whole number from 1 to 16", 1, 16)]
Natural = Annotated[int, Range("a whole number of at least 0", 0)]
Byte = Annotated[int, Range("a whole number from 0 to 255", 0, 255)]
Positive = Annotated[float, Range("a number above 0", 0, open_at=(0,))]
NotNegative = Annotated[float, Range("a number of at least 0", 0)]
Share = Annotated[float, Range("a number from 0 to 1", 0, 1)]
LowShare = Annotated[float, Range("a number of at least 0 and below 1", 0, 1, open_at=(1,))]
HighShare = Annotated[float, Range("a number above 0 and at most 1", 0, 1, open_at=(0,))]
Scale = Annotated[float, Range("a number above 0 and at most 16", 0, 16, open_at=(0,))]
HalfShare = Annotated[float, Range("a number from 0 to 0.5", 0, 0.5)]
Temperature = Annotated[float, Range("a number from 0.01 to 100", 0.01, 100)]
OpenShare = Annotated[float, Range("a number above 0 and below 1", 0, 1, open_at=(0, 1))]
LEARNING_RATES = Range("a number above 0 and at most 100", 0, 100, open_at=(0,))
LearningRate = Annotated[float, LEARNING_RATES]
RateFactor = Annotated[float, Range("a number from 0 to 100", 0, 100)]
# RGB statistics are those of images in 0..1: means in 0..1, standard deviations up to 0.5. A model that takes values of
# another scale expresses it by them, such as 0..255 by mean 0 and std 1 / 255.
MEANS = Range("a number from -1 to 2 (of images in 0..1; divide statistics of 0..255 by 255)", -1, 2)
DEVIATIONS = Range("a number from 0.001 to 10 (of images in 0..1; divide statistics of 0..255 by 255)", 0.001, 10)
ColourMean = Annotated[float, MEANS]
ColourStd = Annotated[float, DEVIATIONS]
