"""Training-free label propagation from a clip's first frame to later frames by feature similarity."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.extensions.tracking.grid.cells import one_hot
from dinoseg.extensions.tracking.grid.settings import MatchSettings, Window
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Positive, check_annotations

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
    # by tiles: all similarities at once would be cells x frames x cells, at 60 x 107 cells 1.3 GB for 8 frames
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
    # CRW's script searches all of frame 0, DINO's and DINOv3's only the window
    regions = [near if settings.window_first else whole, *[near] * (len(frames) - 1)]
    sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in regions]
    queries = target.flatten(0, 1)  # (M, C)
    similarities = queries.new_empty(len(queries), sum(sizes))
    outside = to_device(_outside(area, near, settings), queries.device)  # (M, cells around)
    for part, region, (features, _) in zip(similarities.split(sizes, dim=1), regions, frames, strict=True):
        # into one buffer for all frames, over which the top k are taken together
        torch.mm(queries, features[region].flatten(0, 1).T, out=part)
        if region is near:
            # as in DINOv3's notebook; DINO's zero weights and CRW's -1e10 leave out the same cells
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
    # one more than used: it shows whether the last match is tied
    values, cells = similarities.topk(min(count + 1, len(labels)))
    # gathers k labels per cell; a weight for every cell of the surroundings would be mostly zeros
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
    # softmax(cos / T), as CRW and DINOv3; DINO's exp(cos / T) divided by its sum is the same
    best = similarities.amax(1, keepdim=True)  # before the division, which may overflow at tiny temperatures
    return torch.softmax((similarities - best) / settings.temperature, dim=1)


@check_annotations
def propagate(
    features: Tensor,
    labels: Tensor | Mapping[int, Tensor],
    *,
    settings: MatchSettings = MatchSettings(),  # noqa: B008 (frozen)
    context: Count | None = None,
    radius: NotNegative | None = None,
    window: Window | None = None,
    top_k: Count | None = None,
    temperature: Positive | None = None,
) -> Tensor:
    """Return the soft labels (T, L, h, w) of a clip with features (T, C, h, w), which are normalised here.

    `labels` are those of frame 0, as (L, h, w) or as IDs (h, w), or a mapping from frame numbers to labels. Labels
    after frame 0 add objects, see `seed`. Parameters that are None are taken from `settings`. The result is not
    normalised over the frame. Half-precision features are processed and returned as float32.

    Raises:
        UserError: labels have another grid, frame 0 has no labels, or a setting is out of range.
    """
    overrides = {"context": context, "radius": radius, "window": window, "top_k": top_k, "temperature": temperature}
    settings = replace(settings, **{key: value for key, value in overrides.items() if value is not None})  # type: ignore[arg-type]
    if features.ndim != 4 or not len(features):
        raise UserError(f"The features have the shape {tuple(features.shape)}. Give at least one frame: (T, C, h, w).")
    frames = labels if isinstance(labels, Mapping) else {0: labels}
    strange = [number for number in frames if not 0 <= number < len(features)]
    if strange:
        raise UserError(f"Labels are given for frame {strange[0]} of a clip of {len(features)} frames, counted from 0.")
    propagator = Propagator(settings)
    soft = [propagator.step(frame, frames.get(number)) for number, frame in enumerate(features)]
    return torch.stack([_grown(frame, len(soft[-1])) for frame in soft])


def seed(soft: Tensor, labels: Tensor) -> Tensor:
    """Return soft labels (L, h, w) with the objects of `labels` (M, h, w) added; channel 0 of `labels` is ignored.

    Where objects cover a fraction p of a cell, its previous labels are scaled by 1 - p. Objects beyond L get new
    channels.
    """
    objects = labels.clone()
    objects[:1] = 0
    covered = objects.sum(0).clamp(0, 1)
    channels = max(len(soft), len(labels))
    return _grown(soft, channels) * (1 - covered) + _grown(objects, channels)


class Propagator:
    """Frame-by-frame label propagation in constant memory: frame 0 and the last `context` frames.

    Arguments and results are never stored by reference, so callers may modify them.
    """

    def __init__(self, settings: MatchSettings = MatchSettings()) -> None:  # noqa: B008 (frozen)
        self.settings = settings
        self._first: ContextFrame | None = None
        self._recent: deque[ContextFrame] = deque(maxlen=settings.context)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the soft labels (L, h, w) of the next frame, whose features are (C, h, w).

        `labels`, as (L, h, w) or IDs (h, w), are required for the first frame; later they add objects, see `seed`.

        Raises:
            UserError: the first frame has no labels, or features or labels have another shape than before.
        """
        target, lengths = unit_features(features)
        seeds = None if labels is None else _on_grid(labels, target)
        if self._first is None:
            check_finite(lengths)
            return self._start(target, seeds)
        soft = self._match(target, lengths, self._first)
        if seeds is not None:
            soft = seed(soft.permute(2, 0, 1), seeds).permute(1, 2, 0).contiguous()
            self._first = _pad_labels(self._first, soft.shape[2])
            self._recent = deque((_pad_labels(frame, soft.shape[2]) for frame in self._recent), self.settings.context)
        # soft and not normalised, as in all three protocols: an argmax in each frame would lose small shares
        self._recent.append((target, soft))
        return _channels_first(soft)

    @torch.no_grad()
    def blend(self, features: Tensor, labels: Tensor, share: float) -> Tensor:
        """Return a frame's soft labels (L, h, w), mixed with those propagated from earlier frames.

        The result is (1 - share) * labels + share * propagated. The first frame's labels are returned unchanged. Later
        frames read the mixture.

        Raises:
            UserError: features or labels have another shape than before.
        """
        if self._first is None:
            return self.step(features, labels)
        target, lengths = unit_features(features)
        soft = self._match(target, lengths, self._first)
        mixed = torch.lerp(_on_grid(labels, target).permute(1, 2, 0), soft, share)  # (h, w, L)
        self._recent.append((target, mixed))
        return _channels_first(mixed)

    def _match(self, target: Tensor, lengths: Tensor, first: ContextFrame) -> Tensor:
        """Return the labels (h, w, L) that a frame of the features `target` takes from earlier frames."""
        _check_same(target, first[0])
        with torch.autocast(target.device.type, enabled=False):  # half precision would create ties
            soft = match(target, [first, *self._recent], self.settings)
        check_finite(lengths)
        return soft

    def state(self) -> dict[str, Tensor]:
        """Return the stacked tensors of frame 0 and the recent frames; empty before frame 0."""
        if self._first is None:
            return {}
        frames = [self._first, *self._recent]
        return {
            "features": torch.stack([features for features, _ in frames]),
            "labels": torch.stack([labels for _, labels in frames]),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state()` of the same settings, on the device of its tensors.

        Raises:
            UserError: the state has more frames than `settings.context`.
        """
        pairs = zip(state.get("features", ()), state.get("labels", ()), strict=True)
        frames = [(features.clone(), labels.clone()) for features, labels in pairs]  # views would hold the whole stack
        if len(frames) > self.settings.context + 1:
            raise UserError(
                f"context={self.settings.context}, but the state holds {len(frames) - 1} frames besides the first. Use "
                "the settings of the saved state, or start over."
            )
        self._first = frames[0] if frames else None
        self._recent = deque(frames[1:], self.settings.context)

    def _start(self, target: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise UserError("The first frame has no labels. Give its mask, whose objects are tracked.")
        self._first = (target, labels.permute(1, 2, 0).clone(memory_format=torch.contiguous_format))
        if self.settings.repeat_first:
            # CRW puts frame 0 in front of the video, so that early frames find duplicates among their top k
            self._recent.extend([self._first] * self.settings.context)
        return _channels_first(self._first[1])


def unit_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C, h, w) as unit vectors (h, w, C) in new memory, and their original lengths; zero vectors stay zero."""
    if features.ndim != 3:
        raise UserError(f"A frame's features have the shape {tuple(features.shape)}. Give (C, h, w).")
    wide = features if features.dtype == torch.float64 else features.float()
    lengths = torch.linalg.vector_norm(wide, dim=0)
    target = wide.new_empty(*wide.shape[1:], len(wide))
    return torch.div(wide.permute(1, 2, 0), lengths.clamp(min=1e-12)[..., None], out=target), lengths


def check_finite(lengths: Tensor) -> None:
    """Check that feature lengths are finite; called after matching, which has synchronised the device anyway."""
    if not lengths.isfinite().all():
        raise UserError(
            "A frame's features hold values that are not finite, and would spread to all frames after it. Run the "
            "backbone in float32 (engine.precision=fp32)."
        )


def _on_grid(labels: Tensor, target: Tensor) -> Tensor:
    if labels.ndim not in (2, 3) or tuple(labels.shape[-2:]) != tuple(target.shape[:2]):
        raise UserError(
            f"The labels have the shape {tuple(labels.shape)}, the features the grid {tuple(target.shape[:2])} (h, w). "
            "Give labels as (L, h, w) or ids (h, w) on that grid: first_labels brings a mask of pixels to it."
        )
    return (one_hot(labels) if labels.ndim == 2 else labels).to(target)


def _check_same(target: Tensor, first: Tensor) -> None:
    if target.shape != first.shape:
        (height, width, channels), (first_height, first_width, first_channels) = target.shape, first.shape
        raise UserError(
            f"A frame's features are {channels} x {height} x {width}, those of the first {first_channels} x "
            f"{first_height} x {first_width} (C, h, w). All frames of a clip need one size: resize or split it."
        )


def _grown(labels: Tensor, channels: int) -> Tensor:
    return F.pad(labels, (0, 0, 0, 0, 0, channels - len(labels)))


def _pad_labels(frame: ContextFrame, channels: int) -> ContextFrame:
    features, labels = frame
    return features, F.pad(labels, (0, channels - labels.shape[2]))


def _channels_first(labels: Tensor) -> Tensor:
    return labels.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
