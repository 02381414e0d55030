"""Frame index of a video file: time and checksum of each frame, from one pass over the whole file."""

import contextlib
import functools
import hashlib
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_file, create_cache_dir
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError, WaitEnded
from dinoseg.utils.files import check_regular, open_regular
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.workers import in_processes

if TYPE_CHECKING:  # datasets of images do not need FFmpeg's libraries
    from dinoseg.extensions.video.decoder import Decoder

log = logging.getLogger(__name__)
_WORTH_A_PROCESS = 64 * 2**20  # bytes of video; a process takes a second to start
_PATIENCE = 600.0  # seconds to wait for the process that indexes a video: this one can index it, too
_known: dict[tuple[Path, int, int], "VideoIndex"] = {}


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Frames of a video file, in decoding order from its start."""

    times: np.ndarray  # (N,) float64, milliseconds on the file's own clock; all 0 if it has none
    sums: np.ndarray  # (N,) uint32, checksums of the decoded pixels
    fps: float  # by the container

    def __len__(self) -> int:
        return len(self.times)


class ArrayForm(NamedTuple):
    """Form of an array in an NPZ file."""

    kind: str  # data type, such as `<f8`
    axes: int


def read_arrays(path: Path, wanted: Mapping[str, ArrayForm]) -> dict[str, np.ndarray]:
    """Read the arrays of an NPZ file.

    Args:
        path: the file.
        wanted: name to form.

    Raises:
        SchemaError: if it is missing or damaged, or an array is missing or not of its form.
    """
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in wanted}
    except Exception as error:  # a damaged archive raises many exception types
        raise forms.SchemaError(str(error)[:200] or type(error).__name__) from None  # it may quote the whole file
    for name, array in arrays.items():
        if (array.dtype.str, array.ndim) != wanted[name]:
            raise forms.SchemaError(f"{name} is {array.dtype.str}{list(array.shape)}, not of the form {wanted[name]}")
    return arrays


def open_decoder(path: Path) -> "Decoder":
    """Open a video with a single-threaded decoder, which is fork-safe and does not compete with other processes.

    Raises:
        UserError: the file is missing or not a video.
    """
    from dinoseg.extensions.video.decoder import Decoder

    file_key(path)
    return Decoder(path, threads=1)


def time_of(decoder: "Decoder") -> float:
    """Return the time in milliseconds of a decoder's current frame; 0 if the file does not state it."""
    return float((decoder.time or 0) * 1000)


def file_key(path: Path) -> tuple[Path, int, int]:
    """Return the path with the file's size and modification time, to detect changes.

    Raises:
        UserError: the file does not exist, or is not a regular file.
    """
    try:
        check_regular(path)
        stat = path.stat()
    except OSError as error:
        raise UserError(f"Cannot read the video {path}: {error.strerror}. Check the path.") from None
    return path, stat.st_size, stat.st_mtime_ns


def checksum(image: np.ndarray) -> int:
    """Return the Adler-32 checksum of decoded pixels."""
    return zlib.adler32(np.ascontiguousarray(image).data)


def find_index(path: Path, cache_dir: Path | None) -> VideoIndex:
    """Return the index of a video from memory or its cache file; otherwise build it by decoding the whole video.

    Raises:
        UserError: the file is missing, damaged, truncated or not a video.
    """
    key = file_key(path)
    if key not in _known:
        index_path = _file_of(key, cache_dir)
        index = _load(index_path)
        if index is None:
            with _index_lock(index_path):  # another process may have built it by then
                index = _load(index_path) or _make(path, index_path)
        _known[key] = index
    return _known[key]


def index_videos(
    paths: Sequence[Path], cache_dir: Path | None, *, workers: int | None = None
) -> tuple[dict[Path, VideoIndex], dict[Path, str]]:
    """Return the index of each video, and the errors of those without one.

    One process per 64 MiB of video, and at most one per core, share the work. Indexes are cached for later runs.
    """
    indexes: dict[Path, VideoIndex] = {}
    wrong: dict[Path, str] = {}
    waiting: dict[Path, int] = {}
    for path in dict.fromkeys(paths):
        try:
            key = file_key(path)
        except UserError as error:
            wrong[path] = str(error)
            continue
        if index := _known.get(key) or _load(_file_of(key, cache_dir)):
            indexes[path] = _known[key] = index
        else:
            waiting[path] = key[1]
    if workers is None:
        share = math.ceil(sum(waiting.values()) / _WORTH_A_PROCESS)
        workers = min(count_cores(), share)
    with Bar(total=len(waiting), desc="indexing videos", unit="video", delay=2) as bar:
        work = functools.partial(find_index, cache_dir=cache_dir)
        remedy = "Free some memory and run again to resume."
        for path, made in in_processes(work, list(waiting), workers, catch=UserError, in_order=False, remedy=remedy):
            if isinstance(made, UserError):
                wrong[path] = str(made)
            else:
                indexes[path] = _known[file_key(path)] = made
            bar.update()
    return {path: indexes[path] for path in paths if path in indexes}, {p: wrong[p] for p in paths if p in wrong}


def _make(path: Path, index_path: Path | None) -> VideoIndex:
    index = _scan(path)
    if index_path is not None:
        _save(index_path, index)
    return index


def _scan(path: Path) -> VideoIndex:
    decoder = open_decoder(path)
    try:
        times: list[float] = []
        sums: list[int] = []
        while decoder.advance():
            times.append(time_of(decoder))
            sums.append(checksum(decoder.image()))
        decoder.check_whole()
    finally:
        decoder.close()
    return VideoIndex(np.array(times, dtype=np.float64), np.array(sums, dtype=np.uint32), decoder.fps)


def _file_of(key: tuple[Path, int, int], cache_dir: Path | None) -> Path | None:
    if cache_dir is None:
        return None
    from dinoseg.extensions.video.decoder import VERSION

    path, *rest = key
    digest = hashlib.sha256(repr((str(path.resolve()), *rest, VERSION)).encode()).hexdigest()
    return cache_dir.expanduser() / "videos" / f"{path.stem}_{digest[:16]}.npz"


def _load(index_path: Path | None) -> VideoIndex | None:
    if index_path is None or not index_path.is_file():
        return None
    try:
        lists = {"times": ArrayForm("<f8", 1), "sums": ArrayForm("<u4", 1)}
        arrays = read_arrays(index_path, {**lists, "fps": ArrayForm("<f8", 0)})
        index = VideoIndex(arrays["times"], arrays["sums"], float(arrays["fps"]))
        if not 0 < len(index.times) == len(index.sums) or not np.isfinite([*index.times, index.fps]).all():
            raise forms.SchemaError(
                f"{len(index.times)} times and {len(index.sums)} checksums, or values that are not numbers"
            )
        return index
    except (OSError, forms.SchemaError) as error:
        log.warning("The stored index %s is damaged (%s): indexing again.", index_path, error)
        with contextlib.suppress(OSError):
            index_path.unlink()
        return None


def _save(index_path: Path, index: VideoIndex) -> None:
    try:
        with atomic_file(index_path) as part, part.open("wb") as file:
            np.savez(file, times=index.times, sums=index.sums, fps=index.fps)
    except OSError as error:
        log.warning("Cannot store the index in %s (%s): the next run indexes again.", index_path, error)


@contextlib.contextmanager
def _index_lock(index_path: Path | None) -> Iterator[None]:
    """Hold the lock of an index file, unless its folder cannot be written or its holder hangs.

    Several processes may then build it.
    """
    with contextlib.ExitStack() as stack:
        if index_path is not None:
            with contextlib.suppress(OSError, WaitEnded):
                create_cache_dir(index_path.parents[1])
                stack.enter_context(hold_lock(index_path.with_suffix(".lock"), limit=_PATIENCE))
        yield
