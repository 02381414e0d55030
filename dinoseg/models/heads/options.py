"""Validation of head options, also for callers from Python."""

from collections.abc import Iterable

from dinoseg.utils.errors import UserError


def check_positive(**values: int) -> None:
    """Refuse numbers below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"head.{name}={value}: give a whole number of at least 1.")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise UserError(f"head.{name}={value} is unknown. Choose one of {', '.join(choices)}.")
