"""Write every n-th frame of a video file as PNG, read in one pass from the start."""

from pathlib import Path

import cv2

from dinoseg.errors import UserError
from dinoseg.images import write_png
from dinoseg.storage.files import check_regular

_UNCOUNTED = 2  # frames by which a sound video may fall short of its header: some writers count dropped ones


def extract_frames(video: Path, folder: Path, *, step: int) -> int:
    """Write frame i as `folder/%09d.png` where i is a multiple of `step`; return how many were decoded.

    Files that are there are kept: they appear whole or not at all.

    Raises:
        UserError: the video cannot be opened or decoded, or ends before the number of frames it promises.
        OSError: writing failed, with what was finished kept.
    """
    check_regular(video)
    capture = cv2.VideoCapture(str(video))
    try:
        if not capture.isOpened():
            raise UserError(f"Cannot open {video} as a video. It is damaged or no video: replace it.")
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        frames = 0
        while capture.grab():
            target = folder / f"{frames:09d}.png"
            if frames % step == 0 and not target.exists():
                good, image = capture.retrieve()
                if not good:
                    raise UserError(f"Frame {frames} of {video} cannot be decoded. The video is damaged: replace it.")
                write_png(target, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            frames += 1
    finally:
        capture.release()
    if frames == 0 or frames < promised - _UNCOUNTED:
        raise UserError(f"{video} is truncated: {frames} frames read, {promised} promised. Replace it.")
    return frames
