"""What the C library's heap takes for the tensors of a walk, its holes included: that library itself is asked."""

import ctypes
import sys
from typing import Any

from dinoseg.inference.memory import PeakBytes

_ALIGNED = 64  # bytes: as torch asks for it


class _Info(ctypes.Structure):
    """What glibc's mallinfo2 tells."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _glibc() -> Any:
    """Return the C library; None: another one, or an older one, which does not tell how large its heap is."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _Info
    library.aligned_alloc.restype = ctypes.c_void_p
    library.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    return library


class HeapBytes(PeakBytes):
    """Counts bytes of tensors, and takes memory for each as it would be taken, which nothing is written to.

    What is freed among what stays is of little use to later tensors: where blocks are computed again the heap of a
    process may be twice as large as the tensors in it.

    Attributes:
        grown: bytes that the heap has grown by at most; 0: the C library does not tell (glibc does, from 2.33 on), or
            gave no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grown = 0
        self._library = _glibc()
        self._tells = self._library is not None
        self._before = self._size() if self._tells else 0

    def _take(self, size: int) -> Any:
        address = None
        if self._tells:
            address = self._library.aligned_alloc(_ALIGNED, -(-max(size, 1) // _ALIGNED) * _ALIGNED)
            self.grown = max(self.grown, self._size() - self._before)
            if address is None:
                self._tells, self.grown = False, 0
        return super()._take(size), address

    def _free(self, taken: Any) -> None:
        size, address = taken
        super()._free(size)
        if address is not None:
            self._library.free(address)

    def _size(self) -> int:
        told = self._library.mallinfo2()
        return told.arena + told.hblkhd
