"""Validation of head options, also for callers from Python."""

from collections.abc import Iterable

from dinoseg.utils.errors import UserError


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise UserError(f"{name}={value} is unknown. Choose one of {', '.join(choices)}.")
