"""Frame-by-frame writer of mp4 videos that browsers play."""

import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter

from dinoseg.extensions.video.prediction import VideoTraits
from dinoseg.utils.atomic import new_part
from dinoseg.utils.errors import UserError

# H.264 plays everywhere; PyAV builds without x264 fall back to one of the others
# mbtree=0: with macroblock trees, x264 output differs between the first and second video of a process
_CODECS = {
    "libx264": {"preset": "veryfast", "crf": "20", "x264-params": "mbtree=0"},
    "libopenh264": {},
    "libvpx-vp9": {"cpu-used": "8"},
}
_MATRICES = (1, 4, 5, 6, 7, 9)  # matrices from RGB to YUV that H.264 stores, numbered as in H.273 and PyAV
_UNTOLD = 2
# mp4 stores the delay from decoding to display (up to 4 frames) in 31 bits, and doubles ticks below 20,000/s
_MAX_TICKS, _MIN_TICKS = 2**29, 20_000


class VideoWriter:
    """Writer of RGB frames to an mp4 for browsers; the file gets its name only when complete.

    Encodes H.264 (yuv420p, index at the front). The format needs even sides: the last row or column of an odd frame is
    repeated once. If the `with` block raises, no file remains.

    Args:
        path: the file.
        rate: frames per second, for frames without a timestamp.
        size: (H, W) of the frames.
        like: traits of the source video to reuse; None: default traits.

    Raises:
        UserError: no encoder works, the time between two frames exceeds mp4's limit, or the file has fewer frames than
            were written (a full disk).
    """

    def __init__(
        self,
        path: str | Path,
        rate: float | Fraction,
        size: tuple[int, int],
        *,
        like: VideoTraits | None = None,
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.frames_written = 0
        self._size = size
        rate = rate if isinstance(rate, Fraction) else Fraction(rate).limit_denominator(1001)
        self._tick = 1 / rate if like is None else like.tick
        self._longest = _MAX_TICKS // max(_MIN_TICKS, self._tick.denominator)  # seconds, maximum duration of a frame
        self._step = max(1, round(1 / rate / self._tick))  # ticks of a frame without a timestamp
        self._last = -self._step  # timestamp of the previous frame, in ticks
        self._reformatter = VideoReformatter()
        codec = next((name for name in _CODECS if name in av.codecs_available), None)
        if codec is None:
            raise UserError(f"Cannot write {path}: PyAV lacks the encoders {', '.join(_CODECS)}. Reinstall av.")
        self._part = new_part(self.path)
        matrix = None if like is None else like.colours[2]
        self._matrix = matrix if matrix in _MATRICES else None
        try:
            self._container = av.open(f"file:{self._part}", "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = cast(av.VideoStream, self._container.add_stream(codec, rate=rate, options=_CODECS[codec]))
            self._describe(self._stream.codec_context, like)
        except FFmpegError as error:
            self._part.unlink(missing_ok=True)
            raise self._write_error(str(error.strerror)) from error

    def write(self, frame: np.ndarray, time: Fraction | None = None) -> None:
        """Append one frame (H, W, 3) uint8 RGB, shown at `time` seconds; None: one frame after the previous frame.

        Timestamps that do not increase are moved forward by the minimum.
        """
        if frame.shape[:2] != self._size:
            raise ValueError(f"A frame {frame.shape[:2]} does not fit a video of {self._size} (H, W).")
        height, width = self._size
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(frame), format="rgb24")
        picture = self._reformatter.reformat(picture, format="yuv420p", dst_colorspace=self._matrix)
        before = self._last
        self._last = before + self._step if time is None else max(before + 1, round(time / self._tick))
        if (self._last - before) * self._tick > self._longest:
            raise UserError(
                f"Cannot write {self.path}: its frame {self.frames_written} is {float(time or 0):.1f} s after the "
                f"start, more than {self._longest} s after the previous frame, the limit of mp4. Give the input even "
                "timestamps first (ffmpeg -i IN -vf setpts=N/FRAME_RATE/TB -an OUT.mp4)."
            )
        picture.pts, picture.time_base, picture.duration = self._last, self._tick, self._step
        try:
            self._container.mux(self._stream.encode(picture))
        except FFmpegError as error:
            raise self._write_error(str(error.strerror)) from error
        self.frames_written += 1

    def close(self) -> None:
        """Finish the file, check that it contains every frame, and rename it to its final name."""
        reason = ""
        try:
            try:
                self._container.mux(self._stream.encode(None))
                self._container.close()
            except FFmpegError as error:
                reason = f"{error.strerror}; "
            stored = self._count_written_frames()
            if reason or self.frames_written == 0 or stored < self.frames_written:
                raise self._write_error(f"{reason}{stored} of {self.frames_written} frames arrived")
            os.replace(self._part, self.path)
        except BaseException:  # signals included
            self.discard()
            raise

    def discard(self) -> None:
        """Delete the unfinished file."""
        with suppress(FFmpegError):
            self._container.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _describe(self, codec: VideoCodecContext, like: VideoTraits | None) -> None:
        height, width = (side + side % 2 for side in self._size)
        codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "yuv420p", self._tick
        if like is not None:
            codec.sample_aspect_ratio = like.aspect
            codec.color_primaries, codec.color_trc, _ = like.colours
            codec.colorspace = self._matrix or _UNTOLD

    def _count_written_frames(self) -> int:
        try:
            with av.open(f"file:{self._part}") as written:
                return written.streams.video[0].frames
        except (FFmpegError, IndexError):
            return 0

    def _write_error(self, reason: str) -> UserError:
        return UserError(f"Cannot write {self.path}: {reason}. Free some disk space, or choose another run folder.")
