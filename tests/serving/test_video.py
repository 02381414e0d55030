"""A labelled video has a mask for each frame, and leaves nothing when it is stopped."""

import zipfile
from contextlib import closing

import numpy as np
import pytest
from PIL import Image
from serving_stand_ins import FACTS, InThread

from dinoseg.data.classes.labels import Labels
from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.serving import decoding
from dinoseg.serving.decoding import VideoDecoder
from dinoseg.serving.mask_editor import MaskEditor
from dinoseg.serving.video import write_labelled_video
from dinoseg.utils.errors import UserError

FRAMES = 9


@pytest.fixture
def video(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "Child", InThread)
    with VideoWriter(tmp_path / "in.mp4", 10.0, (32, 48)) as writer:
        for number in range(FRAMES):  # a bright bar that grows
            frame = np.full((32, 48, 3), 20, np.uint8)
            frame[:, : 5 * number] = 250
            writer.write(frame)
    with closing(VideoDecoder(tmp_path / "in.mp4", max_pixels=2000, max_seconds=2.0)) as opened:
        yield opened


def segment(frames):
    return [(frame.mean(axis=-1) > 127).astype(np.uint8) for frame in frames]


def draw(image, mask):
    labels = Labels(FACTS.classes, FACTS.palette, FACTS.ignore_index)
    return MaskEditor(mask, labels).draw(image, mask, 1.0)


def test_overlay_and_masks_hold_every_frame(video, tmp_path):
    seen = []
    counts = write_labelled_video(video, tmp_path, FACTS.palette, segment, draw, seen.append)
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        assert archive.namelist() == [f"{number:09d}.png" for number in range(FRAMES)]
        masks = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    for number, mask in enumerate(masks):
        assert mask.shape == (32, 48) and abs(int(mask.sum()) - 32 * 5 * number) <= 64
    assert counts[1] == sum(int(mask.sum()) for mask in masks) and counts.sum() == FRAMES * 32 * 48
    with VideoReader(tmp_path / "overlay.mp4") as overlay:
        last = list(overlay)[-1].astype(int)
    assert overlay.frames_read == FRAMES and (last[:, :30, 0] > last[:, :30, 1] + 100).all()
    assert seen == [4, 8, 9]


def test_stopping_leaves_no_files(video, tmp_path):
    def stop(done):
        raise UserError("Cancelled.")

    with pytest.raises(UserError, match="Cancelled"):
        write_labelled_video(video, tmp_path, FACTS.palette, segment, draw, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
