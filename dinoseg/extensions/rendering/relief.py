"""Instrument parts built as height fields from rounded shapes, lit once and stored as sprites."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dinoseg.extensions.rendering.noise import fractal

Colour = Sequence[float] | np.ndarray
DETAIL = 2.0  # sprite pixels per frame pixel


@dataclass
class Sprite:
    """A painted part: premultiplied RGB and coverage, with the position of its joint."""

    rgba: np.ndarray  # (h, w, 4) uint8
    shadow: np.ndarray  # (h, w) uint8, blurred coverage at a quarter of the sprite's resolution
    pivot: tuple[float, float]  # (x, y) in sprite pixels
    label: int


def disc(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Return the signed distance to a disc, negative inside."""
    return np.hypot(x - centre[0], y - centre[1]) - radius


def box(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], half: tuple[float, float], radius: float
) -> np.ndarray:
    """Return the signed distance to a box with rounded corners, negative inside."""
    away_x = np.abs(x - centre[0]) - half[0] + radius
    away_y = np.abs(y - centre[1]) - half[1] + radius
    outside = np.hypot(np.maximum(away_x, 0), np.maximum(away_y, 0))
    return outside + np.minimum(np.maximum(away_x, away_y), 0) - radius


def rod(
    x: np.ndarray,
    y: np.ndarray,
    start: tuple[float, float],
    end: tuple[float, float],
    girth: tuple[float, float],
) -> np.ndarray:
    """Return the signed distance to a rod whose radius changes from `girth[0]` to `girth[1]`, negative inside."""
    along = np.subtract(end, start)
    share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(float(along @ along), 1e-9)
    share = np.clip(share, 0, 1)
    away = np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1])
    return away - (girth[0] + share * (girth[1] - girth[0]))


def metal_sphere(rng: np.random.Generator, warmth: tuple[float, float, float]) -> np.ndarray:
    """Return the reflection of a steel ball (64, 64, 3) float32: headlight, reddish tissue, dark horizon."""
    normal_y, normal_x = np.mgrid[-1:1:64j, -1:1:64j].astype(np.float32)
    normal_z = np.sqrt(np.clip(1 - normal_x**2 - normal_y**2, 0, 1))
    mirror_x, mirror_y = 2 * normal_z * normal_x, 2 * normal_z * normal_y
    room = fractal(rng, (64, 64), 20, 2)
    grey = np.float32(110) + np.float32(0.35) * (np.asarray(warmth, np.float32) - np.float32(110))
    horizon = 0.12 + 0.55 * np.abs(normal_y - 0.15) ** 1.5 + 0.25 * normal_z + 0.35 * room
    ball = grey * np.clip(horizon, 0.06, 1.2)[..., None]
    for x, y, size, power in ((-0.2, -0.35, 0.06, 215.0), (0.4, 0.1, 0.03, 110.0), (-0.1, 0.7, 0.02, 80.0)):
        spot = np.exp(-((mirror_x - x) ** 2 + (mirror_y - y) ** 2) / (size * rng.uniform(0.8, 1.5)))
        ball += power * spot[..., None] * np.array([1.0, 0.98, 0.95], np.float32)
    return ball.astype(np.float32)


class Relief:
    """A height field with colours on a grid of `length` x `width` units, x along the tool, y across it."""

    def __init__(self, rng: np.random.Generator, length: float, width: float, unit: float) -> None:
        self.rng = rng
        self.density = DETAIL * unit  # sprite pixels per design unit
        columns, rows = max(4, round(length * self.density)), max(4, round(width * self.density))
        self.x = np.tile((np.arange(columns, dtype=np.float32) + 0.5) / self.density, (rows, 1))
        self.y = np.tile((np.arange(rows, dtype=np.float32)[:, None] + 0.5) / self.density, (1, columns))
        self.y -= width / 2
        self.height = np.zeros((rows, columns), np.float32)
        self.cover = np.zeros((rows, columns), np.float32)
        self.tint = np.zeros((rows, columns, 3), np.float32)
        self.gloss = np.zeros((rows, columns), np.float32)

    def add(self, inside: np.ndarray, tint: Colour, gloss: float, edge: float, base: float = 0.0) -> None:
        """Add a shape wherever it is higher than the surface: `edge` units of bevel, `base` units up."""
        cover = np.clip(0.5 - inside * self.density, 0, 1)
        rise = np.clip(-inside / edge, 0, 1)
        height = (base + edge * np.sqrt(1 - (1 - rise) ** 2)) * (cover > 0)
        over = (cover > 0.5) & (height >= self.height) | (cover > self.cover)
        self.height = np.where(over, height, self.height).astype(np.float32)
        self.tint[over] = tint
        self.gloss[over] = gloss
        self.cover = np.maximum(self.cover, cover).astype(np.float32)

    def engrave(self, inside: np.ndarray, tint: Colour, share: float = 0.8) -> None:
        """Paint a flat mark (a hole, a slot, a ring, blood) on the surface; coverage is unchanged."""
        cover = share * np.clip(0.5 - inside * self.density, 0, 1)[..., None]
        self.tint += (np.asarray(tint, np.float32) - self.tint) * cover
        self.gloss *= 1 - 0.8 * cover[..., 0]

    def cut(self, inside: np.ndarray) -> None:
        """Cut a hole through which the background is visible."""
        self.cover = np.minimum(self.cover, np.clip(0.5 + inside * self.density, 0, 1)).astype(np.float32)

    def sprite(self, ball: np.ndarray, pivot: tuple[float, float], label: int, grain: np.ndarray) -> Sprite:
        """Return the relief lit by the reflections of `ball`; `grain` (h, w) varies the surface brightness."""
        height = cv2.GaussianBlur(self.height, (0, 0), 0.3 * self.density) * self.density
        slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125)
        slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
        facing = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
        normal_x = (31.5 - 31.5 * slope_x * facing).astype(np.float32)
        normal_y = (31.5 - 31.5 * slope_y * facing).astype(np.float32)
        mirror = cv2.remap(ball, normal_x, normal_y, cv2.INTER_LINEAR)
        hollow = np.clip((height - cv2.GaussianBlur(height, (0, 0), 1.5 * self.density)) / self.density, -1, 0.4)
        light = (0.25 + 0.75 * facing**1.3) * (1 + 0.5 * hollow) * (1 + grain)
        colour = self.tint * light[..., None] + mirror * (self.gloss * (1 + 0.6 * grain) * (1 + hollow))[..., None]
        rgba = np.dstack([np.clip(colour, 0, 255) * self.cover[..., None], 255 * self.cover])
        rgba = cv2.copyMakeBorder(np.rint(rgba).astype(np.uint8), 2, 2, 2, 2, cv2.BORDER_CONSTANT)
        centre = (pivot[0] * self.density + 2, rgba.shape[0] / 2 + pivot[1] * self.density)
        return Sprite(rgba, _soften(rgba[..., 3], 4.0 * self.density), centre, label)


def _soften(cover: np.ndarray, reach: float) -> np.ndarray:
    """Return coverage blurred for a shadow, at a quarter of the resolution, with a margin for the blur."""
    room = 4 * int(np.ceil(reach / 2))
    height, width = cover.shape
    padded = cv2.copyMakeBorder(cover, room, room + -height % 4, room, room + -width % 4, cv2.BORDER_CONSTANT)
    small = cv2.resize(padded, (padded.shape[1] // 4, padded.shape[0] // 4), interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(small, (0, 0), reach / 8)
