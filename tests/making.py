"""What the tests of the data room make their inputs with."""

import os
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from dinoseg.core.shapes import Sample
from dinoseg.data import loader
from dinoseg.data.loader import TrainViews
from dinoseg.utils.errors import UserError

DATA = Path(os.environ.get("DINOSEG_DATA", Path(__file__).parents[2] / "shared" / "data"))


def save(path, array, dtype=np.uint8, **options):
    """Write an array as a picture, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=dtype)).save(path, **options)
    return path


def write_frames(path, frames, size, kind, rate):
    """Write BGR frames of a size (width, height) as a video of a four-character codec, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*kind), rate, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def write_video(path, frames, size=(48, 32), kind="XVID", draw=None):
    """Write a video of frames that a function of their index draws, or of flat ones, frame i of grey i % 200 + 20."""
    draw = draw or (lambda index: np.full((size[1], size[0], 3), index % 200 + 20, np.uint8))
    return write_frames(path, map(draw, range(frames)), size, kind, 60)


def write_motion_jpeg(path, frames, size):
    """Write RGB frames of a size (height, width) as a Motion JPEG video of 12.5 frames a second."""
    return write_frames(path, (frame[..., ::-1] for frame in frames), size[::-1], "MJPG", 12.5)


def train_batches(data, augment, *, seed, views=None, **options):
    """Return the loader's batches of the views of a data set."""
    return loader.train_batches(TrainViews(data, augment, seed, views), **options)


class Pictures:
    """A data set in memory; sizes may differ, and one item may be spoilt."""

    classes = ("a", "b", "c")
    palette = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    ignore_index = 255

    def __init__(self, sizes, error_at=None):
        self.sizes, self.error_at = sizes, error_at
        self.names = [f"p{i}" for i in range(len(sizes))]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if index == self.error_at:
            raise UserError(f"bad.png number {index} is spoilt: replace it.")
        rng = np.random.default_rng(index)
        height, width = self.sizes[index]
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        mask = torch.from_numpy(rng.integers(0, 3, (height, width), dtype=np.uint8))
        return Sample(image=image, mask=mask, name=self.names[index])
