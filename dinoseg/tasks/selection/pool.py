"""Images without masks: those of a folder or pattern, and the frames of videos at a time step."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoseg.data.splits import read_name_list
from dinoseg.data.video.access import ImageSource, VideoFrame
from dinoseg.data.video.index import VideoIndex, find_index
from dinoseg.inference.inputs import is_video, list_inputs
from dinoseg.inference.results import mask_names
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.images import IMAGE_SUFFIXES
from dinoseg.utils.wording import join_names

_RATE = 25.0  # frames per second of a video without a valid rate
_ROUNDING = 1e-6  # tolerance in seconds of a frame's time at a step


@dataclass(frozen=True)
class PoolImage:
    """Image, or frame of a video, that can be selected.

    Args:
        name: unique relative path without suffix: an image's path below the input, or a frame's number.
        source: where to read it from.
        time: of a frame, in seconds from the video's first; None for an image.
    """

    name: str
    source: ImageSource
    time: float | None = None


def found_in(
    source: str, *, every: float, cache_dir: Path, key: str = "input", also: Collection[str] = ()
) -> list[PoolImage]:
    """Return the images and frames that an image, video, folder or pattern refers to, in order.

    A video contributes the first frame of each `every` seconds. If the source is a single video, frames are named by
    their number, as in mode=track, else `<video>/<number>`.

    Args:
        source: as for `list_inputs`.
        every: seconds from frame to frame.
        cache_dir: folder of cached video indexes.
        key: config key of the source, for messages.
        also: names of further frames.

    Raises:
        UserError: nothing is found, or a video cannot be read.
    """
    paths = list_inputs(source, key)
    names = mask_names(paths, source)
    found: list[PoolImage] = []
    for path, name in zip(paths, names, strict=True):
        if is_video(path):
            found += _frames(path, "" if len(paths) == 1 else f"{name}/", every, cache_dir, also)
        else:
            found.append(PoolImage(name, path))
    return found


def named_in(labels: str) -> set[str]:
    """Return the names of labelled images, from a folder of their masks or a text file with a name per line.

    Raises:
        UserError: the path does not exist, or it names nothing.
    """
    path = Path(labels).expanduser()
    if not path.is_dir():
        return set(read_name_list(path, "labels"))
    files = [parent / name for parent, names in visible_files(path) for name in names]
    masks = {
        file.relative_to(path).with_suffix("").as_posix() for file in files if file.suffix.lower() in IMAGE_SUFFIXES
    }
    if not masks:
        raise UserError(
            f"labels={labels} holds no mask ({' '.join(IMAGE_SUFFIXES)}). Give the folder of existing masks, or leave "
            "it out if there are none."
        )
    return masks


def pool_indices(names: Collection[str], pool: list[PoolImage]) -> list[int]:
    """Return the indices of the named images in the pool.

    Raises:
        UserError: a name is not in the pool.
    """
    known = {candidate.name: index for index, candidate in enumerate(pool)}
    if absent := sorted(set(names) - known.keys()):
        raise UserError(
            f"labels names {len(absent)} of {len(names)} images that are not among the {len(pool)} to choose from: "
            f"{join_names(absent)}. Image names have the form {join_names([pool[0].name, pool[-1].name])}: name masks "
            "like their images, or leave labels out."
        )
    return sorted(known[name] for name in names)


def _frames(path: Path, before: str, every: float, cache_dir: Path, also: Collection[str]) -> Iterator[PoolImage]:
    times = _seconds(find_index(path, cache_dir))
    steps = np.floor((times + _ROUNDING) / every)
    first = np.unique(steps, return_index=True)[1]
    named = [index for index in range(len(times)) if also and f"{before}{index:09d}" in also]
    for index in np.union1d(first, named).astype(int).tolist():
        yield PoolImage(f"{before}{index:09d}", VideoFrame(path, index, cache_dir), float(times[index]))


def _seconds(index: VideoIndex) -> np.ndarray:
    """Return the time of each frame from the first on; evenly spaced if the file's own times are invalid."""
    if len(index) > 1 and np.all(np.diff(index.times) > 0):
        return (index.times - index.times[0]) / 1000
    return np.arange(len(index)) / (index.fps if 0 < index.fps <= 1000 else _RATE)
