"""The sound of a video, taken over into another file beside new pictures."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import cast

import av
from av.audio import AudioFrame, AudioStream
from av.container import OutputContainer
from av.error import FFmpegError

_KEPT = ("aac", "mp3", "opus", "flac")  # what browsers play in an mp4; all else becomes AAC
_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # of AAC; other rates become the last one
_FRAME = 1024  # samples that AAC encodes at once

_Timed = tuple[Fraction, av.Packet]  # in seconds from the file's start


class Sound:
    """The first sound track of a video, packet by packet: as it is, or as AAC where browsers could not play it.

    What of it is damaged is left out; a file without sound gives none.

    Args:
        source: the video; None: there is no sound.
        target: the mp4, before its first packet.
    """

    def __init__(self, source: Path | None, target: OutputContainer) -> None:
        self._target = target
        self._source = None if source is None else av.open(f"file:{source}", options={"protocol_whitelist": "file"})
        self._waiting: _Timed | None = None
        if self._source is None or not self._source.streams.audio:
            return
        self._track = self._source.streams.audio[0]
        self._start = Fraction(self._source.start_time or 0, av.time_base)
        if self._track.codec_context.name.removesuffix("float") in _KEPT:
            self._packets = self._copied(target.add_stream_from_template(self._track))
        else:
            rate = self._track.rate if self._track.rate in _RATES else _RATES[-1]
            layout = "mono" if self._track.channels == 1 else "stereo"
            self._packets = self._encoded(target.add_stream("aac", rate=rate, layout=layout))
        self._waiting = next(self._packets, None)

    def write_until(self, time: Fraction | None) -> None:
        """Write what is heard before `time`, in seconds; None: all the rest."""
        while self._waiting is not None and (time is None or self._waiting[0] < time):
            self._target.mux(self._waiting[1])
            self._waiting = next(self._packets, None)

    def close(self) -> None:
        """Release the source."""
        if self._source is not None:
            self._source.close()

    def _copied(self, output: AudioStream) -> Iterator[_Timed]:
        for packet in self._demuxed():
            if packet.pts is None or packet.dts is None:
                continue  # the empty one at the end
            packet.stream = output
            shift = round(self._start / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            yield packet.pts * packet.time_base, packet

    def _encoded(self, output: AudioStream) -> Iterator[_Timed]:
        codec = output.codec_context
        resampler = av.AudioResampler(format="fltp", layout=codec.layout, rate=codec.rate, frame_size=_FRAME)
        frames = (even for frame in chain(self._decoded(), [None]) for even in resampler.resample(frame))
        for frame in chain(frames, [None]):
            for packet in output.encode(frame):
                yield (packet.pts or 0) * packet.time_base, packet

    def _decoded(self) -> Iterator[AudioFrame]:
        for packet in self._demuxed():
            try:
                frames = packet.decode()
            except FFmpegError:
                continue
            for frame in cast(list[AudioFrame], frames):
                if frame.pts is not None and frame.time_base is not None:
                    frame.pts -= round(self._start / frame.time_base)
                yield frame

    def _demuxed(self) -> Iterator[av.Packet]:
        assert self._source is not None
        try:
            yield from self._source.demux(self._track)
        except FFmpegError:
            return  # cut off
