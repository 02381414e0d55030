"""Credentials in URLs: found, and removed from text."""

import re

_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s?#]*@")  # scheme://USER:PASSWORD@


def has_credentials(text: str) -> bool:
    """Return whether text holds a URL with a user or a password, such as `https://USER:PASSWORD@HOST`."""
    return _CREDENTIALS.search(text) is not None


def without_credentials(text: str) -> str:
    """Return text with users and passwords removed from its URLs."""
    return _CREDENTIALS.sub(r"\1", text)
