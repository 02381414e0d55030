"""Operating field: wet, uneven tissue, painted once per video, then deformed, moved and lit per frame."""

import cv2
import numpy as np

from dinoseg.extensions.rendering.noise import Wander, fractal, mix, smoothstep, vary

MARGIN = 1.3  # size of the painted field relative to the frame
FLESH = ((176, 72, 70), (150, 48, 50), (196, 104, 96), (205, 128, 112), (140, 62, 74), (186, 88, 92))
FAT = (214, 168, 112)
BLOOD = (92, 10, 14)
VESSEL = (112, 20, 28)
VEIN = (100, 36, 58)


class Tissue:
    """Tissue of one patient; `frame(seconds)` returns it as seen by the moving camera."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], unit: float) -> None:
        height, width = size
        self._texture = paint_tissue(rng, (round(height * MARGIN), round(width * MARGIN)), unit)
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        self._base = np.stack([columns + width * (MARGIN - 1) / 2, rows + height * (MARGIN - 1) / 2])
        self._bends = [
            np.stack([fractal(rng, size, 150 * unit, 1), fractal(rng, size, 110 * unit, 1)]) for _ in range(2)
        ]  # each (2, H, W)
        reach = 5 * unit
        self._amounts = [Wander(rng, -reach, reach, 3.6), Wander(rng, -reach, reach, 5.0)]
        self._glint = Wander(rng, -26, 26, 3.0)
        self._glints = cv2.resize(rng.uniform(-30, 30, (5, 8)).astype(np.float32), (width, height))

    def frame(self, seconds: float, camera: np.ndarray) -> np.ndarray:
        """Return the field (H, W, 3) uint8 RGB; `camera` is the camera's shift (x, y) in pixels."""
        where = self._base + camera.astype(np.float32)[:, None, None]
        for bend, amount in zip(self._bends, self._amounts, strict=True):
            where += bend * np.float32(amount(seconds))
        seen = cv2.remap(self._texture, where[0], where[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        colour, gloss = cv2.cvtColor(seen, cv2.COLOR_RGBA2RGB), seen[..., 3]
        lifted = gloss + self._glints * (self._glint(seconds) / 30)
        glint = cv2.convertScaleAbs(np.clip(lifted - 150, 0, 85), alpha=3.0)
        return cv2.add(colour, cv2.cvtColor(glint, cv2.COLOR_GRAY2RGB))


def paint_tissue(rng: np.random.Generator, size: tuple[int, int], unit: float) -> np.ndarray:
    """Return painted tissue (H, W, 4) uint8: lit RGB colour, and gloss in the fourth channel."""
    organs, creases = _organs(rng, size, unit)
    relief = _relief(rng, size, unit, organs, creases)
    colour = _colour(rng, size, unit, organs, relief)
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=0.125)
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=0.125)
    facing = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    hollow = relief - cv2.GaussianBlur(relief, (0, 0), 7 * unit)
    light = 0.30 + 0.72 * facing**1.5 - 0.20 * slope_y - 0.10 * slope_x
    light *= 1 + np.clip(hollow / (9 * unit), -0.45, 0.25)
    depth = 0.6 * smoothstep(-0.5, 0.4, fractal(rng, size, 50 * unit, 2))
    light *= 1 - depth * np.exp(-creases / (2.0 * unit))
    gloss = _gloss(rng, size, unit, slope_x, slope_y)
    # flesh scatters red light into its shadows
    lit = colour * np.clip(light, 0.12, 1.5)[..., None] ** np.array([0.75, 1.15, 1.1], np.float32)
    return np.dstack([np.clip(lit, 0, 255), np.clip(gloss, 0, 255)]).astype(np.uint8)


def _organs(rng: np.random.Generator, size: tuple[int, int], unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a split of the field into regions: the region index and the border distance of each pixel."""
    height, width = size
    count = int(rng.integers(4, 7))
    centres = rng.uniform((0, 0), (width, height), (count, 2))
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    columns += 45 * unit * fractal(rng, size, 110 * unit, 3)
    rows += 45 * unit * fractal(rng, size, 110 * unit, 3)
    reach = np.stack([np.hypot(columns - x, (rows - y) * 1.3) for x, y in centres])
    ordered = np.sort(reach, axis=0)
    return reach.argmin(axis=0), (ordered[1] - ordered[0]) / 2


def _relief(
    rng: np.random.Generator, size: tuple[int, int], unit: float, organs: np.ndarray, creases: np.ndarray
) -> np.ndarray:
    """Return the height of the surface in pixels: bulging regions, folds, lobules and fine grain."""
    bulge = 24 * unit * (1 - np.exp(-creases / (26 * unit)))
    folds = fractal(rng, size, 46 * unit, 2) + 0.6 * fractal(rng, size, 120 * unit, 1)
    lobules = np.abs(fractal(rng, size, 26 * unit, 2))
    strength = rng.uniform(0, 1, int(organs.max()) + 1)[organs].astype(np.float32)
    strength = cv2.GaussianBlur(strength, (0, 0), 5 * unit)
    folded = 6 * unit * np.sqrt(np.abs(folds) + 0.02) * strength + 7 * unit * lobules * (1 - strength)
    return (bulge + folded + 1.5 * unit * fractal(rng, size, 9 * unit, 3)).astype(np.float32)


def _colour(
    rng: np.random.Generator, size: tuple[int, int], unit: float, organs: np.ndarray, relief: np.ndarray
) -> np.ndarray:
    """Return the unlit colour (H, W, 3) float32: flesh of several kinds, fat, vessels and blood."""
    kinds = rng.integers(0, len(FLESH), int(organs.max()) + 1)
    flesh = np.stack([vary(rng, FLESH[kind], 0.18) for kind in kinds])
    flesh += 0.45 * (flesh.mean(axis=0) - flesh)  # similar flesh tones within one patient
    colour = cv2.GaussianBlur(flesh[organs].astype(np.float32), (0, 0), 2.5 * unit)
    colour *= 1 + 0.16 * fractal(rng, size, 40 * unit, 4)[..., None]
    crest = smoothstep(0, 8 * unit, relief - cv2.GaussianBlur(relief, (0, 0), 9 * unit))
    colour = mix(colour, (240, 176, 164), 0.42 * crest)
    fat = smoothstep(0.2, 1.0, fractal(rng, size, 70 * unit, 3) + 0.25 * fractal(rng, size, 8 * unit, 2))
    colour = mix(colour, vary(rng, FAT, 0.15), fat * rng.uniform(0.15, 0.6))
    for tint, trees, girth in ((VEIN, 3, 3.4), (VESSEL, 9, 2.2), (VESSEL, 26, 1.1)):
        lines = _vessels(rng, size, unit, trees, girth * unit)
        colour = mix(colour, vary(rng, tint, 0.2), lines * rng.uniform(0.25, 0.6))
    blood = smoothstep(0.25, 0.85, fractal(rng, size, 85 * unit, 5))
    colour = mix(colour, vary(rng, BLOOD, 0.2), 0.85 * blood)
    smear = smoothstep(0.1, 0.8, fractal(rng, size, 22 * unit, 4))
    return mix(colour, vary(rng, BLOOD, 0.3), smear * rng.uniform(0.1, 0.45))


def _vessels(rng: np.random.Generator, size: tuple[int, int], unit: float, trees: int, girth: float) -> np.ndarray:
    """Return vessel coverage (H, W) in 0..1, drawn as `trees` wandering, branching lines."""
    height, width = size
    lines = np.zeros(size, np.uint8)
    for _ in range(trees):
        stems = [(rng.uniform((0, 0), (width, height)), rng.uniform(0, 2 * np.pi), girth)]
        for _ in range(6):
            start, heading, thick = stems.pop(0)
            turns = heading + np.cumsum(rng.normal(0, 0.28, 11))
            steps = 5 * unit * np.stack([np.cos(turns), np.sin(turns)], axis=1)
            path = start + np.cumsum(steps, axis=0)
            points = np.rint(path * 16).astype(np.int32)
            cv2.polylines(lines, [points], False, 255, max(1, round(thick)), cv2.LINE_AA, 4)
            fork = rng.uniform(0.3, 0.9)
            stems += [(path[-1], turns[-1] + turn, thick * 0.75) for turn in (fork, -fork)]
    return cv2.GaussianBlur(lines, (0, 0), 0.7 * max(unit, 0.5)).astype(np.float32) / 255


def _gloss(
    rng: np.random.Generator, size: tuple[int, int], unit: float, slope_x: np.ndarray, slope_y: np.ndarray
) -> np.ndarray:
    """Return the gloss of the wet surface: how closely it mirrors the light; above 150 it glints."""
    tilt_x = cv2.GaussianBlur(slope_x, (0, 0), 1.6 * unit) + 0.22 * fractal(rng, size, 12 * unit, 2)
    tilt_y = cv2.GaussianBlur(slope_y, (0, 0), 1.6 * unit) + 0.22 * fractal(rng, size, 12 * unit, 2)
    mirror = np.exp(-((tilt_x + 0.10) ** 2 + (tilt_y + 0.16) ** 2) / 0.03)
    wet = smoothstep(-0.1, 0.8, fractal(rng, size, 45 * unit, 3))
    grain = 22 * fractal(rng, size, 4 * unit, 2)
    return 62 + 185 * mirror * (0.25 + 0.75 * wet) + grain
