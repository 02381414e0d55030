"""Views of masks that were read, kept compressed: decoding their files takes longer than reading features."""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_MOST = 2**28  # bytes


class KeptMasks:
    """Masks by the key of a view and its name, as long as there is room.

    Args:
        cap: bytes at most.
    """

    def __init__(self, cap: int = _MOST) -> None:
        self._room = cap
        self._kept: dict[tuple[str, str], tuple[torch.Size, bytes]] = {}

    def get(self, key: tuple[str, str], read: Callable[[], np.ndarray]) -> Tensor:
        """Return a mask (H, W) uint8, by `read` where it is not kept."""
        if key not in self._kept:
            return torch.from_numpy(read())
        shape, content = self._kept[key]
        return torch.frombuffer(bytearray(zlib.decompress(content)), dtype=torch.uint8).view(shape)

    def keep(self, key: tuple[str, str], mask: Tensor) -> None:
        """Keep a mask (H, W) uint8 that `get` gave, here or in another process."""
        if key in self._kept or self._room <= 0:
            return
        content = zlib.compress(mask.contiguous().numpy().data, 1)
        if len(content) <= self._room:
            self._kept[key] = mask.shape, content
        self._room -= len(content)

    def __reduce__(self) -> tuple[type["KeptMasks"], tuple[()]]:
        return KeptMasks, ()  # a process that is not forked begins with none: sending them takes longer
