"""A short video through the model or a tracker: its overlay as a video, its masks, and what areas they have."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoseg.data.video.decoder import FrameTooLarge
from dinoseg.inference.stream import run_pipeline
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.serving.answers import Look, png
from dinoseg.serving.clip_frames import ClipReader
from dinoseg.serving.jobs import Job
from dinoseg.serving.limits import ClipLimits, Refused
from dinoseg.utils.atomic import whole_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

FRAME, OVERLAY, MASKS = "frame.png", "overlay.mp4", "masks.zip"
_BATCH = 4  # frames that the model sees at once
_DEPTH = 2  # batches that wait on either side of it
_KINDS = {  # first bytes of video files to their suffix; ... stands for any byte
    ".mp4": (4, b"ftyp"),
    ".mkv": (0, b"\x1a\x45\xdf\xa3"),  # WebM too
    ".avi": (8, b"AVI "),
}

Frames = list[np.ndarray]
_Timed = list[tuple[np.ndarray, Fraction | None]]  # frames, and when they are shown


def kind_of(start: bytes) -> str:
    """Return the suffix of a video by its file's first bytes.

    A file's content chooses what reads it: a playlist in a video's place could make that read other files.

    Raises:
        Refused: it is no MP4, MOV, MKV, WebM or AVI.
    """
    for suffix, (at, mark) in _KINDS.items():
        if start[at : at + len(mark)] == mark:
            return suffix
    raise Refused(400, "format", "This is no video that is read here. Send MP4, MOV, WebM, MKV or AVI.")


def look_at(job: Job, path: Path, limits: ClipLimits, max_pixels: int) -> None:
    """Keep an uploaded clip's first frame, and note its size and length.

    Raises:
        Refused: it is no video, or too long or large.
    """
    try:
        with _reader(job, path, limits, max_pixels) as reader:
            (height, width), count, fps = reader.size, reader.count, reader.fps
            first, _ = next(reader.timed())
    except UserError as error:
        rule = "max_pixels" if isinstance(error, FrameTooLarge) else "unreadable"
        raise Refused(400, rule, str(error).replace(str(path), "the clip")) from error
    if count > limits.max_frames or count / fps > limits.max_seconds:
        raise Refused(400, "max_seconds", f"It has {count} frames, {count / fps:.0f} s. {_shorter(limits)}")
    write_png(job.folder / FRAME, first)
    job.total = count
    job.facts = {"width": width, "height": height, "fps": fps, "frames": count}


def check_objects(body: bytes, facts: dict[str, Any]) -> np.ndarray:
    """Return painted object ids (H, W) uint8 that came as so many bytes.

    Raises:
        Refused: they are not of the frame's size, or show no object.
    """
    height, width = facts["height"], facts["width"]
    if len(body) != height * width:
        raise Refused(400, "mask_size", f"A mask of {height * width} bytes is needed, a byte a pixel; got {len(body)}.")
    ids = np.frombuffer(body, np.uint8).reshape(height, width)
    if not ids.any() or ids.max() > 254:
        raise Refused(400, "no_object", "Nothing is painted: paint what is to be followed, as objects 1 to 254.")
    return ids


def make_overlay(
    job: Job, path: Path, limits: ClipLimits, look: Look, masks_of: Callable[[Frames], Sequence[np.ndarray]]
) -> None:
    """Write a clip's overlay and the masks of its frames, and note the areas.

    Raises:
        Cancelled: nobody wants them any more.
        UserError: the clip is longer than it said, or cannot be read to its end.
    """
    counts = np.zeros(256, np.int64)
    with (
        _reader(job, path, limits, job.facts["width"] * job.facts["height"]) as reader,
        VideoWriter(job.folder / OVERLAY, reader.rate, reader.size, like=reader.traits) as writer,
        whole_file(job.folder / MASKS) as part,
        zipfile.ZipFile(part, "w") as masks,  # PNGs are packed already
    ):

        def follow(frames: _Timed) -> tuple[_Timed, Sequence[np.ndarray]]:
            job.check()
            return frames, masks_of([frame for frame, _ in frames])

        def write(done: tuple[_Timed, Sequence[np.ndarray]]) -> None:
            nonlocal counts
            for (frame, time), mask in zip(*done, strict=True):
                writer.write(look.over(frame, mask), time)
                masks.writestr(f"{job.done:09d}.png", png(mask, tuple(look.palette)))
                counts = counts + np.bincount(mask.ravel(), minlength=256)
                job.done += 1

        run_pipeline(_batches(reader, limits), follow, write, depth=_DEPTH)
    job.facts, job.look = {**job.facts, "areas": _areas(counts, job.done, look)}, look


def redraw(job: Job, path: Path, limits: ClipLimits, look: Look) -> None:
    """Write a clip's overlay anew, of the masks that it has; raise what `make_overlay` does."""
    with zipfile.ZipFile(job.folder / MASKS) as masks:
        names = iter(masks.namelist())

        def masks_of(frames: Frames) -> Sequence[np.ndarray]:
            return [np.asarray(Image.open(masks.open(next(names)))) for _ in frames]

        make_overlay(job, path, limits, look, masks_of)


def _reader(job: Job, path: Path, limits: ClipLimits, max_pixels: int) -> ClipReader:
    """Return a clip's reader, which ends when the work on it is cancelled."""
    reader = ClipReader(path, limits, max_pixels)
    job.interrupt = reader.kill
    if job.cancelled.is_set():
        reader.kill()
    return reader


def _batches(reader: ClipReader, limits: ClipLimits) -> Iterator[_Timed]:
    frames = reader.timed()
    while batch := list(islice(frames, _BATCH)):
        if reader.frames_read > limits.max_frames:
            raise UserError(f"The clip has more frames than it says. {_shorter(limits)}")
        yield batch


def _areas(counts: np.ndarray, frames: int, look: Look) -> list[dict[str, Any]]:
    """Return for each id its name, colour, pixels of a frame on average and share of all."""
    return [
        {
            "id": label,
            "name": look.names(label),
            "colour": list(look.palette[label]),
            "pixels": round(int(counts[label]) / frames),
            "share": int(counts[label]) / int(counts.sum()),
        }
        for label in map(int, np.flatnonzero(counts))
    ]


def _shorter(limits: ClipLimits) -> str:
    return (
        f"At most {limits.max_frames} frames and {limits.max_seconds:g} s are taken (mode.clips.max_seconds): cut it."
    )
