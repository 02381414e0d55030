"""What moving objects and the ground behind them are painted with: patterns of two colours, from one palette."""

from collections.abc import Sequence

import cv2
import numpy as np

from dinoseg.synthetic.noise import fractal, mix, smoothstep

COLOURS = 6  # in a video's palette
_CANDIDATES = 12  # tried for each colour, of which the one least like the others is taken


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Return colours (COLOURS, 3) float32 RGB in 0..255 that differ well, none of them black or white."""
    chosen = _draw_colours(rng, 1)
    while len(chosen) < COLOURS:
        candidates = _draw_colours(rng, _CANDIDATES)
        nearest = np.linalg.norm(candidates[:, None] - chosen, axis=-1).min(axis=1)
        chosen = np.vstack([chosen, candidates[nearest.argmax()]])
    return chosen


def draw_greys(rng: np.random.Generator) -> np.ndarray:
    """Return two dull colours (2, 3) float32 RGB in 0..255, of the ground."""
    return _rgb(rng.uniform((0, 0.0, 0.35), (360, 0.15, 0.6), (2, 1, 3)))


def _draw_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    return _rgb(rng.uniform((0, 0.35, 0.3), (360, 0.9, 0.95), (count, 1, 3)))


def _rgb(hsv: np.ndarray) -> np.ndarray:
    return 255 * cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB)[:, 0]


def gradient(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Go smoothly from one side to the other, whatever `cell` is."""
    across = _turned(rng, size)[0]
    return smoothstep(across.min(), across.max(), across)


def blotches(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Scatter rough blotches."""
    return smoothstep(-0.35, 0.35, fractal(rng, size, 1.2 * cell, 4))


def clouds(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Let one colour drift into the other without an edge."""
    return smoothstep(-0.9, 0.9, fractal(rng, size, 2 * cell, 2))


def stripes(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Lay slightly bent stripes."""
    across = _turned(rng, size)[0] + 0.25 * cell * fractal(rng, size, 3 * cell, 1)
    return smoothstep(-0.4, 0.4, np.sin(np.pi * across / cell))


def checks(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Lay a chequered board."""
    across, along = _turned(rng, size)
    return smoothstep(-0.2, 0.2, np.sin(np.pi * across / cell) * np.sin(np.pi * along / cell))


def dots(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Lay rows of dots."""
    across, along = _turned(rng, size)
    return smoothstep(0.1, 0.7, np.cos(np.pi * across / cell) + np.cos(np.pi * along / cell) - 0.3)


FIGURES = (gradient, blotches, stripes, checks, dots)  # of objects
GROUNDS = (gradient, blotches, clouds, stripes)  # of what lies behind them


def paint(pattern: np.ndarray, colours: Sequence[np.ndarray] | np.ndarray, grain: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) float32: from the first to the second colour as `pattern` (H, W) says, with fine `grain`."""
    flat = np.broadcast_to(np.asarray(colours[0], np.float32), (*pattern.shape, 3))
    return mix(flat, colours[1], pattern) * (1 + grain[..., None])


def _turned(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates across and along a random direction, each (H, W), from a random origin."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    angle, origin = rng.uniform(0, 2 * np.pi), rng.uniform(0, 100)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return columns * cosine + rows * sine + origin, rows * cosine - columns * sine + origin
