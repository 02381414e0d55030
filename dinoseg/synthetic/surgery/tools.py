"""Articulated and straight instruments that enter over the border and pivot about a point outside the frame."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dinoseg.synthetic.canvas import Canvas
from dinoseg.synthetic.noise import Wander
from dinoseg.synthetic.relief import DETAIL, Sprite
from dinoseg.synthetic.surgery.parts import (
    paint_clamp,
    paint_collar,
    paint_holder_jaw,
    paint_jaw,
    paint_knuckle,
    paint_shaft,
    paint_suction,
)


class Reach:
    """Motion of a tip around `home`, on a rod through the fixed point `port`; both (x, y) in pixels."""

    def __init__(self, rng: np.random.Generator, home: np.ndarray, port: np.ndarray, span: np.ndarray) -> None:
        self._home, self._port = home, port
        self._x, self._y = (Wander(rng, -reach, reach, rng.uniform(4, 7)) for reach in span)

    def __call__(self, seconds: float) -> tuple[np.ndarray, float]:
        """Return the tip (x, y) in pixels and the rod's direction in radians."""
        tip = self._home + (self._x(seconds), self._y(seconds))
        return tip, float(np.arctan2(*(tip - self._port)[::-1]))


@dataclass
class Pose:
    """Pose of a robot: (x, y, angle) of each joint, the jaws' half opening in radians, and the scale."""

    shaft: np.ndarray
    knuckle: np.ndarray
    jaws: np.ndarray
    opening: float
    scale: float


class Robot:
    """Robotic instrument: shaft, two-link wrist and a pair of jaws."""

    def __init__(self, rng: np.random.Generator, reach: Reach, ball: np.ndarray, unit: float, *, holder: bool) -> None:
        self._reach, self._unit = reach, unit
        girth = rng.uniform(26, 36)
        self._shaft = paint_shaft(rng, ball, unit, girth)
        self._collar = paint_collar(rng, ball, unit, girth)
        self._knuckle = paint_knuckle(rng, ball, unit, girth)
        self._jaw = _jaw(rng, ball, unit, girth, holder)
        self._steps = np.array([girth * 0.75, girth * 0.60]) * unit
        self._bend = Wander(rng, -0.45, 0.45, 5.0)
        self._turn = Wander(rng, -0.5, 0.5, 4.5)
        self._open = Wander(rng, 0.04, 0.30 if holder else 0.42, 3.0)
        self._depth = Wander(rng, 0.9, 1.12, 8.0)
        self._gain = Wander(rng, 0.85, 1.2, 4.0)

    def pose(self, seconds: float) -> Pose:
        """Return the pose of all joints."""
        start, angle = self._reach(seconds)
        scale = self._depth(seconds)
        wrist = start + scale * self._steps[0] * _direction(angle)
        bent = angle + self._bend(seconds)
        joint = wrist + scale * self._steps[1] * _direction(bent)
        jaws = np.array([*joint, bent + self._turn(seconds)])
        return Pose(np.array([*start, angle]), np.array([*wrist, bent]), jaws, self._open(seconds), scale)

    def draw(self, canvas: Canvas, seconds: float, held: Callable[[Canvas, Pose, float], None] | None = None) -> None:
        """Draw the instrument; `held` draws the object between its jaws."""
        pose = self.pose(seconds)
        scale, gain = pose.scale / DETAIL, self._gain(seconds)
        upper = np.array([*pose.jaws[:2], pose.jaws[2] - pose.opening, 1.0])
        lower = np.array([*pose.jaws[:2], pose.jaws[2] + pose.opening, -1.0])  # the mirrored jaw
        canvas.shade(self._shaft, pose.shaft, scale, 9)
        canvas.shade(self._knuckle, pose.knuckle, scale, 6)
        canvas.shade(self._jaw, upper, scale, 4)
        canvas.paste(self._jaw, lower, scale, gain * 0.85)
        if held is not None:
            held(canvas, pose, seconds)
        canvas.paste(self._jaw, upper, scale, gain)
        canvas.paste(self._knuckle, pose.knuckle, scale, gain)
        canvas.paste(self._collar, pose.shaft, scale, gain)
        canvas.paste(self._shaft, pose.shaft, scale, gain)


class Suction:
    """A straight suction pipe."""

    def __init__(self, rng: np.random.Generator, reach: Reach, ball: np.ndarray, unit: float) -> None:
        self._reach = reach
        self._pipe = paint_suction(rng, ball, unit, rng.uniform(13, 17))
        self._gain = Wander(rng, 0.8, 1.15, 4.0)

    def draw(self, canvas: Canvas, seconds: float) -> None:
        """Draw the pipe at `seconds`."""
        tip, angle = self._reach(seconds)
        place = np.array([*tip, angle])
        canvas.shade(self._pipe, place, 1 / DETAIL, 6)
        canvas.paste(self._pipe, place, 1 / DETAIL, self._gain(seconds))


class Clamp:
    """A clip that moves with the tissue and is dragged and rotated slightly."""

    def __init__(self, rng: np.random.Generator, home: np.ndarray, ball: np.ndarray, unit: float) -> None:
        self._home = home
        self._clip = paint_clamp(rng, ball, unit)
        self._x, self._y = (Wander(rng, -24 * unit, 24 * unit, 7.0) for _ in range(2))
        middle = rng.uniform(0, 2 * np.pi)
        self._angle = Wander(rng, middle - 0.7, middle + 0.7, 6.0)
        self._squash = Wander(rng, 0.8, 1.05, 5.0)
        self._gain = Wander(rng, 0.8, 1.1, 4.0)

    def draw(self, canvas: Canvas, seconds: float) -> None:
        """Draw the surgical clip on the canvas, as it lies at `seconds` of the video."""
        x, y = self._home - canvas.camera + (self._x(seconds), self._y(seconds))
        place = np.array([x, y, self._angle(seconds), self._squash(seconds)])
        canvas.shade(self._clip, place, 1 / DETAIL, 3)
        canvas.paste(self._clip, place, 1 / DETAIL, self._gain(seconds))


def _jaw(rng: np.random.Generator, ball: np.ndarray, unit: float, girth: float, holder: bool) -> Sprite:
    if holder:
        return paint_holder_jaw(rng, ball, unit, rng.uniform(38, 44))
    return paint_jaw(rng, ball, unit, girth * rng.uniform(1.5, 1.75), bool(rng.random() < 0.5))


def _direction(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])
