"""Tracking of benchmark videos: prompts from their masks, and one written mask per frame."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from itertools import dropwhile, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinoseg.data.clips.videos import VOID, Video
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.indexed import voc_palette, write_indexed_png
from dinoseg.report.overlay import blend
from dinoseg.tracking.tracker import LabelledFrames, Tracker
from dinoseg.utils.atomic import whole_folder
from dinoseg.utils.errors import UserError

_DEPTH = 2  # batches queued before and after the tracker
_JPEG_QUALITY = 90


class PromptedFrame(NamedTuple):
    """Frame with the mask that prompts the tracker."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8
    labels: np.ndarray | None  # (H, W) uint8 IDs, 0 = background or no new object


def prompted_frames(video: Video, prompts: str) -> Iterator[PromptedFrame]:
    """Yield a video's frames, one at a time, with the masks that prompt a tracker; void becomes background.

    Args:
        video: video that is read frame by frame.
        prompts: `none`: no mask; `first`: the mask of frame 0; `appearing`: the mask of each object in the frame in
            which it appears, without the other objects.

    Raises:
        UserError: a frame differs in size from the first one, a mask differs from its frame, or frame 0 has no mask
            with `prompts` "first".
    """
    if prompts == "first" and 0 not in video.masks:
        raise UserError(
            f"Video {video.name} has no mask of its first frame, {video.frames[0]}, which defines its objects. Add "
            "this mask, or leave the video out."
        )
    size: tuple[int, ...] = ()
    known = np.zeros(256, dtype=bool)
    known[[0, VOID]] = True
    for position in range(len(video.frames)):
        image = video.image(position)
        size = size or image.shape
        if image.shape != size:
            raise UserError(
                f"Frames of video {video.name} differ in size: {video.frames[0]} is {_size(size)} (width x height), "
                f"{video.frames[position]} is {_size(image.shape)}. Make them equal."
            )
        wanted = prompts == "appearing" or (prompts == "first" and position == 0)
        mask = video.mask(position) if wanted else None
        if mask is not None and mask.shape != size[:2]:
            raise UserError(
                f"{video.frames[position]} is {_size(size)} (width x height), its mask {video.masks[position]} is "
                f"{_size(mask.shape)}. Replace the one that is wrong."
            )
        yield PromptedFrame(
            video.frame_name(position), image, None if mask is None else _new_objects(mask, known, position)
        )


def write_masks(
    video: Video,
    tracker: Tracker,
    folder: Path,
    *,
    prompts: str,
    blends: Path | None = None,
    written: Collection[str] | None = None,
    batch_size: int = 1,
) -> Throughput:
    """Track a video's objects and write `folder`/<frame>.png for each frame: IDs with the palette of DAVIS.

    Both folders appear only when complete. Frames before the first given mask contain no object.

    Args:
        video: video that is read frame by frame.
        tracker: tracker without any frame yet.
        folder: folder of the masks.
        prompts: see `prompted_frames`.
        blends: folder of <frame>.jpg, blends of frame and mask in equal parts; None: not written.
        written: names of the frames to write; None: all.
        batch_size: frames passed to the tracker at once.

    Raises:
        UserError: see `prompted_frames`, or an error of the tracker.
        OSError: the disk is full or not writable.
    """
    started = prompts == "none"

    def follow(batch: list[PromptedFrame]) -> list[tuple[PromptedFrame, np.ndarray]]:
        nonlocal started
        early = 0  # frames before the first mask, which a tracker that needs one would refuse
        while not started and early < len(batch):
            started = batch[early].labels is not None
            early += not started
        masks = [np.zeros(frame.image.shape[:2], np.uint8) for frame in batch[:early]]
        if rest := batch[early:]:
            masks += tracker.track([frame.image for frame in rest], [frame.labels for frame in rest])
        return list(zip(batch, masks, strict=True))

    tracker.look_ahead(lambda: _from_first_mask(video, prompts, batch_size))
    with ExitStack() as stack:
        for_masks = stack.enter_context(whole_folder(folder))
        for_blends = None if blends is None else stack.enter_context(whole_folder(blends))

        def write(tracked: list[tuple[PromptedFrame, np.ndarray]]) -> None:
            for frame, ids in tracked:
                if written is not None and frame.name not in written:
                    continue
                write_indexed_png(for_masks / f"{frame.name}.png", ids)
                if for_blends is not None:
                    tinted = blend(frame.image, ids, voc_palette(), opacity=0.5)
                    Image.fromarray(tinted).save(for_blends / f"{frame.name}.jpg", quality=_JPEG_QUALITY)

        return run_pipeline(_batches(prompted_frames(video, prompts), batch_size), follow, write, depth=_DEPTH)


def _from_first_mask(video: Video, prompts: str, batch_size: int) -> Iterator[LabelledFrames]:
    """Yield a video's frames and masks in batches, starting at the first mask if masks are prompts."""
    frames = dropwhile(lambda frame: prompts != "none" and frame.labels is None, prompted_frames(video, prompts))
    for batch in _batches(frames, batch_size):
        yield [frame.image for frame in batch], [frame.labels for frame in batch]


def _new_objects(mask: np.ndarray, known: np.ndarray, position: int) -> np.ndarray | None:
    """Return the objects of a mask that are not in `known` (256,) bool, and add them to it; None if there are none.

    The mask of frame 0 is returned even without objects.
    """
    new = (np.bincount(mask.ravel(), minlength=256) > 0) & ~known
    known |= new
    return np.where(new[mask], mask, 0).astype(np.uint8) if new.any() or position == 0 else None


def _batches(frames: Iterator[PromptedFrame], size: int) -> Iterator[list[PromptedFrame]]:
    while batch := list(islice(frames, size)):
        yield batch


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"
