"""Videos with sound."""

from fractions import Fraction

import av
import numpy as np


def write_film(path, *, rate=Fraction(24000, 1001), frames=24, sound=None, seconds_of_sound=1, times=None):
    """Write a video with a tone; `times` in ticks of a 90,000th of a second."""
    webm, audio = path.suffix == ".webm", np.sin(np.arange(48000) * 0.05).astype(np.float32)[None]
    with av.open(str(path), "w") as file:
        picture = file.add_stream("libvpx" if webm else "libx264", rate=rate)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        if times is not None:
            picture.codec_context.time_base = Fraction(1, 90000)
        track = file.add_stream(sound or ("libopus" if webm else "aac"), rate=48000, layout="mono")
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
