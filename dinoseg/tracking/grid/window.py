"""Windowed top-k matching of grid cells in tiles, without the full similarity matrix."""

import math
from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from dinoseg.tracking.grid.settings import MatchSettings
from dinoseg.utils.transfer import sent

# Cells per tile side. Small tiles compute fewer similarities outside their windows, large tiles need fewer calls.
# 8 was the fastest on a CPU with 60 x 107 cells and radius 12; a GPU needs larger tiles for parallelism.
_TILE_CPU, _TILE_GPU = 8, 16
ContextFrame = tuple[Tensor, Tensor]  # features (h, w, C) of unit length, labels (h, w, L)


def match(target: Tensor, frames: Sequence[ContextFrame], settings: MatchSettings) -> Tensor:
    """Return the labels (h, w, L) of a target (h, w, C), propagated from context frames that start with frame 0.

    Temporary memory is that of one tile's similarities: tile cells x frames x cells of the tile's surroundings.
    """
    height, width = target.shape[:2]
    tile = _TILE_CPU if target.device.type == "cpu" else _TILE_GPU
    labels = target.new_empty(height, width, frames[0][1].shape[2])
    corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
    areas = [(slice(top, min(top + tile, height)), slice(left, min(left + tile, width))) for top, left in corners]
    waits = target.device.type != "cpu"  # on a GPU, reading results synchronises: ties are checked once for all tiles
    tied = []
    for area in areas:
        labels[area], ties = _match_tile(target[area], area, frames, settings, untie=not waits)
        tied.append(ties)
    if waits:
        anywhere = torch.stack([ties.any() for ties in tied]).tolist()
        for area in compress(areas, anywhere):
            labels[area], _ = _match_tile(target[area], area, frames, settings, untie=True)
    return labels


def _match_tile(
    target: Tensor, area: tuple[slice, slice], frames: Sequence[ContextFrame], settings: MatchSettings, *, untie: bool
) -> tuple[Tensor, Tensor]:
    """Return the labels of a tile, and a mask (M,) of its cells with ties, which only `untie` resolves."""
    grid = (frames[0][0].shape[0], frames[0][0].shape[1])
    whole = (slice(0, grid[0]), slice(0, grid[1]))
    near = (_around(area[0], grid[0], settings), _around(area[1], grid[1], settings))
    regions = [near if settings.window_first else whole, *[near] * (len(frames) - 1)]
    sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in regions]
    queries = target.flatten(0, 1)  # (M, C)
    similarities = queries.new_empty(len(queries), sum(sizes))
    outside = sent(_outside(area, near, settings), queries.device)  # (M, cells around)
    for part, region, (features, _) in zip(similarities.split(sizes, dim=1), regions, frames, strict=True):
        torch.mm(queries, features[region].flatten(0, 1).T, out=part)
        if region is near:
            part.masked_fill_(outside, -torch.inf)
    labels = torch.cat([labels[region].flatten(0, 1) for region, (_, labels) in zip(regions, frames, strict=True)])
    mixed, tied = _mix(similarities, labels, settings, untie)
    return mixed.unflatten(0, target.shape[:2]), tied


def _around(cells: slice, length: int, settings: MatchSettings) -> slice:
    radius = min(settings.radius, length)
    reach = math.floor(radius) if settings.inclusive else math.ceil(radius) - 1
    return slice(max(0, cells.start - reach), min(length, cells.stop + reach))


def _outside(area: tuple[slice, slice], near: tuple[slice, slice], settings: MatchSettings) -> Tensor:
    """Return a mask (M, N) of the cells of `near` that are outside the window of each cell of `area`."""
    rows, columns = (
        torch.arange(here.start, here.stop, dtype=torch.float64)[:, None]
        - torch.arange(there.start, there.stop, dtype=torch.float64)
        for here, there in zip(area, near, strict=True)
    )
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    if settings.window == "square":
        distance, limit = torch.maximum(rows.abs(), columns.abs()), settings.radius
    else:
        distance, limit = rows.square() + columns.square(), settings.radius**2
    outside = distance > limit if settings.inclusive else distance >= limit
    return outside.flatten(0, 1).flatten(1)


def _mix(similarities: Tensor, labels: Tensor, settings: MatchSettings, untie: bool) -> tuple[Tensor, Tensor]:
    """Return the mean (M, L) of labels (N, L), weighted by each row's top similarities (M, N), and the tied rows.

    Without `untie`, ties at the last match used are broken arbitrarily.
    """
    count = min(settings.top_k, len(labels))
    values, cells = similarities.topk(min(count + 1, len(labels)))
    mixed = torch.bmm(_weights(values[:, :count], settings)[:, None], labels[cells[:, :count]])[:, 0]
    if count == len(labels):
        return mixed, torch.zeros_like(values[:, 0], dtype=torch.bool)
    last, next_best = values[:, count - 1], values[:, count]
    tied = (last == next_best) & last.isfinite()
    rows = tied.nonzero()[:, 0] if untie else ()
    if len(rows):  # rare but expensive: a weight for every cell of the surroundings
        matches = _matches(similarities[rows], last[rows, None], settings)
        mixed[rows] = _weights(matches, settings) @ labels
    return mixed, tied


def _matches(similarities: Tensor, last: Tensor, settings: MatchSettings) -> Tensor:
    """Return the similarities (M, N) of the matches to use if some equal the `last` one, elsewhere -inf."""
    counts = similarities >= last
    if not settings.ties:
        above, equal = similarities > last, similarities == last
        counts = above | (equal & (equal.cumsum(1) <= settings.top_k - above.sum(1, keepdim=True)))
    return similarities.masked_fill(~counts, -torch.inf)


def _weights(similarities: Tensor, settings: MatchSettings) -> Tensor:
    best = similarities.amax(1, keepdim=True)  # before the division, which may overflow at tiny temperatures
    return torch.softmax((similarities - best) / settings.temperature, dim=1)
