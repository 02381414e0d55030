"""Canvas that composes parts: colour and class ids come from the same coverage, so that both agree."""

import cv2
import numpy as np

from dinoseg.extensions.rendering.relief import Sprite

FINEST = 8  # below this width in pixels, lines are supersampled to get their exact width
SHADE = 0.55  # share of the light that a shadow removes


class Canvas:
    """A frame under construction: `rgb` (H, W, 3) uint8 and `mask` (H, W) uint8.

    `numbers` (H, W) uint8 are those of the instruments: the paint at a pixel has the number `number` of its time.
    `unit` is the length in pixels of one design unit; `camera` is the shift (x, y) in pixels of objects fixed to the
    tissue relative to the frame.
    """

    def __init__(self, rgb: np.ndarray, unit: float, camera: np.ndarray) -> None:
        self.rgb, self.unit, self.camera = rgb, unit, camera
        self.mask: np.ndarray = np.zeros(rgb.shape[:2], np.uint8)
        self.numbers: np.ndarray = np.zeros(rgb.shape[:2], np.uint8)
        self.number = 1

    def paste(self, sprite: Sprite, place: np.ndarray, scale: float = 1.0, gain: float = 1.0) -> None:
        """Paste a part with its joint at `place`: (x, y, angle[, squash]), in pixels and radians.

        `squash` shrinks it across its axis, as a turn out of the image plane does.
        """
        forward = _placement(sprite, place, scale)
        warped = self._warp(sprite.rgba, forward)
        if warped is None:
            return
        seen, corner = warped
        cover = seen[..., 3]
        colour = cv2.cvtColor(seen, cv2.COLOR_RGBA2RGB)
        if gain != 1.0:
            colour = cv2.convertScaleAbs(colour, alpha=gain)
        self.lay(colour, cover, sprite.label, corner)

    def shade(self, sprite: Sprite, place: np.ndarray, scale: float, lift: float) -> None:
        """Draw the soft shadow of a part that floats `lift` units above the surface."""
        forward = _placement(sprite, place, scale)
        forward[:, 2] += 0.35 * lift * self.unit, 0.8 * lift * self.unit
        room_y = (sprite.shadow.shape[0] * 4 - sprite.rgba.shape[0]) // 8 * 4
        room_x = (sprite.shadow.shape[1] * 4 - sprite.rgba.shape[1]) // 8 * 4
        forward[:, 2] -= forward[:, :2] @ (room_x - 1.5, room_y - 1.5)
        forward[:, :2] *= 4
        warped = self._warp(sprite.shadow, forward)
        if warped is not None:
            dark, corner = warped
            self._darken(dark, SHADE, corner)

    def stroke(self, points: np.ndarray, thick: int, window: tuple[int, int, int, int]) -> np.ndarray:
        """Return the coverage (h, w) uint8 of a line of `thick` pixels along `points` (N, 2) in a window."""
        left, top, right, bottom = window
        cover = np.zeros((bottom - top, right - left), np.uint8)
        if thick >= FINEST:
            fixed = np.rint((points - (left, top)) * 16).astype(np.int32)
            cv2.polylines(cover, [fixed], False, 255, thick, cv2.LINE_AA, 4)
            return cover
        # cv2 widens thin antialiased lines by up to two pixels: draw enlarged, then downsample
        large = cv2.resize(cover, None, fx=4, fy=4)
        fixed = np.rint((points - (left, top) + 0.5) * 64 - 8).astype(np.int32)
        cv2.polylines(large, [fixed], False, 255, 4 * thick - 2, cv2.LINE_8, 4)
        return cv2.resize(large, cover.shape[::-1], interpolation=cv2.INTER_AREA)

    def shade_stroke(self, points: np.ndarray, thick: int, lift: float, strength: float) -> None:
        """Draw the shadow of a line."""
        moved = points + (0.3 * lift * self.unit, 0.8 * lift * self.unit)
        window = self.around(moved, thick + 4 * self.unit)
        if window is not None:
            dark = cv2.GaussianBlur(self.stroke(moved, thick, window), (0, 0), max(0.3, 0.12 * thick + 0.5))
            self._darken(dark, strength, window[:2])

    def around(self, points: np.ndarray, reach: float) -> tuple[int, int, int, int] | None:
        """Return the frame area (left, top, right, bottom) within `reach` of the points, or None if it is empty."""
        height, width = self.mask.shape[:2]
        left, top = np.maximum(np.floor(points.min(axis=0) - reach).astype(int), 0)
        right, bottom = np.minimum(np.ceil(points.max(axis=0) + reach).astype(int) + 1, (width, height))
        return (int(left), int(top), int(right), int(bottom)) if left < right and top < bottom else None

    def lay(self, colour: np.ndarray, cover: np.ndarray, label: int, corner: tuple[int, int]) -> None:
        """Blend premultiplied `colour` (h, w, 3) with `cover` (h, w) at `corner` (x, y), and set the class id."""
        left, top = corner
        part = np.s_[top : top + cover.shape[0], left : left + cover.shape[1]]
        behind = cv2.cvtColor(cv2.bitwise_not(cover), cv2.COLOR_GRAY2RGB)
        self.rgb[part] = cv2.add(cv2.multiply(self.rgb[part], behind, scale=1 / 255), colour)
        self.mask[part][cover > 127] = label
        self.numbers[part][cover > 127] = self.number

    def _darken(self, dark: np.ndarray, strength: float, corner: tuple[int, int]) -> None:
        left, top = corner
        part = np.s_[top : top + dark.shape[0], left : left + dark.shape[1]]
        factor = cv2.convertScaleAbs(dark, alpha=-strength, beta=0)
        factor = cv2.cvtColor(cv2.bitwise_not(factor), cv2.COLOR_GRAY2RGB)
        self.rgb[part] = cv2.multiply(self.rgb[part], factor, scale=1 / 255)

    def _warp(self, pixels: np.ndarray, forward: np.ndarray) -> tuple[np.ndarray, tuple[int, int]] | None:
        """Return the visible part of moved pixels, and its corner (x, y) in the frame; None if nothing is visible."""
        height, width = pixels.shape[:2]
        corners = np.array([(0, 0), (width, 0), (0, height), (width, height)], np.float64)
        window = self.around(corners @ forward[:, :2].T + forward[:, 2], 1)
        if window is None:
            return None
        left, top, right, bottom = window
        forward[:, 2] -= left, top
        return cv2.warpAffine(pixels, forward, (right - left, bottom - top), flags=cv2.INTER_LINEAR), (left, top)


def _placement(sprite: Sprite, place: np.ndarray, scale: float) -> np.ndarray:
    x, y, angle = place[:3]
    squash = place[3] if len(place) > 3 else 1.0
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    turn = np.array([[cosine, -sine * squash], [sine, cosine * squash]])
    shift = np.array([x, y]) - turn @ sprite.pivot
    return np.column_stack([turn, shift])
