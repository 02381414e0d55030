"""Objects of an image from those of overlapping windows: parts of one object that several windows see become one."""

from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.objects.overlaps import overlaps

MIN_IOU = 0.5  # of two parts of one object, within the pixels that both windows see
Part = tuple[Objects, int, int]  # objects of a window, and its first row and column


def join_instances(parts: Sequence[Part], size: tuple[int, int]) -> Objects:
    """Return the instances of an image from those of windows, best first.

    Two objects of different windows are one if they have the same class, an IoU of at least `MIN_IOU` within the
    pixels that both windows see, and if there each is the other's best; so are objects that are joined by others.
    Its mask is the union, and its score the mean weighted by the areas of the parts.

    Args:
        parts: objects of each window, and its first row and column.
        size: (H, W) of the image.
    """
    placed = _place(parts, size)
    groups = _find_groups(parts, placed, size)
    areas = placed.areas
    masks = [RunLengths.union([placed.masks[place] for place in group]) for group in groups]
    scores = np.array([np.average(placed.scores[group], weights=areas[group]) for group in groups])
    return Objects.of_runs(size, masks, [placed.classes[group[0]] for group in groups], scores).sort_by_score()


def join_segments(parts: Sequence[Part], size: tuple[int, int], things: Collection[int]) -> Objects:
    """Return the segments of an image from those of windows, best first.

    Things are joined as instances are. A pixel for which windows disagree belongs to the segment of the highest score,
    and the segments of a class of stuff are one.

    Args:
        parts: segments of each window, and its first row and column.
        size: (H, W) of the image.
        things: class ids; the others are stuff.
    """
    joined = join_instances(parts, size)
    is_thing = np.isin(joined.classes, [*things])
    stuff = [np.flatnonzero(~is_thing & (joined.classes == label)) for label in np.unique(joined.classes[~is_thing])]
    owners = np.arange(len(joined))
    for members in stuff:
        owners[members] = members[0]
    canvas = np.zeros(size, np.int64)
    # the best segment is painted last, and keeps its pixels
    for place in reversed(range(len(joined))):
        joined.masks[place].paint(canvas, 1 + owners[place])
    masks = RunLengths.of_ids(canvas)
    kept = np.array([*masks], np.int64) - 1
    return Objects.of_runs(size, [*masks.values()], joined.classes[kept], joined.scores[kept])


def place_runs(mask: RunLengths, height: int, size: tuple[int, int], top: int, left: int) -> RunLengths:
    """Return the runs of a mask of a height at a row and column of an image of `size` (H, W)."""
    first = mask.starts // height
    last = (mask.ends - 1) // height
    counts = np.where(mask.ends > mask.starts, last - first + 1, 0)  # a run may continue in the next columns
    before = np.cumsum(counts) - counts
    # each run is cut at the ends of its columns, which lie apart in the larger image
    columns = np.repeat(first - before, counts) + np.arange(counts.sum())
    starts = np.maximum(np.repeat(mask.starts, counts), columns * height) - columns * height
    ends = np.minimum(np.repeat(mask.ends, counts), (columns + 1) * height) - columns * height
    offset = (columns + left) * size[0] + top
    return RunLengths.union([RunLengths(starts + offset, ends + offset)])


def _place(parts: Sequence[Part], size: tuple[int, int]) -> Objects:
    """Return the objects of all windows as objects of the image, in the order of the windows."""
    masks = [place_runs(mask, each.size[0], size, top, left) for each, top, left in parts for mask in each.masks]
    classes = np.concatenate([objects.classes for objects, _, _ in parts])
    return Objects.of_runs(size, masks, classes, np.concatenate([objects.scores for objects, _, _ in parts]))


def _find_groups(parts: Sequence[Part], placed: Objects, size: tuple[int, int]) -> list[np.ndarray]:
    """Return the places of the parts of each object; a group of one is an object that one window sees."""
    ends = np.cumsum([len(objects) for objects, _, _ in parts])
    pairs = np.zeros((0, 2), np.int64)
    for first, second in combinations(range(len(parts)), 2):
        band = _find_band(parts[first], parts[second], size)
        if band is not None:
            sides = [np.arange(ends[side] - len(parts[side][0]), ends[side]) for side in (first, second)]
            pairs = np.concatenate([pairs, _match(placed, sides[0], sides[1], band)])
    # connected parts, not pairs: the outer windows of a long object have no pixel in common
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(placed), len(placed)))
    count, groups = connected_components(graph, directed=False)
    return [np.flatnonzero(groups == group) for group in range(count)]


def _find_band(first: Part, second: Part, size: tuple[int, int]) -> RunLengths | None:
    """Return the pixels that two windows have in common; None: there are none."""
    top = max(first[1], second[1])
    left = max(first[2], second[2])
    bottom = min(part[1] + part[0].size[0] for part in (first, second))
    right = min(part[2] + part[0].size[1] for part in (first, second))
    if top >= bottom or left >= right:
        return None
    columns = np.arange(left, right) * size[0]
    return RunLengths(columns + top, columns + bottom)


def _match(placed: Objects, first: np.ndarray, second: np.ndarray, band: RunLengths) -> np.ndarray:
    """Return the pairs (P, 2) of objects of two windows, at some places each, that are one object."""
    sides = [placed.select(first), placed.select(second)]
    common = overlaps(sides[0].masks, sides[1].masks)
    areas = [overlaps(side.masks, [band])[:, 0] for side in sides]
    unions = areas[0][:, None] + areas[1] - common
    is_same = sides[0].classes[:, None] == sides[1].classes
    ious = np.where(is_same, common / np.maximum(unions, 1), 0)
    if not ious.size:
        return np.zeros((0, 2), np.int64)
    # each must be the other's best: one large object would else join several small ones
    best = ious.argmax(axis=1)  # of equal IoUs, the object of the higher score
    rows = np.arange(len(first))
    is_pair = (ious[rows, best] >= MIN_IOU) & (ious.argmax(axis=0)[best] == rows)
    return np.stack([first, second[best]], axis=1)[is_pair]
