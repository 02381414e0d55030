"""User-supplied masks for a video: of its first frame, and of later frames in which objects appear."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.video.frames import FrameReader
from dinoseg.extensions.video.pictures import picture_files
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_exists
from dinoseg.utils.images import IMAGE_SUFFIXES, lossy_format, read_ids
from dinoseg.utils.wording import count_of, join_names

_NAMES = "named like the frames of a folder, or by frame number, from 0 (000000040.png or 40.png)"


class TrackLabels:
    """Mask files by frame index, with the path that the user gave."""

    def __init__(self, files: Mapping[int, Path], size: tuple[int, int], source: str | None = None) -> None:
        self.files, self.source = dict(files), source
        self._size = size
        self._one_object: bool | None = None  # None until a non-empty mask has been read

    def read(self, position: int) -> np.ndarray | None:
        """Return a frame's object IDs (H, W) uint8, 0 = background, 255 = void; None if it has no mask.

        If the first non-empty mask holds only 0 and 255, then 255 is an object with ID 1 in every mask.

        Raises:
            UserError: the file is unreadable, lossy, coloured or of another size, or holds IDs above 255.
        """
        path = self.files.get(position)
        if path is None:
            return None
        ids = _ids(path, self._size)
        if self._one_object is None and ids.any():
            self._one_object = self._shows_one_object()
        return np.where(ids == VOID, np.uint8(1), ids) if self._one_object else ids

    def _shows_one_object(self) -> bool:
        paths = (self.files[position] for position in sorted(self.files))
        masks = (_ids(path, self._size) for path in paths)
        first = next(ids for ids in masks if ids.any())
        return not ((first != 0) & (first != VOID)).any()


def find_labels(source: str | None, frames: FrameReader) -> TrackLabels:
    """Find the masks in a file (of the first frame) or a folder; without a source, the result is empty.

    Raises:
        UserError: the path does not exist, the first frame has no mask, or a mask has no frame.
    """
    if source is None:
        return TrackLabels({}, frames.size)
    path = Path(source).expanduser()
    if path.is_dir():
        return TrackLabels(_in_folder(path, frames), frames.size, source)
    check_exists(source, "labels", f"Give the mask of the first frame, or a folder of masks {_NAMES}.")
    position = frames.position(path.stem)
    if position:
        raise UserError(
            f"labels={source} is named like frame {position}, but the first frame is {frames.frame_name(0)}. Give a "
            f"mask of the first frame, or an input that starts at {path.stem}."
        )
    return TrackLabels({0: path}, frames.size, source)


def _in_folder(folder: Path, frames: FrameReader) -> dict[int, Path]:
    names = picture_files(folder)
    if not names:
        raise UserError(
            f"The folder labels={folder} holds no mask directly. Masks are image files ({' '.join(IMAGE_SUFFIXES)}) "
            f"{_NAMES}."
        )
    lone = [file for name, file in names.items() if frames.position(name) is None]
    if lone:
        raise UserError(
            f"labels={folder} has {count_of(lone, 'mask')} without frame in {frames.path}: {join_names(lone)}. Masks "
            f"are {_NAMES}."
        )
    masks: dict[int, Path] = {}
    for name, file in names.items():
        position = frames.position(name)
        assert position is not None
        if position in masks:
            raise UserError(f"{masks[position]} and {folder / file} are masks of the same frame: keep one of them.")
        masks[position] = folder / file
    if 0 not in masks:
        raise UserError(
            f"labels={folder} has no mask for the first frame, {frames.frame_name(0)}; it has "
            f"{join_names([frames.frame_name(position) for position in sorted(masks)])}. Add one, or give an input "
            "that starts at the first mask."
        )
    return masks


def _ids(path: Path, size: tuple[int, int]) -> np.ndarray:
    ids = read_ids(path)
    lossy = lossy_format(path)
    if lossy:
        raise UserError(
            f"{path} has a lossy format ({lossy}): pixels at the edges of objects get wrong ids. Save the mask "
            "as a grey or palette PNG in the annotation tool; converting this file keeps the wrong ids."
        )
    if ids.ndim == 3:
        if not (ids == ids[..., :1]).all():
            raise UserError(
                f"{path} is a colour image, not a mask of object ids. Save the mask as a grey or palette PNG of object "
                "ids: 0 for the background, 1, 2, ... for objects."
            )
        ids = ids[..., 0]
    if ids.shape != size:
        raise UserError(
            f"{path} is {ids.shape[0]} x {ids.shape[1]} pixels, but the frames are {size[0]} x {size[1]} (H x W). Give "
            "a mask of the frames' size, resized without smoothing (nearest neighbour)."
        )
    if ids.min() < 0 or ids.max() > VOID:
        raise UserError(
            f"{path} holds the object id {ids.min() if ids.min() < 0 else ids.max()}: ids go from 1 to 254, 0 is the "
            f"background and {VOID} void. Renumber the objects, and save the mask with 8 bits."
        )
    return ids.astype(np.uint8)
