"""Reading and writing picture files, strictly: a truncated or foreign file is an error that names it."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dinoseg.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def read_image(path: str | Path) -> np.ndarray:
    """Return a picture as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Raises:
        UserError: the file is missing, truncated or no picture.
    """
    return np.asarray(_decode(path, _upright_rgb))


def read_ids(path: str | Path) -> np.ndarray:
    """Return a mask file's stored numbers: (H, W) for grey and palette files, (H, W, 3) for RGB ones.

    A palette file gives its indices, not its colours; 16-bit files keep their values.

    Raises:
        UserError: the file is missing, truncated or no picture.
    """
    return np.asarray(_decode(path, _stored_numbers))


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 without loss; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(pixels).save(part, format="PNG", compress_level=1)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError("it has more than 8 bits a channel, which would be clipped: convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert("RGB")


def _stored_numbers(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "P", "I;16", "I", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _decode(path, convert) -> Image.Image:
    path = Path(path)
    try:
        with Image.open(path) as image:
            image.load()
            return convert(image)
    except FileNotFoundError:
        raise UserError(f"No such file: {path}. Check the path.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"Cannot read {path} as a picture ({error}). It is truncated or no picture: replace or remove it."
        ) from None
