"""Credentials in URLs: found, and removed from text."""

import re

# scheme://USER:PASSWORD@ or scheme://TOKEN@. A password may hold unescaped / ? # and @: what follows the first colon is
# a password, unless it is a port. [ begins an IPv6 address.
_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^/\s?#:@[]*:(?!\d+(?:[/?#]|$))\S*@|[^/\s?#]*@)")


def has_credentials(text: str) -> bool:
    """Return whether text holds a URL with a user or a password, such as `https://USER:PASSWORD@HOST`."""
    return _CREDENTIALS.search(text) is not None


def without_credentials(text: str) -> str:
    """Return text with users and passwords removed from its URLs.

    Everything up to the last @ of a URL with a colon is removed, as an unescaped password may hold any character.
    """
    return _CREDENTIALS.sub(r"\1", text)
