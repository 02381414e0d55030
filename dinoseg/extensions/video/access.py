"""Exact random access to the frames of a video file, identical to decoding from the start."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dinoseg.core.sources import VirtualImage
from dinoseg.extensions.video.index import VideoIndex, checksum, file_key, find_index, open_decoder, time_of
from dinoseg.utils.errors import UserError

# torchcodec and OpenCV decode the same pixels, but like PyAV they seek to a wrong frame if timestamps are irregular, so
# each would need the index; torchcodec also needs a system FFmpeg
_OPEN = 4  # videos that a thread holds open
_NEAR = 96  # frames up to which decoding is cheaper than seeking, which decodes from the previous key frame
_BACK = (0, 32, 256)  # offsets before the wanted frame to seek to, in turn, until a key frame is found


@dataclass(frozen=True)
class VideoFrame(VirtualImage):
    """Frame `index` of a video file, counted from 0 in decoding order from the start.

    Args:
        path: the video.
        index: index of the frame.
        cache_dir: folder of the video's frame index; None: each process builds it in memory.
    """

    path: Path
    index: int
    cache_dir: Path | None = field(default=None, compare=False)
    is_file = False

    def __str__(self) -> str:
        return f"frame {self.index} of {self.path}"

    @property
    def paths(self) -> list[Path]:
        """Its only file, the video."""
        return [self.path]

    @property
    def rule(self) -> int:
        """The index."""
        return self.index

    @property
    def origin(self) -> str:
        """The path of the video with symlinks resolved, and the index."""
        return f"{os.path.realpath(self.path)}:{self.index}"

    def stat(self) -> os.stat_result:
        """Return the video file's size and times."""
        return self.path.stat()

    def read(self) -> np.ndarray:
        """Return the pixels (H, W, 3), see `read_frame`."""
        return read_frame(self.path, self.index, self.cache_dir)


def read_frame(path: Path, number: int, cache_dir: Path | None = None) -> np.ndarray:
    """Return a frame of a video as (H, W, 3) uint8 RGB.

    Seeking goes by time, and misses frames if some were dropped or the rate varies. Each frame is therefore checked
    against the video's index, which is built by decoding the whole file once. The result is the exact frame, or an
    error.

    Args:
        path: the video.
        number: of the frame, from 0 in decoding order.
        cache_dir: folder of the video's frame index; None: each process builds it in memory.

    Raises:
        UserError: the video is missing, damaged or truncated, or the frame does not exist.
    """
    index = find_index(path, cache_dir)
    if not 0 <= number < len(index):
        raise UserError(f"{path} has no frame {number}: it has {len(index)} frames, 0 to {len(index) - 1}.")
    from dinoseg.extensions.video.decoder import rgb

    return rgb(_reader(path, index).read(number))


class _Reader:
    """Open video that tracks its current frame."""

    def __init__(self, path: Path, index: VideoIndex) -> None:
        self._path, self._index = path, index
        self._orderly = bool(np.all(np.diff(index.times) > 0))  # otherwise times do not identify frames
        self._decoder = open_decoder(path)
        self._at = -1  # index of the last decoded frame

    def read(self, wanted: int) -> np.ndarray:
        for arrive in self._ways(wanted):
            if arrive() and self._forward(wanted):
                image = self._decoder.image()
                if checksum(image) == self._index.sums[wanted]:
                    return image
        raise UserError(
            f"Frame {wanted} of {self._path} has changed since the video was indexed: the file was modified, or the "
            "disk is failing. Run again, or replace the video."
        )

    def _ways(self, wanted: int) -> Iterator[Callable[[], bool]]:
        """Yield functions that move the video to `wanted` or before it, the cheapest first, a restart last."""
        if 0 <= self._at <= wanted <= self._at + _NEAR:
            yield lambda: True
        if self._orderly:
            for target in dict.fromkeys(max(0, wanted - back) for back in _BACK):
                yield partial(self._jump, target)
        yield self._restart

    def _jump(self, target: int) -> bool:
        times, self._at = self._index.times, -1
        try:
            self._decoder.jump(times[target])
        except OSError:
            return False
        if not self._decoder.advance():
            return False
        time = time_of(self._decoder)
        position = int(np.searchsorted(times, time))
        self._at = position if position < len(times) and times[position] == time else len(times)
        return self._at <= target

    def _restart(self) -> bool:
        self._decoder.close()
        self._decoder, self._at = open_decoder(self._path), -1
        return True

    def _forward(self, wanted: int) -> bool:
        while self._at < wanted:
            if not self._decoder.advance():
                return False
            self._at += 1
        return time_of(self._decoder) == self._index.times[wanted]


class _Open(threading.local):
    """Videos that a thread holds open (LRU)."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.readers: OrderedDict[tuple[Path, int, int], _Reader] = OrderedDict()


_open = _Open()
_inherited: list[OrderedDict] = []  # a parent's readers share file offsets with this process: never used or closed


def _reader(path: Path, index: VideoIndex) -> _Reader:
    if _open.pid != os.getpid():
        _inherited.append(_open.readers)
        _open.pid, _open.readers = os.getpid(), OrderedDict()
    key = file_key(path)
    if key not in _open.readers:
        _open.readers[key] = _Reader(path, index)
        if len(_open.readers) > _OPEN:
            _open.readers.popitem(last=False)
    _open.readers.move_to_end(key)
    return _open.readers[key]
