"""Videos with sound."""

import struct
from fractions import Fraction

import av
import numpy as np


def write_film(path, *, rate=Fraction(24000, 1001), frames=24, seconds_of_sound=1, times=None):
    """Write a video with a tone; `times` in ticks of a 90,000th of a second."""
    webm = path.suffix == ".webm"
    audio = np.sin(np.arange(48000) * 0.05).astype(np.float32)[None]
    with av.open(str(path), "w") as file:
        picture = file.add_stream("libvpx" if webm else "libx264", rate=rate)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        if times is not None:
            picture.codec_context.time_base = Fraction(1, 90000)
        track = file.add_stream("libopus" if webm else "aac", rate=48000, layout="mono")
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * index % 256, np.uint8), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 90000)
            file.mux(picture.encode(frame))
        for second in range(seconds_of_sound):
            heard = av.AudioFrame.from_ndarray(audio, format="flt", layout="mono")
            heard.rate, heard.pts = 48000, 48000 * second
            file.mux(track.encode(heard))
        file.mux(picture.encode(None))
        file.mux(track.encode(None))
    return path


def write_edits(source, target, *edits):
    """Copy an mp4 with its index in front, with other edits: (duration in ms, first tick of the media; -1: empty)."""
    data = bytearray(source.read_bytes())
    at = data.index(b"elst") - 4
    (size,) = struct.unpack_from(">I", data, at)
    rows = b"".join(struct.pack(">IiI", *edit, 1 << 16) for edit in edits)
    data[at : at + size] = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(edits)) + rows
    growth = 16 + len(rows) - size
    for box in (b"edts", b"trak", b"moov"):
        start = data.index(box) - 4
        (length,) = struct.unpack_from(">I", data, start)
        struct.pack_into(">I", data, start, length + growth)
    chunks = data.index(b"stco") + 8  # the media, whose offsets it lists, stands behind it
    (count,) = struct.unpack_from(">I", data, chunks)
    for start in range(chunks + 4, chunks + 4 + 4 * count, 4):
        (offset,) = struct.unpack_from(">I", data, start)
        struct.pack_into(">I", data, start, offset + growth)
    target.write_bytes(data)
    return target


def write_plain(path, frames, *, codec="libx264", slots=None, pixels=None, options=None, rate=30):
    """Write a silent video of 64 x 48 pixels; `slots`: numbers of the frames' time slots, `pixels`: of a frame."""
    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.codec_context.gop_size = 64, 48, 30
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = 1 / Fraction(rate)
        for index in range(frames):
            image = np.full((48, 64, 3), 2 * index % 256, np.uint8) if pixels is None else pixels(index)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index if slots is None else slots[index], 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def append_empty_slots(path, number):
    """Add empty time slots behind the last frame of an AVI file that has video alone."""
    data = bytearray(path.read_bytes())

    def grow(at, amount):
        (value,) = struct.unpack_from("<I", data, at)
        struct.pack_into("<I", data, at, value + amount)
        return value

    frames = data.index(b"movi")
    size = grow(frames - 4, 8 * number)
    data[frames + size : frames + size] = b"00dc\0\0\0\0" * number
    index = data.index(b"idx1", frames + size)
    rows = b"".join(struct.pack("<4sIII", b"00dc", 0, size + 8 * row, 0) for row in range(number))
    end = index + 8 + grow(index + 4, len(rows))
    data[end:end] = rows
    grow(data.index(b"strh") + 8 + 32, number)
    grow(data.index(b"avih") + 8 + 16, number)
    grow(4, 8 * number + len(rows))
    path.write_bytes(data)
    return path
