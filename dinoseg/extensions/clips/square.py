"""Centred squares of frames and masks, as SlotContrast evaluates them."""

import numpy as np
import torch
import torch.nn.functional as F


def resize_bicubic(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 at `size` (H, W): bicubic without antialiasing, clamped to 0..255."""
    pixels = torch.tensor(frame.copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size, mode="bicubic")[0].clamp(0, 255).round()
    return resized.to(torch.uint8).permute(1, 2, 0).numpy()


def square_frame(frame: np.ndarray, side: int) -> np.ndarray:
    """Return the centred square of a frame (H, W, 3) uint8, resized to `side` pixels with `resize_bicubic`."""
    square = _centre(frame)
    return square if len(square) == side else resize_bicubic(square, (side, side))


def square_mask(ids: np.ndarray, side: int) -> np.ndarray:
    """Return the centred square of ids (H, W) uint8, resized to `side` pixels: that of the nearest pixel centre."""
    square = torch.tensor(_centre(ids).copy())
    return F.interpolate(square[None, None], (side, side), mode="nearest-exact")[0, 0].numpy()


def _centre(pixels: np.ndarray) -> np.ndarray:
    """Return the centred square (S, S, ...) of pixels (H, W, ...), rounded to even as torchvision's centre crop."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return pixels[top : top + side, left : left + side]
