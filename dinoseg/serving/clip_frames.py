"""The frames of an uploaded clip, decoded in a process of its own that is killed at a deadline.

`send_frames` runs in that process, `ClipReader` in the server.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.video.decoder import FrameTooLarge
from dinoseg.data.video.length import has_more_packets
from dinoseg.inference.video_file import VideoReader, VideoTraits
from dinoseg.serving.limits import MIB, ClipLimits
from dinoseg.utils.child import Channel, Child, ChildEnded, Message
from dinoseg.utils.errors import UserError

SECONDS = 10.0  # that opening a clip, or decoding one frame of it, may take
_BYTES_PER_PIXEL, _MORE = 64, 512 * MIB  # that decoding takes at most: frames that others refer to, and threads
_PACKETS = 2000  # of pictures, sound and all else, in a second of a clip


class ClipReader:
    """Frames of a clip as `VideoReader` gives them, and what that knows of it.

    Args:
        path: of the clip.
        limits: of its length.
        max_pixels: of a frame.
    """

    size: tuple[int, int]  # (H, W); this and what follows is known once the clip is opened
    count: int  # of frames, by the header
    rate: Fraction
    fps: float
    traits: VideoTraits

    def __init__(self, path: Path, limits: ClipLimits, max_pixels: int) -> None:
        self.path, self.frames_read = path, 0
        self._asked = {"path": str(path), "max_pixels": max_pixels, "packets": int(_PACKETS * limits.max_seconds)}
        self._child = Child(send_frames, _MORE + _BYTES_PER_PIXEL * max_pixels)

    def __enter__(self) -> "ClipReader":
        """Open the clip.

        Raises:
            FrameTooLarge: its frames have more pixels.
            UserError: it is no video, takes too long, or has far more packets than frames and sound need.
        """
        try:
            about, _ = self._next(self._asked)
            self.size, self.count = (about["size"][0], about["size"][1]), about["count"]
            self.rate, tick, aspect = (Fraction(*about[name]) for name in ("rate", "tick", "aspect"))
        except BaseException:
            self._child.close()
            raise
        self.fps = float(self.rate)
        self.traits = VideoTraits(tick, aspect, tuple(about["colours"]), self.path)
        return self

    def __exit__(self, *error: object) -> None:
        """Release the clip."""
        self._child.close()

    def timed(self) -> Iterator[tuple[np.ndarray, Fraction | None]]:
        """Yield each frame (H, W, 3) uint8 RGB, and when it is shown, in seconds from the clip's start, if it says.

        Raises:
            UserError: it is damaged, or a frame takes too long.
        """
        while True:
            header, pixels = self._next()
            if "end" in header:
                return
            time = None if header["time"] is None else Fraction(*header["time"])
            self.frames_read += 1
            yield np.frombuffer(pixels, np.uint8).reshape(*self.size, 3), time

    def kill(self) -> None:
        """End the process: whoever waits for a frame of it gets an error."""
        self._child.kill()

    def _next(self, asked: dict[str, Any] | None = None) -> Message:
        """Return the next message, after sending one."""
        try:
            with self._child.deadline(SECONDS):
                if asked is not None:
                    self._child.send(asked)
                answer, body = self._child.receive()
        except ChildEnded as error:
            what = f"is not decoded within {SECONDS:g} s a frame" if error.late else "ended the process that decoded it"
            raise UserError(f"{self.path} {what}. Re-encode it (ffmpeg -i IN OUT.mp4).") from None
        if "error" in answer:
            raise (FrameTooLarge if "is_too_large" in answer else UserError)(answer["error"])
        return answer, body


def send_frames(channel: Channel) -> None:
    """Send what is known of the clip that a message names, and then its frames, as fast as they are taken."""
    message = channel.receive()
    if message is None:
        return
    asked = message[0]
    path = Path(asked["path"])
    try:
        if has_more_packets(path, asked["packets"]):
            raise UserError(f"{path} has more than {asked['packets']} packets. Cut it, or re-encode it.")
        with VideoReader(path, max_pixels=asked["max_pixels"]) as reader:
            traits = reader.traits
            ratios = {"rate": reader.rate, "tick": traits.tick, "aspect": traits.aspect}
            known = {name: ratio.as_integer_ratio() for name, ratio in ratios.items()}
            channel.send({"size": reader.size, "count": reader.count, "colours": traits.colours, **known})
            for frame, time in reader.timed():
                shown = None if time is None else time.as_integer_ratio()
                channel.send({"time": shown}, np.ascontiguousarray(frame).data.cast("B"))
        channel.send({"end": True})
    except FrameTooLarge as error:
        channel.send({"error": str(error), "is_too_large": True})
    except UserError as error:
        channel.send({"error": str(error)})
    except MemoryError:
        channel.send({"error": f"{path} takes more memory to decode than its frames need. Re-encode it."})
