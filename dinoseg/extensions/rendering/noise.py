"""Smooth random fields for textures, and smooth random functions of time for motion."""

from collections.abc import Sequence

import cv2
import numpy as np


def fractal(rng: np.random.Generator, shape: Sequence[int], cell: float, octaves: int = 4) -> np.ndarray:
    """Return a field (H, W) float32, about -1..1, whose largest bumps span `cell` pixels."""
    height, width = shape
    field = np.zeros((height, width), np.float32)
    weight, total = 1.0, 0.0
    for _ in range(octaves):
        grid = (max(2, round(height / cell) + 1), max(2, round(width / cell) + 1))
        coarse = rng.uniform(-1, 1, grid).astype(np.float32)
        field += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        total += weight
        weight, cell = weight * 0.5, max(1.0, cell / 2)
    return field * (1.6 / total)


def smoothstep(low: float, high: float, values: np.ndarray) -> np.ndarray:
    """Return a smooth step from 0 at `low` to 1 at `high`."""
    share = np.clip((values - low) / (high - low), 0, 1)
    return share * share * (3 - 2 * share)


def mix(first: np.ndarray, second: Sequence[float] | np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend colours: `first` (H, W, 3) towards `second` (a colour or (H, W, 3)) by `share` (H, W)."""
    return first + (np.asarray(second, np.float32) - first) * share[..., None].astype(np.float32)


def vary(rng: np.random.Generator, colour: Sequence[float], amount: float = 0.15) -> np.ndarray:
    """Return a colour (3,) near `colour`: brightness and each channel change by up to `amount`."""
    bright = rng.uniform(1 - amount, 1 + amount)
    return np.clip(np.asarray(colour) * bright * rng.uniform(1 - amount / 2, 1 + amount / 2, 3), 0, 255)


class Wander:
    """Smooth random function of time in seconds within `low`..`high`.

    `period` is the length in seconds of its slowest oscillation.
    """

    def __init__(self, rng: np.random.Generator, low: float, high: float, period: float = 6.0) -> None:
        self._centre, self._reach = (low + high) / 2, (high - low) / 2
        self._speeds = 2 * np.pi / period * np.array([1.0, 1.73, 2.91]) * rng.uniform(0.8, 1.25, 3)
        self._phases = rng.uniform(0, 2 * np.pi, 3)
        self._weights = np.array([0.62, 0.28, 0.10])

    def __call__(self, seconds: float) -> float:
        """Return the value at `seconds`."""
        swing = float(self._weights @ np.sin(self._speeds * seconds + self._phases))
        return self._centre + self._reach * swing
