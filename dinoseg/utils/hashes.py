"""Hashes of settings. Imports only the standard library."""

import hashlib

KEY_LENGTH = 32


def hash_of(*parts: object) -> str:
    """Return a hash of numbers, strings, and tuples of them."""
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:KEY_LENGTH]
