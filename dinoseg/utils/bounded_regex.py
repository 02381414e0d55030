"""Regular expressions from users or checkpoints, searched with a timeout."""

import regex

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_text

_LONGEST = 1000  # characters of an expression
_SECONDS = 1.0  # timeout for one name; a sound expression takes microseconds


class Pattern:
    """A regular expression whose search raises an error when it takes too long.

    Args:
        text: the expression.
        key: the config key that gives it, for errors.

    Raises:
        UserError: if it is too long, or no regular expression.
    """

    def __init__(self, text: str, key: str) -> None:
        self.named = f"{key}={format_text(text)}"
        if len(text) > _LONGEST:
            raise UserError(
                f"{self.named} has {len(text)} characters, above the limit of {_LONGEST}. Give a shorter one."
            )
        try:
            self._compiled = regex.compile(text)
        except (regex.error, OverflowError, RecursionError) as error:
            raise UserError(f"{self.named} is not a regular expression: {error}.") from None
        self.groups: int = self._compiled.groups

    def search(self, name: str) -> regex.Match[str] | None:
        """Return the first match in a name, or None.

        Raises:
            UserError: if the search times out.
        """
        try:
            return self._compiled.search(name, timeout=_SECONDS)
        except TimeoutError:
            raise UserError(
                f"{self.named} takes more than {_SECONDS:g} s on the name {format_text(name)}. Remove nested "
                "repetitions, such as (a+)+."
            ) from None
