"""Images of more pixels than Pillow opens: they are read whole where memory suffices."""

from pathlib import Path

import torch

from dinoseg.inference.memory import free_bytes
from dinoseg.inference.rows import MemoryRows
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import ImageTooLarge, lift_pixel_limit, read_image, read_size
from dinoseg.utils.wording import in_bytes

_DECODING_BYTES = 24  # of memory per pixel: WebP takes 22, other formats up to 16 (docs/log/memory.md)


def is_large(path: str | Path) -> bool:
    """Return whether an image file has more pixels than `read_image` reads."""
    try:
        read_size(path)
    except ImageTooLarge:
        return True
    except UserError:  # raised again when the image is read
        return False
    return False


def read_rows(path: str | Path, device: torch.device) -> MemoryRows:
    """Read an image file of any size; its rows are copied to the device as they are requested.

    Raises:
        UserError: the file is missing, truncated or no image, or memory does not suffice.
    """
    with lift_pixel_limit():
        height, width = read_size(path)
        needed = _DECODING_BYTES * height * width
        free = free_bytes(torch.device("cpu"))
        if needed > free:
            raise UserError(
                f"{path} of {width} x {height} pixels (width x height) needs {in_bytes(needed)} of memory to be read, "
                f"and {in_bytes(free)} are free. Free some, or reduce or split the image."
            )
        pixels = torch.from_numpy(read_image(path).copy())
    return MemoryRows(pixels.permute(2, 0, 1)[None], device)
