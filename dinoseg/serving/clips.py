"""Short videos in the app: isolated decoding, segmentation or tracking, overlay video, masks and areas."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoseg.data.video.decoder import FrameTooLarge
from dinoseg.data.video.length import has_more_packets
from dinoseg.inference.stream import run_pipeline
from dinoseg.inference.video_file import EncodedSound, VideoReader, VideoTraits
from dinoseg.inference.video_writer import SoundReader, VideoWriter
from dinoseg.serving.answers import MaskStyle, png
from dinoseg.serving.jobs import UploadJob
from dinoseg.serving.limits import MIB, ClipLimits, Refused
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.child import Channel, Child, ChildEnded, Message
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

SECONDS = 10.0  # timeout for opening a clip, or decoding one frame of it
_BYTES_PER_PIXEL, _MORE = 64, 512 * MIB  # memory limit of decoding: reference frames, and threads
_PACKETS = 2000  # packets of all streams per second of a clip


class ClipReader:
    """Frames and properties of a clip as `VideoReader` gives them, decoded in a child process.

    Args:
        path: of the clip.
        limits: of its length.
        max_pixels: of a frame.
        sound: encode the sound as well, into `traits`.
    """

    size: tuple[int, int]  # (H, W); this and the next ones are set when the clip is opened
    count: int  # number of frames, by the header
    rate: Fraction
    fps: float
    traits: VideoTraits

    def __init__(self, path: Path, limits: ClipLimits, max_pixels: int, *, sound: bool = False) -> None:
        self.path, self.frames_read = path, 0
        packets = int(_PACKETS * limits.max_seconds)
        self._request = {
            "path": str(path),
            "max_pixels": max_pixels,
            "packets": packets,
            "sound": sound * limits.max_seconds,
        }
        self._child = Child(send_frames, _MORE + _BYTES_PER_PIXEL * max_pixels)

    def __enter__(self) -> "ClipReader":
        """Open the clip.

        Raises:
            FrameTooLarge: if its frames have more than `max_pixels`.
            UserError: if it is no video, takes too long, or has far more packets than frames and sound need.
        """
        try:
            about, _ = self._next(self._request)
            self.size, self.count = (about["size"][0], about["size"][1]), about["count"]
            self.rate, tick, aspect = (Fraction(*about[name]) for name in ("rate", "tick", "aspect"))
        except BaseException:
            self._child.close()
            raise
        self.fps = float(self.rate)
        self._sound = EncodedSound(*about["sound"]) if about["sound"] else None
        self.traits = VideoTraits(tick, aspect, tuple(about["colours"]), self._sound)
        return self

    def __exit__(self, *error: object) -> None:
        """Release the clip."""
        self._child.close()

    def timed(self) -> Iterator[tuple[np.ndarray, Fraction | None]]:
        """Yield each frame (H, W, 3) uint8 RGB with its presentation time.

        The time is in seconds from the clip's start, or None where the clip does not state it.

        Raises:
            UserError: if the clip is damaged, or a frame takes too long.
        """
        while True:
            header, pixels = self._next()
            if "end" in header:
                return
            if "first" in header:
                if self._sound is not None:
                    self._sound.packets.append((header["first"], pixels))
                continue
            time = None if header["time"] is None else Fraction(*header["time"])
            self.frames_read += 1
            yield np.frombuffer(pixels, np.uint8).reshape(*self.size, 3), time

    def kill(self) -> None:
        """Kill the decoding process: a pending read of a frame raises an error."""
        self._child.kill()

    def _next(self, request: dict[str, Any] | None = None) -> Message:
        """Send a message, if one is given, and return the next message of the process."""
        try:
            with self._child.deadline(SECONDS):
                if request is not None:
                    self._child.send(request)
                answer, body = self._child.receive()
        except ChildEnded as error:
            what = f"is not decoded within {SECONDS:g} s a frame" if error.late else "crashed its decoder process"
            raise UserError(f"{self.path} {what}. Re-encode it (ffmpeg -i IN OUT.mp4).") from None
        if "error" in answer:
            raise (FrameTooLarge if "is_too_large" in answer else UserError)(answer["error"])
        return answer, body


def send_frames(channel: Channel) -> None:
    """Send the properties and then the frames of the clip that a message names, as fast as the receiver reads them.

    Sound is encoded up to the end of each frame and sent before it: it never lasts longer than the frames.
    """
    message = channel.receive()
    if message is None:
        return
    request = message[0]
    path = Path(request["path"])
    try:
        if has_more_packets(path, request["packets"]):
            raise UserError(f"{path} has more than {request['packets']} packets. Cut it, or re-encode it.")
        with VideoReader(path, max_pixels=request["max_pixels"]) as reader, _sound_of(path, request) as sound:
            traits = reader.traits
            ratios = {"rate": reader.rate, "tick": traits.tick, "aspect": traits.aspect}
            known = {name: ratio.as_integer_ratio() for name, ratio in ratios.items()}
            heard = sound and (sound.rate, sound.layout)
            channel.send(
                {"size": reader.size, "count": reader.count, "colours": traits.colours, "sound": heard, **known}
            )
            packets = sound.packets() if sound else iter(())
            waiting = next(packets, None)
            end = Fraction(0)  # of the frame, in seconds
            for frame, time in reader.timed():
                end = (end if time is None else time) + 1 / reader.rate
                while waiting is not None and waiting[0] < min(end, request["sound"]):
                    channel.send({"first": waiting[1].pts}, bytes(waiting[1]))
                    waiting = next(packets, None)
                shown = None if time is None else time.as_integer_ratio()
                channel.send({"time": shown}, np.ascontiguousarray(frame).data.cast("B"))
        channel.send({"end": True})
    except FrameTooLarge as error:
        channel.send({"error": str(error), "is_too_large": True})
    except UserError as error:
        channel.send({"error": str(error)})
    except MemoryError:
        channel.send({"error": f"{path} needs more memory to decode than its frames require. Re-encode it."})


@contextmanager
def _sound_of(path: Path, request: dict[str, Any]) -> Iterator[SoundReader | None]:
    """Open the sound of a clip, to be encoded; None if it has none, or none was requested."""
    if not request["sound"]:
        yield None
        return
    sound = SoundReader(path, copy=False)
    try:
        yield sound if sound.rate else None
    finally:
        sound.close()


FRAME, OVERLAY, MASKS = "frame.png", "overlay.mp4", "masks.zip"
_BATCH = 4  # frames in a batch
_DEPTH = 2  # batches queued before and after the model
_KINDS = {  # suffix of a video file to the offset and bytes of its signature
    ".mp4": (4, b"ftyp"),
    ".mkv": (0, b"\x1a\x45\xdf\xa3"),  # WebM too
    ".avi": (8, b"AVI "),
}

Frames = list[np.ndarray]
_Timed = list[tuple[np.ndarray, Fraction | None]]  # frames with their presentation times


def kind_of(start: bytes) -> str:
    """Return the suffix of a video by its file's first bytes.

    Readers choose the format by content: a playlist uploaded as a video could make them read other files.

    Raises:
        Refused: if it is no MP4, MOV, MKV, WebM or AVI.
    """
    for suffix, (at, mark) in _KINDS.items():
        if start[at : at + len(mark)] == mark:
            return suffix
    raise Refused(400, "format", "The video format is not supported. Send MP4, MOV, WebM, MKV or AVI.")


def inspect_clip(job: UploadJob, path: Path, limits: ClipLimits, max_pixels: int) -> None:
    """Save an uploaded clip's first frame, and record its size and length in the job.

    Raises:
        Refused: if it is no video, or too long or large.
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
    """Return painted object ids (H, W) uint8 from a request body of one byte per pixel.

    Raises:
        Refused: if the number of bytes does not match the frame, or no object is painted.
    """
    height, width = facts["height"], facts["width"]
    if len(body) != height * width:
        raise Refused(
            400, "mask_size", f"A mask of {height * width} bytes is needed, one byte per pixel; got {len(body)}."
        )
    ids = np.frombuffer(body, np.uint8).reshape(height, width)
    if not ids.any() or ids.max() > 254:
        raise Refused(400, "no_object", "The mask is empty: paint the objects to track, as ids 1 to 254.")
    return ids


def make_overlay(
    job: UploadJob, path: Path, limits: ClipLimits, style: MaskStyle, masks_of: Callable[[Frames], Sequence[np.ndarray]]
) -> None:
    """Write a clip's overlay and the masks of its frames, and record the areas in the job.

    Raises:
        Cancelled: if the job was cancelled.
        UserError: if the clip is longer than its header states, or cannot be read to its end.
    """
    counts = np.zeros(256, np.int64)
    with (
        _reader(job, path, limits, job.facts["width"] * job.facts["height"], sound=True) as reader,
        VideoWriter(job.folder / OVERLAY, reader.rate, reader.size, like=reader.traits) as writer,
        atomic_file(job.folder / MASKS) as part,
        zipfile.ZipFile(part, "w") as masks,  # uncompressed: PNGs are compressed already
    ):

        def follow(frames: _Timed) -> tuple[_Timed, Sequence[np.ndarray]]:
            job.check()
            return frames, masks_of([frame for frame, _ in frames])

        def write(done: tuple[_Timed, Sequence[np.ndarray]]) -> None:
            nonlocal counts
            for (frame, time), mask in zip(*done, strict=True):
                writer.write(style.over(frame, mask), time)
                masks.writestr(f"{job.done:09d}.png", png(mask, tuple(style.palette)))
                counts = counts + np.bincount(mask.ravel(), minlength=256)
                job.done += 1

        run_pipeline(_batches(reader, limits), follow, write, depth=_DEPTH)
    job.facts, job.style = {**job.facts, "areas": _areas(counts, job.done, style)}, style


def redraw(job: UploadJob, path: Path, limits: ClipLimits, style: MaskStyle) -> None:
    """Write a clip's overlay again from its stored masks; raises as `make_overlay`."""
    with zipfile.ZipFile(job.folder / MASKS) as masks:
        names = iter(masks.namelist())

        def masks_of(frames: Frames) -> Sequence[np.ndarray]:
            return [np.asarray(Image.open(masks.open(next(names)))) for _ in frames]

        make_overlay(job, path, limits, style, masks_of)


def _reader(job: UploadJob, path: Path, limits: ClipLimits, max_pixels: int, *, sound: bool = False) -> ClipReader:
    """Return a clip's reader, which is killed when the job is cancelled."""
    reader = ClipReader(path, limits, max_pixels, sound=sound)
    job.interrupt = reader.kill
    if job.cancelled.is_set():
        reader.kill()
    return reader


def _batches(reader: ClipReader, limits: ClipLimits) -> Iterator[_Timed]:
    frames = reader.timed()
    while batch := list(islice(frames, _BATCH)):
        if reader.frames_read > limits.max_frames:
            raise UserError(f"The clip has more frames than its header states. {_shorter(limits)}")
        yield batch


def _areas(counts: np.ndarray, frames: int, style: MaskStyle) -> list[dict[str, Any]]:
    """Return id, name, colour, mean pixels per frame and share of all pixels for each id in the masks."""
    return [
        {
            "id": label,
            "name": style.names(label),
            "colour": list(style.palette[label]),
            "pixels": round(int(counts[label]) / frames),
            "share": int(counts[label]) / int(counts.sum()),
        }
        for label in map(int, np.flatnonzero(counts))
    ]


def _shorter(limits: ClipLimits) -> str:
    return f"The limit is {limits.max_frames} frames and {limits.max_seconds:g} s (mode.clips.max_seconds): cut it."
