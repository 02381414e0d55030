"""Painted parts of the instruments; lengths are in design units of one pixel at 192 x 320."""

import numpy as np

from dinoseg.extensions.rendering.noise import fractal, vary
from dinoseg.extensions.rendering.relief import Relief, Sprite, box, disc, rod

CLASPER, WRIST, SHAFT, NEEDLE, THREAD, SUCTION, HOLDER, CLAMP, CATHETER = range(1, 10)
STEEL = (96, 96, 100)
DARK = (14, 11, 12)
BLOOD = (110, 18, 20)
CLAMPS = ((150, 128, 66), (96, 104, 128), (120, 120, 122), (70, 112, 108))
SHAFT_LENGTH = 300.0


def _brushed_grain(relief: Relief, strength: float, along: float, across: float) -> np.ndarray:
    """Return a grain (h, w) of streaks, `along` units long and `across` units wide."""
    rows, columns = relief.height.shape
    squeezed = (rows, max(4, round(columns * across / along)))
    streaks = fractal(relief.rng, squeezed, across * relief.density, 3)
    places = np.linspace(0, squeezed[1] - 1, columns)
    left = np.floor(places).astype(int)
    share = (places - left).astype(np.float32)
    right = np.minimum(left + 1, squeezed[1] - 1)
    return strength * (streaks[:, left] * (1 - share) + streaks[:, right] * share)


def _stain(relief: Relief, share: float) -> None:
    """Smear some blood over the part."""
    spots = fractal(relief.rng, relief.height.shape, 9 * relief.density, 3)
    soft = 1.2 / relief.density  # smears have a soft rim
    relief.engrave((0.9 - share - spots) * soft, vary(relief.rng, BLOOD, 0.3), 0.6)


def paint_shaft(rng: np.random.Generator, ball: np.ndarray, unit: float, girth: float) -> Sprite:
    """Paint the long dark tube of a robotic instrument, its tip at x = SHAFT_LENGTH."""
    relief = Relief(rng, SHAFT_LENGTH, girth * 1.25 + 4, unit)
    tint = vary(rng, ((52, 47, 44), (34, 33, 36), (70, 66, 62), (44, 50, 56))[rng.integers(4)], 0.2)
    tube = rod(relief.x, relief.y, (-9, 0), (SHAFT_LENGTH + girth, 0), (girth * 0.62, girth * 0.48))
    relief.add(tube, tint, rng.uniform(0.2, 0.45), girth * 0.5)
    relief.cut(SHAFT_LENGTH - 1 - relief.x)
    for position in SHAFT_LENGTH - np.cumsum(rng.uniform(6, 60, 3)):
        ring = box(relief.x, relief.y, (position, 0), (rng.uniform(0.5, 1.8), girth), 0.3)
        relief.engrave(ring, vary(rng, ((150, 148, 145), DARK, (120, 110, 90))[rng.integers(3)], 0.2), 0.55)
    for position in SHAFT_LENGTH - 40 - np.cumsum(rng.uniform(3.5, 6, 9)):
        mark = box(relief.x, relief.y, (position, rng.uniform(-1.5, 1.5)), (1.1, rng.uniform(1, 3)), 0.2)
        relief.engrave(mark, (150, 150, 146), 0.4)
    _stain(relief, rng.uniform(-0.2, 0.2))
    return relief.sprite(ball, (SHAFT_LENGTH - 1, 0), SHAFT, _brushed_grain(relief, 0.30, 26, 1.2))


def paint_collar(rng: np.random.Generator, ball: np.ndarray, unit: float, girth: float) -> Sprite:
    """Paint the steel ring at the shaft's end with the two cheeks that carry the joint."""
    length = girth * 0.95
    relief = Relief(rng, length + 6, girth + 4, unit)
    half = girth * 0.48
    tint = vary(rng, STEEL, 0.15)
    relief.add(np.abs(relief.y) - half, tint, 0.85, half)
    relief.cut(length * 0.46 - relief.x)
    cheeks = rod(relief.x, relief.y, (length * 0.3, 0), (length * 0.86, 0), (half * 0.92, half * 0.55))
    relief.add(cheeks, tint * 0.8, 0.95, half * 0.5, 0.0)
    slot = box(relief.x, relief.y, (length * 0.75, 0), (length * 0.32, half * 0.17), 0.5)
    relief.engrave(slot, DARK, 0.9)
    for side in (-1, 1):
        relief.engrave(disc(relief.x, relief.y, (length * 0.2, side * half * 0.5), 1.1), DARK, 0.85)
    relief.engrave(box(relief.x, relief.y, (length * 0.45, 0), (0.6, girth), 0.2), DARK, 0.8)
    relief.add(disc(relief.x, relief.y, (length * 0.82, 0), half * 0.36), tint, 1.0, half * 0.2, half * 0.3)
    _stain(relief, rng.uniform(0, 0.3))
    return relief.sprite(ball, (2, 0), WRIST, _brushed_grain(relief, 0.12, 3, 1.0))


def paint_knuckle(rng: np.random.Generator, ball: np.ndarray, unit: float, girth: float) -> Sprite:
    """Paint the second link of the wrist: pulleys, cables and a bolt."""
    length, half = girth * 0.9, girth * 0.36
    relief = Relief(rng, length + 8, girth + 4, unit)
    tint = vary(rng, STEEL, 0.15)
    body = rod(relief.x, relief.y, (half * 0.8 + 2, 0), (length - half * 0.3, 0), (half * 0.9, half * 0.75))
    relief.add(body, tint * 0.7, 0.8, half * 0.5)
    for side in (-1, 1):
        cable = rod(relief.x, relief.y, (4, side * half * 0.55), (length, side * half * 0.3), (0.8, 0.8))
        relief.engrave(cable, DARK, 0.8)
    for position, size in ((half + 2, 0.78), (length - half * 0.35, 0.85)):
        centre = (position, 0.0)
        relief.add(disc(relief.x, relief.y, centre, half * size), tint, 1.0, half * 0.25, half * 0.3)
        groove = np.abs(disc(relief.x, relief.y, centre, half * size * 0.6)) - 0.5
        relief.engrave(groove, DARK, 0.75)
        relief.add(disc(relief.x, relief.y, centre, half * 0.28), tint * 1.3, 1.1, 1.2, half * 0.6)
    _stain(relief, rng.uniform(0, 0.3))
    return relief.sprite(ball, (half + 2, 0), WRIST, _brushed_grain(relief, 0.15, 2, 1.0))


def paint_jaw(rng: np.random.Generator, ball: np.ndarray, unit: float, length: float, slotted: bool) -> Sprite:
    """Paint one slender jaw of a clasper, slotted or plain; the pair's closing side is y > 0."""
    relief = Relief(rng, length + 6, 18, unit)
    tint = vary(rng, (112, 112, 114), 0.1)
    jaw = rod(relief.x, relief.y, (3.5, 0), (length, 1.6), (5.2, 3.7))
    relief.add(jaw, tint, 0.95, 2.6)
    if slotted:
        slot = rod(relief.x, relief.y, (length * 0.38, 0.4), (length * 0.85, 1.2), (1.5, 1.2))
        relief.engrave(slot, (44, 22, 22), 0.9)
    else:
        ridge = rod(relief.x, relief.y, (length * 0.2, -1.0), (length * 0.9, 0.2), (1.1, 0.8))
        relief.add(ridge, tint * 1.2, 1.1, 1.0, 2.6)
    teeth = np.maximum(np.abs(relief.x % 2.6 - 1.3) - 0.65, 2.4 - relief.y - 0.01 * relief.x)
    relief.engrave(np.maximum(teeth, length * 0.3 - relief.x), DARK, 0.7)
    _stain(relief, rng.uniform(0, 0.3))
    return relief.sprite(ball, (3.5, 0), CLASPER, _brushed_grain(relief, 0.10, 8, 1.0))


def paint_holder_jaw(rng: np.random.Generator, ball: np.ndarray, unit: float, length: float) -> Sprite:
    """Paint one stout, blunt jaw of a needle holder with a cross-hatched golden insert."""
    relief = Relief(rng, length + 6, 26, unit)
    tint = vary(rng, (74, 73, 76), 0.12)
    jaw = np.minimum(
        rod(relief.x, relief.y, (5, 0), (length * 0.5, -1), (5.6, 6.2)),
        box(relief.x, relief.y, (length * 0.62, -0.4), (length * 0.36, 5.6), 2.6),
    )
    relief.add(jaw, tint, 0.6, 3.4)
    insert = box(relief.x, relief.y, (length * 0.66, 2.2), (length * 0.30, 2.4), 0.8)
    relief.add(insert, vary(rng, (168, 132, 62), 0.15), 0.55, 1.0, 3.2)
    hatch = np.minimum(
        np.abs((relief.x + relief.y) % 2.8 - 1.4) - 0.45, np.abs((relief.x - relief.y) % 2.8 - 1.4) - 0.45
    )
    relief.engrave(np.maximum(hatch, insert + 0.4), (60, 40, 16), 0.8)
    relief.engrave(disc(relief.x, relief.y, (5, 0), 1.6), DARK, 0.8)
    _stain(relief, rng.uniform(0, 0.25))
    return relief.sprite(ball, (5, 0), HOLDER, _brushed_grain(relief, 0.10, 6, 1.0))


def paint_suction(rng: np.random.Generator, ball: np.ndarray, unit: float, girth: float) -> Sprite:
    """Paint a smooth straight pipe with a rounded tip and rows of holes, its tip at x = SHAFT_LENGTH."""
    relief = Relief(rng, SHAFT_LENGTH + 4, girth + 8, unit)
    half = girth / 2
    tint = vary(rng, ((84, 88, 96), (128, 128, 122), (66, 78, 92))[rng.integers(3)], 0.15)
    end = SHAFT_LENGTH - half - 1
    relief.add(rod(relief.x, relief.y, (-half, 0), (end, 0), (half, half)), tint, 0.62, half)
    lip = np.abs(relief.x - (SHAFT_LENGTH - 52)) - 2.0
    relief.add(np.maximum(lip, np.abs(relief.y) - half - 1.3), tint * 0.8, 0.8, half, 0.8)
    for row, shift in ((-0.42, 0.0), (0.36, 5.5)):
        for position in SHAFT_LENGTH - 9 - shift - np.arange(4) * 10.5:
            hole = (float(position), row * half)
            relief.engrave(disc(relief.x, relief.y, hole, 2.3), np.add(tint, 90), 0.4)
            relief.engrave(disc(relief.x, relief.y, hole, 1.8), (26, 8, 8), 0.95)
    _stain(relief, rng.uniform(0.1, 0.4))
    return relief.sprite(ball, (SHAFT_LENGTH - 1, 0), SUCTION, _brushed_grain(relief, 0.06, 30, 1.0))


def paint_clamp(rng: np.random.Generator, ball: np.ndarray, unit: float) -> Sprite:
    """Paint a bulldog clip: two ribbed bars, crossed behind, and the ring of its spring."""
    relief = Relief(rng, 66, 34, unit)
    tint = vary(rng, CLAMPS[int(rng.integers(len(CLAMPS)))], 0.15)
    ring = np.abs(disc(relief.x, relief.y, (12, 0), 7.4)) - 2.4
    relief.add(ring, tint * 0.9, 0.7, 2.2)
    for side in (-1, 1):
        arm = rod(relief.x, relief.y, (16, -4.5 * side), (33, 4.2 * side), (2.8, 3.4))
        relief.add(arm, tint, 0.7, 2.4, 0.6 * (side + 1))
        bar = rod(relief.x, relief.y, (33, 4.2 * side), (61, 3.0 * side), (4.0, 3.0))
        relief.add(bar, tint, 0.7, 2.8)
        ribs = np.maximum(np.abs(relief.x % 4 - 2) - 0.8, bar + 0.9)
        relief.engrave(np.maximum(ribs, 36 - relief.x), tint * 0.35, 0.8)
    relief.add(disc(relief.x, relief.y, (24.5, 0), 3.0), tint * 1.2, 0.9, 1.5, 3.4)
    _stain(relief, rng.uniform(0, 0.3))
    return relief.sprite(ball, (33, 0), CLAMP, _brushed_grain(relief, 0.10, 4, 1.0))


def paint_needle(rng: np.random.Generator, ball: np.ndarray, unit: float) -> tuple[Sprite, float, float]:
    """Paint a curved needle; also return its radius in units and the half angle of its arc in radians."""
    radius, spread, thick = rng.uniform(20, 24), rng.uniform(1.2, 1.45), rng.uniform(2.7, 3.1)
    side = 2 * radius + 10
    relief = Relief(rng, side, side, unit)
    x, y = relief.x - side / 2, relief.y
    turn = np.arctan2(y, x)
    share = np.clip(turn, -spread, spread)
    girth = thick * np.clip(1.25 * (spread - share) / (2 * spread) + 0.55, 0.55, 1.0)
    arc = np.hypot(x - radius * np.cos(share), y - radius * np.sin(share)) - girth
    relief.add(arc, vary(rng, (140, 146, 156), 0.2), 1.0, thick)
    sprite = relief.sprite(ball, (side / 2, 0), NEEDLE, _brushed_grain(relief, 0.05, 4, 1.0))
    return sprite, radius, spread
