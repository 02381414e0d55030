"""Images and frames of videos without masks, by their names."""

import numpy as np
import pytest
from films import write_film

from dinoseg.data.video.access import VideoFrame
from dinoseg.tasks.unmasked import _seconds, list_images
from dinoseg.utils.images import write_png

GREY = np.zeros((4, 4, 3), np.uint8)


def test_frames_are_the_first_of_each_step(tmp_path):
    film = write_film(tmp_path / "a.mp4", frames=30)  # 24000 / 1001 frames a second
    images = list_images(str(film), every=0.5, cache_dir=tmp_path / "c")
    assert [each.name for each in images] == ["000000000", "000000012", "000000024"]
    assert images[1].source == VideoFrame(film, 12)
    assert len(list_images(str(film), every=0.01, cache_dir=tmp_path / "c")) == 30
    even = write_film(tmp_path / "b.mp4", frames=12, rate=10)  # 0.7 / 0.1 is less than 7
    assert len(list_images(str(even), every=0.1, cache_dir=tmp_path / "c")) == 12


def test_uneven_video_is_sampled_by_its_own_times(tmp_path):
    film = write_film(tmp_path / "a.mp4", frames=4, times=[0, 3000, 180000, 183000])  # 0, 1/30, 2, 2 1/30 s
    images = list_images(str(film), every=1.0, cache_dir=tmp_path / "c")
    assert [each.name for each in images] == ["000000000", "000000002"]


def test_images_and_videos_of_a_folder_keep_their_names(tmp_path):
    write_png(tmp_path / "x10.png", GREY)
    write_png(tmp_path / "x2.png", GREY)
    write_film(tmp_path / "y.mp4", frames=3)
    (tmp_path / "notes.txt").write_text("")
    images = list_images(str(tmp_path), every=1.0, cache_dir=tmp_path / "c")
    assert [each.name for each in images] == ["x2", "x10", "y/000000000"]


@pytest.mark.parametrize(("fps", "step"), [(10.0, 0.1), (0.0, 0.04), (90000.0, 0.04)])
def test_frames_without_valid_times_are_evenly_spaced(fps, step):
    class Index:
        times = np.array([0.0, 40.0, 40.0])

        def __len__(self):
            return 3

    Index.fps = fps
    assert _seconds(Index()) == pytest.approx([0, step, 2 * step])
