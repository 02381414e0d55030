"""Articulated and straight instruments that enter over the border and pivot about a point outside the frame."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from dinoseg.extensions.rendering.canvas import Canvas
from dinoseg.extensions.rendering.noise import Wander, fractal, vary
from dinoseg.extensions.rendering.relief import DETAIL, Sprite
from dinoseg.extensions.rendering.surgery.parts import (
    CATHETER,
    THREAD,
    paint_clamp,
    paint_collar,
    paint_holder_jaw,
    paint_jaw,
    paint_knuckle,
    paint_shaft,
    paint_suction,
)

THREADS = ((52, 56, 128), (96, 58, 140), (206, 202, 196), (34, 30, 38), (48, 92, 104), (150, 150, 170))
TUBES = ((206, 164, 112), (190, 122, 92), (216, 194, 168), (188, 108, 96))
CLEARNESS = 0.22  # transparency of the catheter


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


def curve(knots: np.ndarray) -> np.ndarray:
    """Return a smooth line (N, 2) from the first to the last of `knots` (K, 2), attracted by the others.

    The algorithm is corner cutting (Chaikin, 1974).
    """
    line = knots
    for _ in range(4):
        quarter, rest = line[:-1] * 0.75 + line[1:] * 0.25, line[:-1] * 0.25 + line[1:] * 0.75
        inner = np.stack([quarter, rest], axis=1).reshape(-1, 2)
        line = np.vstack([line[:1], inner[1:-1], line[-1:]])
    return line


class Thread:
    """A twisted suture, three design units thick."""

    def __init__(self, rng: np.random.Generator, unit: float) -> None:
        self.thick = max(1, round(3 * unit))
        self._unit = unit
        self._colour = vary(rng, THREADS[rng.integers(len(THREADS))], 0.2)
        self._lift = rng.uniform(2, 5)

    def draw(self, canvas: Canvas, points: np.ndarray) -> None:
        """Draw the thread along `points` (N, 2)."""
        window = canvas.around(points, 4 * self._unit)
        if window is None:
            return
        canvas.shade_stroke(points, self.thick, self._lift, 0.5)
        cover = canvas.stroke(points, self.thick, window)
        body = np.empty((*cover.shape, 3), np.uint8)
        body[:] = self._colour * 0.75
        light = np.clip(self._colour * 1.25 + 22, 0, 255).tolist()
        fixed = np.rint((points - window[:2]) * 16 - 6 * self._unit).astype(np.int32)
        dashes = [dash for dash in np.array_split(fixed, max(1, len(fixed) // 3))[::2] if len(dash) > 1]
        cv2.polylines(body, [fixed], False, (self._colour * 1.1).clip(0, 255).tolist(), 1, cv2.LINE_AA, 4)
        cv2.polylines(body, dashes, False, light, max(1, self.thick // 2), cv2.LINE_AA, 4)
        solid = cv2.cvtColor(cover, cv2.COLOR_GRAY2RGB)
        canvas.lay(cv2.multiply(body, solid, scale=1 / 255), cover, THREAD, window[:2])


class Catheter:
    """A soft, translucent tube that enters over the border and ends in a rounded tip with an eye."""

    def __init__(self, rng: np.random.Generator, unit: float, origin: np.ndarray, tip: np.ndarray) -> None:
        self._unit = unit
        self._girth = rng.uniform(15, 20) * unit
        self._origin, self._tip = origin, tip
        across = np.array([origin[1] - tip[1], tip[0] - origin[0]])
        self._across = across / np.linalg.norm(across)
        self._bows = [Wander(rng, -45 * unit, 45 * unit, 7.0) for _ in range(2)]
        self._drift = [Wander(rng, -22 * unit, 22 * unit, 6.0) for _ in range(2)]
        self._profile = _tube_profile(vary(rng, TUBES[rng.integers(len(TUBES))], 0.15), rng)
        self._stain = (128 + 45 * np.clip(fractal(rng, (256, 256), 22 * unit, 4), -1, 1)).astype(np.uint8)
        self._marks = rng.uniform(0.2, 0.9, int(rng.integers(2, 4)))
        self._ink = (vary(rng, (60, 60, 70), 0.3)).tolist()

    def draw(self, canvas: Canvas, seconds: float) -> None:
        """Draw the catheter at `seconds`."""
        tip = self._tip - canvas.camera + [drift(seconds) for drift in self._drift]
        knots = np.linspace(self._origin - canvas.camera, tip, 4)
        knots[1:3] += self._across * np.array([[bow(seconds)] for bow in self._bows])
        points = curve(knots)
        window = canvas.around(points, self._girth)
        if window is None:
            return
        canvas.shade_stroke(points, round(self._girth), 4, 0.5)
        depth = np.zeros((window[3] - window[1], window[2] - window[0]), np.uint8)
        fixed = np.rint((points - window[:2]) * 16).astype(np.int32)
        shares = np.linspace(1, 0.08, 9)
        for share in shares:
            level = round(255 * np.sqrt(1 - share**2 * 0.98))
            cv2.polylines(depth, [fixed], False, level, max(1, round(self._girth * share)), cv2.LINE_AA, 4)
        cover = canvas.stroke(points, max(1, round(self._girth)), window)
        round_depth = cv2.blur(depth, (3, 3))
        offset = max(1, round(0.16 * self._girth))
        raised = cv2.copyMakeBorder(round_depth, 0, offset, 0, offset, cv2.BORDER_CONSTANT)[offset:, offset:]
        body = cv2.LUT(cv2.merge([round_depth] * 3), self._profile[0])
        body = cv2.add(body, cv2.LUT(cv2.merge([raised] * 3), self._profile[1]))
        self._write_marks(body, fixed)
        height, width = cover.shape
        stain = np.tile(self._stain, (-(-height // 256), -(-width // 256)))[:height, :width]
        body = cv2.multiply(body, cv2.cvtColor(stain, cv2.COLOR_GRAY2RGB), scale=1 / 128)
        behind = canvas.rgb[window[1] : window[3], window[0] : window[2]]
        body = cv2.addWeighted(body, 1 - CLEARNESS, behind, CLEARNESS, 0)
        solid = cv2.cvtColor(cover, cv2.COLOR_GRAY2RGB)
        canvas.lay(cv2.multiply(body, solid, scale=1 / 255), cover, CATHETER, window[:2])

    def _write_marks(self, body: np.ndarray, fixed: np.ndarray) -> None:
        for mark in self._marks:
            index = min(int(mark * len(fixed)), len(fixed) - 2)
            along = (fixed[index + 1] - fixed[index]).astype(float)
            across = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6) * 7 * self._girth
            ends = np.rint(np.stack([fixed[index] - across, fixed[index] + across])).astype(np.int32)
            cv2.polylines(body, [ends], False, self._ink, max(1, round(1.6 * self._unit)), cv2.LINE_AA, 4)
        eye = tuple(int(value) for value in fixed[-3])
        cv2.circle(body, eye, max(1, round(0.2 * self._girth * 16)), (60, 24, 20), -1, cv2.LINE_AA, 4)


def _tube_profile(tint: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return two lookup tables (1, 256, 3) by roundness 0 (rim) to 255 (ridge): body colour, and highlight."""
    level = np.linspace(0, 1, 256)[:, None]
    deep = tint * (0.62, 0.45, 0.42)
    body = deep + (tint - deep) * level**1.2 + 18 * np.sin(np.pi * level) * (1.0, 0.7, 0.5)
    shine = rng.uniform(60, 120) * np.clip((level - 0.93) / 0.07, 0, 1) ** 2 * np.ones(3)
    tables = [np.clip(table, 0, 255).astype(np.uint8)[None] for table in (body, shine)]
    return tables[0], tables[1]
