"""Questions about the methods of a class."""


def overrides_both(kind: type, name: str, other: str) -> bool:
    """Return whether the class that overrides the method `other`, or a subclass of it, also overrides `name`."""
    owner = next(base for base in kind.__mro__ if other in vars(base))
    return any(name in vars(base) for base in kind.__mro__[: kind.__mro__.index(owner) + 1])
