"""Training-free label propagation from a clip's first frame to later frames by feature similarity."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.tracking.grid.cells import one_hot
from dinoseg.tracking.grid.settings import MatchSettings
from dinoseg.tracking.grid.window import ContextFrame, match
from dinoseg.utils.errors import UserError


def propagate(
    features: Tensor,
    labels: Tensor | Mapping[int, Tensor],
    *,
    settings: MatchSettings = MatchSettings(),  # noqa: B008 (frozen)
    context: int | None = None,
    radius: float | None = None,
    window: str | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
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
        target, lengths = _unit(features)
        seeds = None if labels is None else _on_grid(labels, target)
        if self._first is None:
            _check_finite(lengths)
            return self._start(target, seeds)
        _check_same(target, self._first[0])
        with torch.autocast(target.device.type, enabled=False):  # half precision would create ties
            soft = match(target, [self._first, *self._recent], self.settings)
        _check_finite(lengths)
        if seeds is not None:
            soft = seed(soft.permute(2, 0, 1), seeds).permute(1, 2, 0).contiguous()
            self._first = _widened(self._first, soft.shape[2])
            self._recent = deque((_widened(frame, soft.shape[2]) for frame in self._recent), self.settings.context)
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
        target, lengths = _unit(features)
        _check_same(target, self._first[0])
        with torch.autocast(target.device.type, enabled=False):
            soft = match(target, [self._first, *self._recent], self.settings)
        _check_finite(lengths)
        mixed = torch.lerp(_on_grid(labels, target).permute(1, 2, 0), soft, share)  # (h, w, L)
        self._recent.append((target, mixed))
        return _channels_first(mixed)

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
            self._recent.extend([self._first] * self.settings.context)
        return _channels_first(self._first[1])


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C, h, w) as unit vectors (h, w, C) in new memory, and their original lengths; zero vectors stay zero."""
    if features.ndim != 3:
        raise UserError(f"A frame's features have the shape {tuple(features.shape)}. Give (C, h, w).")
    wide = features if features.dtype == torch.float64 else features.float()
    lengths = torch.linalg.vector_norm(wide, dim=0)
    target = wide.new_empty(*wide.shape[1:], len(wide))
    return torch.div(wide.permute(1, 2, 0), lengths.clamp(min=1e-12)[..., None], out=target), lengths


def _check_finite(lengths: Tensor) -> None:
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


def _widened(frame: ContextFrame, channels: int) -> ContextFrame:
    features, labels = frame
    return features, F.pad(labels, (0, channels - labels.shape[2]))


def _channels_first(labels: Tensor) -> Tensor:
    return labels.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
