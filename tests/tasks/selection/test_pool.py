"""Which images and frames there are to choose from, by their names."""

import numpy as np
import pytest
from films import write_film

from dinoseg.data.video.access import VideoFrame
from dinoseg.tasks.selection.pool import _seconds, found_in, named_in, pool_indices
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

GREY = np.zeros((4, 4, 3), np.uint8)


def test_frames_are_those_of_each_step_and_those_named(tmp_path):
    film = write_film(tmp_path / "a.mp4", frames=30)  # 24000 / 1001 frames a second
    pool = found_in(str(film), every=0.5, cache_dir=tmp_path / "c")
    assert [each.name for each in pool] == ["000000000", "000000012", "000000024"]
    assert [each.time for each in pool] == pytest.approx([0, 12 * 1001 / 24000, 24 * 1001 / 24000], abs=1e-4)
    assert pool[1].source == VideoFrame(film, 12)
    more = found_in(str(film), every=0.5, cache_dir=tmp_path / "c", also={"000000005", "7"})
    assert [each.name for each in more] == ["000000000", "000000005", "000000012", "000000024"]
    assert len(found_in(str(film), every=0.01, cache_dir=tmp_path / "c")) == 30
    even = write_film(tmp_path / "b.mp4", frames=12, rate=10)  # 0.7 / 0.1 is less than 7
    assert len(found_in(str(even), every=0.1, cache_dir=tmp_path / "c")) == 12


def test_an_uneven_video_is_stepped_by_its_own_clock(tmp_path):
    film = write_film(tmp_path / "a.mp4", frames=4, times=[0, 3000, 180000, 183000])  # 0, 1/30, 2, 2 1/30 s
    pool = found_in(str(film), every=1.0, cache_dir=tmp_path / "c")
    assert [(each.name, each.time) for each in pool] == [("000000000", 0.0), ("000000002", pytest.approx(2.0, abs=0.1))]


def test_images_and_videos_of_a_folder_keep_their_names(tmp_path):
    write_png(tmp_path / "x10.png", GREY)
    write_png(tmp_path / "x2.png", GREY)
    write_film(tmp_path / "y.mp4", frames=3)
    (tmp_path / "notes.txt").write_text("")
    pool = found_in(str(tmp_path), every=1.0, cache_dir=tmp_path / "c")
    assert [each.name for each in pool] == ["x2", "x10", "y/000000000"]
    assert [each.time for each in pool] == [None, None, 0.0]


def test_labelled_images_are_named_by_masks_or_by_a_list(tmp_path):
    write_png(tmp_path / "images/a/1.png", GREY)
    write_png(tmp_path / "images/b.png", GREY)
    write_png(tmp_path / "masks/a/1.PNG", GREY)
    pool = found_in(str(tmp_path / "images/**/*.png"), every=1.0, cache_dir=tmp_path)
    assert named_in(str(tmp_path / "masks")) == {"a/1"} and pool_indices({"a/1"}, pool) == [0]
    (tmp_path / "list.txt").write_text("b.png\n\n")
    assert pool_indices(named_in(str(tmp_path / "list.txt")), pool) == [1]
    with pytest.raises(UserError, match="labels names 1 of 2 images .* z. Image names have the form a/1, b"):
        pool_indices({"b", "z"}, pool)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"labels=.*empty holds no mask"):
        named_in(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="Check labels"):
        named_in(str(tmp_path / "absent"))


@pytest.mark.parametrize(("fps", "step"), [(10.0, 0.1), (0.0, 0.04), (90000.0, 0.04)])
def test_frames_without_times_of_their_own_are_evenly_spaced(fps, step):
    class Index:
        times = np.array([0.0, 40.0, 40.0])

        def __len__(self):
            return 3

    Index.fps = fps
    assert _seconds(Index()) == pytest.approx([0, step, 2 * step])
