"""Validation of the factors of a weighted sum."""

import math
from collections.abc import Iterable, Mapping

from dinoseg.utils.errors import UserError


def checked_factors(factors: Mapping[str, float], terms: Iterable[str]) -> dict[str, float]:
    """Return one factor per term, in the order of the terms.

    Raises:
        UserError: a term without a factor, a factor without a term, or a factor that is not a number of at least 0.
    """
    names = list(terms)
    unknown = [name for name in factors if name not in names]
    if unknown:
        raise UserError(
            f"factors.{unknown[0]}={factors[unknown[0]]}: unknown term. The terms are "
            f"{', '.join(names)}: correct the name, or leave it out."
        )
    for name in names:
        if name not in factors:
            raise UserError(f"factors.{name} is not set: give every term a factor, such as 1.0.")
        value = factors[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"factors.{name}={value}: give a number of at least 0; 0 switches it off.")
    return {name: float(factors[name]) for name in names}
