"""Write every n-th frame of a video file as PNG, read in one pass from the start."""

from pathlib import Path

from dinoseg.data.video.decoder import Decoder
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

_UNCOUNTED = 2  # frames by which a sound video may fall short of its header: some writers count dropped ones


def extract_frames(video: Path, folder: Path, *, step: int) -> int:
    """Write frame i as `folder/%09d.png` where i is a multiple of `step`; return how many were decoded.

    Files that are there are kept: they appear whole or not at all.

    Raises:
        UserError: the video cannot be opened or decoded, or ends before the number of frames it promises.
        OSError: writing failed, with what was finished kept.
    """
    frames = 0
    with Decoder(video) as decoder:
        while decoder.advance():
            target = folder / f"{frames:09d}.png"
            if frames % step == 0 and not target.exists():
                write_png(target, decoder.rgb_image())
            frames += 1
    if frames == 0 or frames < decoder.promised - _UNCOUNTED:
        raise UserError(f"{video} is truncated: {frames} frames read, {decoder.promised} promised. Replace it.")
    return frames
