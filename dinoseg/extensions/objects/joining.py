"""Objects of an image from those of overlapping windows."""

from collections.abc import Collection, Sequence

from dinoseg.core.objects import Objects


def join_instances(parts: Sequence[tuple[Objects, int, int]], size: tuple[int, int]) -> Objects:
    """Return the instances of an image of `size` (H, W) from those of windows, with their first row and column."""
    raise NotImplementedError


def join_segments(parts: Sequence[tuple[Objects, int, int]], size: tuple[int, int], things: Collection[int]) -> Objects:
    """Return the segments of an image of `size` (H, W) from those of windows, with their first row and column."""
    raise NotImplementedError
