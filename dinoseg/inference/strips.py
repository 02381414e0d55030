"""Images too large for memory, as rows of their files: TIFF, PNG and .npy on demand, JPEG if memory allows."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from dinoseg.inference.memory import free_bytes
from dinoseg.inference.png_rows import PngFileRows, PngLayout
from dinoseg.inference.rows import MemoryRows, Rows, Size, as_rows
from dinoseg.inference.tiff_rows import TiffLayout, TiffRows
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular
from dinoseg.utils.image_cost import Unfit, check_cost
from dinoseg.utils.images import open_bounded, read_image, read_orientation

MAX_HELD = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)  # maximum number of pixels that Pillow opens
_TIFF, _JPEG = (".tif", ".tiff"), (".jpg", ".jpeg")
_LATER = (
    "Images of any size are read from a PNG file of 8 bits that is not interlaced; from a TIFF file of 8 bits, grey or "
    "RGB, in strips or tiles, uncompressed or by LZW, deflate, PackBits, JPEG or Zstandard; and from a .npy file, (H, "
    "W, 3) uint8. Convert it, for example with libvips: vips copy IN OUT.png."
)


def open_rows(path: str | Path, device: torch.device) -> Rows:
    """Open an image file as rows: TIFF, PNG and .npy files are read on demand, others are loaded into memory.

    Raises:
        UserError: the file is missing, truncated or no image, or is too large and of a kind that must be loaded whole.
    """
    path = Path(path)
    check_regular(path)
    if path.suffix.lower() == ".npy":
        return ArrayRows(path, device)
    layout = _layout(path)
    if isinstance(layout, TiffLayout):
        return TiffRows(path, layout, device)
    if isinstance(layout, PngLayout):
        return PngFileRows(path, layout, device)
    if layout is not None and math.prod(layout.size) > MAX_HELD:
        return JpegRows(path, device)
    try:
        image = read_image(path)
    except UserError as error:
        raise UserError(f"{error} {_LATER}") from error
    return MemoryRows(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(device))


def only_in_strips(path: Path) -> bool:
    """Return whether an image file is too large for `read_image` but can be read by `open_rows`."""
    try:
        layout = _layout(path)
    except (OSError, UserError):  # the error is raised when the image is read
        return False
    return layout is not None and math.prod(layout.size) > MAX_HELD


def _layout(path: Path) -> "TiffLayout | PngLayout | JpegLayout | None":
    """Read a file's header; None: it is of a kind that must be loaded whole.

    Raises:
        UserError: the content does not match the suffix.
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in _TIFF:
        return TiffLayout.of(path)
    if suffix == ".png":
        return PngLayout.of(path)
    return JpegLayout.of(path) if suffix in _JPEG else None


class ArrayRows(Rows):
    """Rows of an array (H, W, 3) uint8 in a .npy file, memory-mapped without unpickling."""

    count = 1

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            self.pixels = np.lib.format.open_memmap(path, mode="r")  # np.load takes archives, too
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"Cannot read {path} as an array ({error}). Write it with numpy.save.") from error
        shape: tuple[int, ...] = getattr(self.pixels, "shape", ())
        if len(shape) != 3 or shape[2] != 3 or self.pixels.dtype != np.uint8 or 0 in shape:
            raise UserError(f"{path} holds {shape} of {self.pixels.dtype}; it must hold (H, W, 3) of uint8, RGB.")
        self.size, self.device = (shape[0], shape[1]), device

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8."""
        return as_rows(np.array(self.pixels[top:bottom]), self.device)


class JpegLayout:
    """Header of a JPEG file: its size (H, W), and the bytes needed to decode it."""

    def __init__(self, image: JpegImageFile) -> None:
        pixels = image.width * image.height
        self.size: Size = (image.height, image.width)
        self.is_turned = read_orientation(image) != 1
        held = pixels * (1 if image.mode == "L" else 4) * (2 if self.is_turned else 1)
        # progressive files need all coefficients, 2 bytes each, before the first pixel
        self.bytes = held + (6 * pixels if image.info.get("progressive") else 0)

    @classmethod
    def of(cls, path: Path) -> "JpegLayout | None":
        """Read a file's header; None: it is no JPEG file.

        Raises:
            UserError: its header has too many segments.
        """
        try:
            with open_bounded(path) as file, JpegImageFile(file) as image:
                return cls(image)
        except (OSError, SyntaxError, ValueError):
            return None


class JpegRows(Rows):
    """Rows of a JPEG file that is decoded whole: 4 bytes per pixel, checked against free memory."""

    count = 1

    def __init__(self, path: Path, device: torch.device) -> None:
        """Decode the file.

        Raises:
            UserError: memory does not suffice, or the file is truncated or has too many scans.
        """
        try:
            # `Image.open` would refuse the file for its size alone
            with open_bounded(path) as file, JpegImageFile(file) as image:
                layout, free = JpegLayout(image), free_bytes(torch.device("cpu"))
                if layout.bytes > free:
                    raise UserError(
                        f"{path} of {image.width} x {image.height} pixels has to be decoded as a whole, which needs "
                        f"about {layout.bytes / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free. {_LATER}"
                    )
                check_cost(image)
                image.load()
                self._image: Image.Image = ImageOps.exif_transpose(image) if layout.is_turned else image
        except Unfit as error:
            raise UserError(f"{path} {error}.") from None
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise UserError(f"Cannot read {path} as an image ({error or 'no memory left'}). {_LATER}") from error
        self.size, self.device = (self._image.height, self._image.width), device

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8."""
        part = self._image.crop((0, top, self.size[1], bottom)).convert("RGB")
        return as_rows(np.array(part), self.device)
