"""A whole video through label propagation with a long context: stops, and memory."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from failing import fail_after
from PIL import Image

from dinoseg.core.contracts import Backbone
from dinoseg.inference.inputs import open_frames
from dinoseg.tracking.propagation.settings import CRW, DINOV3
from dinoseg.tracking.propagation.tracker import PropagationTracker
from dinoseg.tracking.video import mask_folder
from dinoseg.tracking.video.labels import find_labels
from dinoseg.tracking.video.run import TrackJob, track_video
from dinoseg.tracking.video.state import read_track_state
from dinoseg.utils.images import read_ids

pytestmark = pytest.mark.slow  # whole videos

SIZE = (48, 64)


class Wide(Backbone):
    """Many channels of each patch of 4 x 4 pixels: 16 of every pixel in it."""

    patch_size = 4

    def forward(self, images):
        return [F.pixel_unshuffle(images - 0.45, 4).repeat(1, 4, 1, 1)]


class Stopped(Exception):
    pass


def write_clip(path, count):
    """Write a video of noise that walks, and its first mask; the object 2 appears in frame 6."""
    writer = cv2.VideoWriter(str(path / "v.avi"), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 25, SIZE[::-1])
    still = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    for number in range(count):
        writer.write(np.roll(still, number, axis=1))
    writer.release()
    mask = np.zeros(SIZE, np.uint8)
    mask[8:24, 12:32] = 3
    (path / "labels").mkdir()
    Image.fromarray(mask).save(path / "labels/0.png")
    Image.fromarray(np.where(np.roll(mask, 20, axis=0), 2, 0).astype(np.uint8)).save(path / "labels/6.png")


def run(path, folder, settings, *, restart=False):
    tracker = PropagationTracker(Wide(), settings, batch_size=4)
    standing = read_track_state(folder) if restart else None
    if standing:
        tracker.load(standing.tensors)
    with open_frames(str(path / "v.avi")) as frames:
        labels = find_labels(str(path / "labels"), frames)
        track_video(TrackJob(tracker, frames, labels, folder, standing and standing.progress, 4, 4))


@pytest.mark.parametrize("stop", [1, 6, 13, 27])
def test_a_stop_anywhere_in_a_long_context(tmp_path, stop):
    settings = replace(CRW, radius=4)
    write_clip(tmp_path, 30)
    run(tmp_path, tmp_path / "whole", settings)
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, mask_folder, "write_indexed_png", stop, Stopped)
        with pytest.raises(Stopped):
            run(tmp_path, tmp_path / "cut", settings)
    standing = read_track_state(tmp_path / "cut")
    assert standing.progress.done == stop - stop % 4
    assert not standing.tensors or len(standing.tensors["features"]) == 21  # frame 0, and 20 that it fills at first
    run(tmp_path, tmp_path / "cut", settings, restart=True)
    names = sorted(path.name for path in (tmp_path / "whole/masks").iterdir())
    assert len(names) == 30 == len(list((tmp_path / "cut/masks").iterdir()))
    for name in names:
        masks = [read_ids(tmp_path / folder / "masks" / name) for folder in ("whole", "cut")]
        np.testing.assert_array_equal(*masks)
    assert {0, 2, 3} == set(np.unique(masks[0]))
    last = [read_track_state(tmp_path / folder).tensors for folder in ("whole", "cut")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def resident():
    """Return the bytes of memory in use by this process."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux shows it")
def test_features_of_past_frames_are_freed(tmp_path, monkeypatch):
    write_clip(tmp_path, 400)
    real, used = mask_folder.write_indexed_png, []

    def write(*given):
        used.append(resident())
        real(*given)

    monkeypatch.setattr(mask_folder, "write_indexed_png", write)
    run(tmp_path, tmp_path / "out", replace(DINOV3, short_side=None, radius=2, context=3))
    growth = used[-1] - used[60]
    assert len(used) == 400 and growth < 12e6, f"{growth / 1e6:.1f} MB"  # features of 340 frames would be 50 MB
