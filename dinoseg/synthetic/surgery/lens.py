"""The endoscope: its light, colour, focus and noise."""

import cv2
import numpy as np

from dinoseg.synthetic.noise import Wander

NOISES = 7  # how many noise pictures are reused in turn


class Lens:
    """Turn what is there into what the camera records."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        height, width = size
        rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        centre = rng.uniform(-0.25, 0.25, 2)
        away = np.hypot((columns - centre[0]) * 0.9, (rows - centre[1]) * 0.75)
        fall = np.clip(1.12 - rng.uniform(0.35, 0.6) * away**2, 0.2, 1.15)
        balance = rng.uniform(0.92, 1.08, 3) * rng.uniform(1.0, 1.4)
        self._light = np.clip(fall[..., None] * balance * 160, 0, 255).astype(np.uint8)  # 160 = unchanged
        self._gain = Wander(rng, 0.92, 1.08, 5.0)
        self._blur = [Wander(rng, 0.35, 0.75, 3.0) for _ in range(2)]
        self._haze = rng.uniform(0, 14)
        strength = rng.uniform(2.0, 4.0)
        self._noise = [_grain(rng, strength, size) for _ in range(NOISES)]

    def expose(self, rgb: np.ndarray, seconds: float) -> np.ndarray:
        """Return the recorded picture (H, W, 3) uint8."""
        seen = cv2.multiply(rgb, self._light, scale=self._gain(seconds) / 160)
        seen = cv2.GaussianBlur(seen, (3, 3), self._blur[0](seconds), sigmaY=self._blur[1](seconds))
        noise = self._noise[round(seconds * 1000) // 7 % NOISES]
        return cv2.addWeighted(seen, 1 - self._haze / 255, noise, 1.0, self._haze - 128)


def _grain(rng: np.random.Generator, strength: float, size: tuple[int, int]) -> np.ndarray:
    """Return sensor noise (H, W, 3) uint8 around 128."""
    grain = rng.standard_normal((*size, 3), np.float32)
    return np.clip(np.rint(128 + strength * grain), 0, 255).astype(np.uint8)
