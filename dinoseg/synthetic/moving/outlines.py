"""Outlines of moving objects: closed lines of points within the unit circle, which they touch."""

import numpy as np

_POINTS = 96  # of an outline that is curved


def ellipse(rng: np.random.Generator) -> np.ndarray:
    """Return a disc, or one pressed to no less than 0.7 of its width."""
    around = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
    return np.column_stack([np.cos(around), rng.uniform(0.7, 1) * np.sin(around)])


def box(rng: np.random.Generator) -> np.ndarray:
    """Return a rectangle, from a square to twice as long as wide."""
    half = np.array([1, rng.uniform(0.5, 1)])
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half / np.hypot(*half)


def star(rng: np.random.Generator) -> np.ndarray:
    """Return a star of four to seven rays."""
    rays = int(rng.integers(4, 8))
    return _radial(np.tile([1, rng.uniform(0.45, 0.65)], rays))


def polygon(rng: np.random.Generator) -> np.ndarray:
    """Return a polygon of three to seven corners, not quite regular."""
    corners = rng.uniform(0.8, 1, int(rng.integers(3, 8)))
    return _radial(corners / corners.max())


def blob(rng: np.random.Generator) -> np.ndarray:
    """Return a soft shape with bulges and hollows."""
    around = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
    waves = [rng.uniform(-1, 1) / order * np.cos(order * around + rng.uniform(0, 2 * np.pi)) for order in (2, 3, 4, 5)]
    reach = 1 + 0.5 * np.sum(waves, axis=0)
    return _radial(reach / reach.max())


OUTLINES = (ellipse, box, star, polygon, blob)


def _radial(reach: np.ndarray) -> np.ndarray:
    """Return points (N, 2) at equal angles, `reach` (N,) from the centre."""
    around = np.linspace(0, 2 * np.pi, len(reach), endpoint=False)
    return reach[:, None] * np.column_stack([np.cos(around), np.sin(around)])
