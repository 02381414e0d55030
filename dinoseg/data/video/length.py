"""How many frames a video file has: by its header, or by counting."""

from pathlib import Path

import cv2


def promised_frames(path: Path) -> int:
    """Return what the header says, which may be off by a frame or two; 0 where it says nothing."""
    capture = cv2.VideoCapture(str(path))
    try:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    finally:
        capture.release()


def count_frames(path: Path) -> int:
    """Return how many frames there are, by going through the whole file; 0 where it is no video."""
    capture = cv2.VideoCapture(str(path))
    frames = 0
    try:
        while capture.grab():
            frames += 1
    finally:
        capture.release()
    return frames
