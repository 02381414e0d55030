"""Image files beyond Pillow's pixel limit, read row by row through libvips (extra `large`)."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoseg.inference.memory import free_bytes
from dinoseg.inference.rows import MemoryRows, Rows
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import ImageTooLarge, open_bounded, read_image, read_size
from dinoseg.utils.wording import in_bytes

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)  # that Pillow opens
_MAX_SIDE = 2**20  # pixels of a file that is read by rows


def open_rows(path: str | Path, device: torch.device) -> Rows:
    """Open an image file as rows: from memory up to Pillow's pixel limit, above it from the file.

    Raises:
        UserError: the file is missing, truncated or no image, or it is too large and pyvips is not installed.
    """
    if is_large(path):
        return FileRows(Path(path), device)
    return MemoryRows(torch.from_numpy(read_image(path).copy()).permute(2, 0, 1)[None].to(device))


def is_large(path: str | Path) -> bool:
    """Return whether an image file has more pixels than `read_image` reads."""
    try:
        read_size(path)
    except ImageTooLarge:
        return True
    except UserError:  # raised again when the image is read
        return False
    return False


class FileRows(Rows):
    """Rows of an image file of 8 bits, upright, without its alpha channel.

    libvips decodes files without random access (PNG, JPEG) to a temporary file, which it maps into memory.
    """

    count = 1

    def __init__(self, path: Path, device: torch.device) -> None:
        vips = _import_pyvips(path)
        with open_bounded(path):  # refuses headers of excessive cost
            pass
        try:
            # not from a name, whose brackets libvips reads as options
            source = vips.Source.new_from_file(str(path))
            image = vips.Image.new_from_source(source, "", fail_on="error").autorot()
        except vips.Error as error:
            raise UserError(f"Cannot read {path} as an image ({_describe(error)}). Replace or convert it.") from error
        if image.format != "uchar" or image.interpretation not in ("srgb", "b-w", "rgb") or image.bands > 4:
            raise UserError(
                f"{path} has {image.bands} channels of {image.format} ({image.interpretation}). Images of this size "
                "are read in 8 bits, RGB or grey. Convert it: vips colourspace IN OUT.tif srgb."
            )
        self.path, self.device, self.size = path, device, (image.height, image.width)
        self._check_space(image)
        self._pixels = image[:3] if image.bands > 2 else image[0]
        self._error = vips.Error

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8.

        Raises:
            UserError: the file is truncated or damaged.
        """
        width, bands = self.size[1], self._pixels.bands
        try:
            data = self._pixels.crop(0, top, width, bottom - top).write_to_memory()
        except self._error as error:
            raise UserError(f"Cannot read {self.path} ({_describe(error)}). Replace the file.") from error
        pixels = np.frombuffer(data, np.uint8).reshape(bottom - top, width, bands)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.device).expand(1, 3, -1, -1)

    def _check_space(self, image: Any) -> None:
        needed, free = math.prod(self.size) * image.bands, shutil.disk_usage(tempfile.gettempdir()).free
        # interlaced and progressive files need all pixels, or coefficients of 2 bytes, before the first row
        memory = 2 * needed if image.get_typeof("interlaced") else 0
        if memory > free_bytes(torch.device("cpu")):
            raise UserError(
                f"{self.path} of {self.size[1]} x {self.size[0]} pixels (width x height) is progressive or interlaced, "
                f"and decoding it needs {in_bytes(memory)} of memory. Free some, or save it as baseline: "
                "vips copy IN OUT.tif."
            )
        if max(self.size) > _MAX_SIDE or needed > free:
            raise UserError(
                f"{self.path} of {self.size[1]} x {self.size[0]} pixels (width x height) needs "
                f"{in_bytes(needed)} in {tempfile.gettempdir()}, where {in_bytes(free)} are free, and sides of "
                f"at most {_MAX_SIDE}. Reduce or split it, or set TMPDIR to a larger disk."
            )


def write_id_png(path: Path, ids: np.ndarray) -> None:
    """Write class IDs (H, W) uint8 to a grey PNG; above Pillow's pixel limit row by row, from a memory map."""
    height, width = ids.shape
    if ids.size <= MAX_PIXELS:
        Image.fromarray(ids).save(path, format="PNG", compress_level=1)
        return
    vips = _import_pyvips(path)
    vips.Image.new_from_memory(ids, width, height, 1, "uchar").pngsave(str(path), compression=1)


def _import_pyvips(path: Path) -> Any:
    """Import pyvips without libvips's loaders that are not meant for files from others.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyvips
    except (ImportError, OSError):  # OSError: pyvips without libvips
        raise UserError(
            f"{path} has more pixels than Pillow reads. Reduce or split it, or install libvips: "
            "pip install 'dinoseg[large]'."
        ) from None
    pyvips.block_untrusted_set(True)
    return pyvips


def _describe(error: Exception) -> str:
    """Return the lines of libvips in an error as one, without the first, which is that of pyvips."""
    return "; ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip()) or str(error)
