"""What both renderers do with a root: resume, and refuse what is not theirs."""

import multiprocessing
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mistakes import assert_refused

from dinoseg.extensions.rendering.moving.write import draw_video, render_moving_objects
from dinoseg.extensions.rendering.surgery import write
from dinoseg.extensions.rendering.surgery.write import render_clip, render_dataset

SURGERY = {"train_videos": 1, "test_videos": 1, "seconds": 2, "size": (48, 80), "workers": 1}
MOVING = {"train_videos": 2, "val_videos": 1, "test_videos": 0, "seconds": 1, "size": (32, 40), "workers": 1}
each_renderer = pytest.mark.parametrize(
    ("render", "small"), [(render_dataset, SURGERY), (render_moving_objects, MOVING)], ids=["surgery", "moving"]
)


def contents(root: Path) -> dict[str, bytes]:
    """Return the bytes of all files, and of all members of archives."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {f"{name}/{member}": archive.read(member) for member in archive.namelist()}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("draw", [render_clip, draw_video])
def test_same_seed_same_frames_any_other_seed_other_frames(draw):
    first, again = (list(draw((7, 0, 3), 3, (48, 64))) for _ in range(2))
    for (rgb, mask), (rgb_again, mask_again) in zip(first, again, strict=True):
        assert np.array_equal(rgb, rgb_again) and np.array_equal(mask, mask_again)
    others = [(7, 1, 3), (3, 0, 7), (7, 0, 4), (8, 0, 3), (7 + 2**32, 0, 3), (0, 7, 3)]
    seen = [first[0], *(next(draw(seed, 1, (48, 64))) for seed in others)]
    for kind in (0, 1):
        assert len({frame[kind].tobytes() for frame in seen}) == len(seen)


@pytest.mark.parametrize(
    ("draw", "size"),
    [
        *((render_clip, size) for size in ((16, 16), (16, 200), (130, 34))),
        *((draw_video, size) for size in ((32, 32), (32, 75), (61, 47), (160, 96))),
    ],
)
def test_any_size_is_rendered(draw, size):
    for seed in (1,) if draw is render_clip else range(3):
        rgb, mask = list(draw(seed, 2, size))[-1]
        assert rgb.shape == (*size, 3) and mask.shape == size and rgb.dtype == mask.dtype == np.uint8
        assert mask.any() and rgb.std() > 5
        if draw is draw_video:
            assert not mask.all()


@each_renderer
def test_two_processes_write_the_same_as_one(tmp_path, render, small):
    for workers in (1, 2):
        render(tmp_path / str(workers), **{**small, "workers": workers})
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and len(one) == (10 if render is render_dataset else 3 * (2 * 12 + 1))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("render", "change", "words"),
    [
        (render_dataset, {"size": (0, 320)}, ["size=[0, 320]"]),
        (render_dataset, {"size": (-192, 320)}, ["size=[-192, 320]"]),
        (render_dataset, {"size": (191, 320)}, ["size=[191, 320]", "even"]),
        (render_dataset, {"train_videos": 0, "test_videos": 0}, ["no videos"]),
        (render_dataset, {"train_videos": -1}, ["train_videos=-1"]),
        (render_moving_objects, {"size": (0, 128)}, ["size=[0, 128]"]),
        (render_moving_objects, {"size": (128, 31)}, ["size=[128, 31]", "at least 32"]),
        (render_moving_objects, {"train_videos": 0, "val_videos": 0}, ["no videos"]),
        (render_moving_objects, {"val_videos": -1}, ["val_videos=-1"]),
        (render_moving_objects, {"test_videos": -2}, ["test_videos=-2"]),
    ],
)
def test_bad_settings_are_named(tmp_path, render, change, words):
    small = SURGERY if render is render_dataset else MOVING
    assert_refused(lambda: render(tmp_path / "new", **{**small, **change}), *words)
    assert not (tmp_path / "new").exists()


@each_renderer
def test_a_root_that_is_a_file_is_named(tmp_path, render, small):
    (tmp_path / "file").write_text("")
    assert_refused(lambda: render(tmp_path / "file", **small), "Cannot write the videos to ", "file")


@pytest.mark.parametrize(
    ("render", "small", "place", "words"),
    [
        (render_dataset, SURGERY, "train1/video_01.zip", "video_01.zip was not rendered with these settings"),
        (render_moving_objects, MOVING, "pictures/a.png", "pictures, which was not"),
        (render_moving_objects, MOVING, "train/bear/frames/a.png", "bear was not rendered with"),
        (render_moving_objects, MOVING, "validation/notes.txt", "notes.txt was not rendered with"),
    ],
)
def test_other_data_is_neither_overwritten_nor_mixed(tmp_path, render, small, place, words):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_bytes(b"mine")
    (tmp_path / ".DS_Store").write_bytes(b"")
    before = contents(tmp_path)
    assert_refused(lambda: render(tmp_path, **small), words)
    assert contents(tmp_path) == before


def test_videos_of_another_version_are_refused(tmp_path, monkeypatch):
    small = {**SURGERY, "test_videos": 0, "seconds": 1}
    with monkeypatch.context() as earlier:
        earlier.setattr(write, "CONTENT", 1)
        render_dataset(tmp_path, **small)
    assert_refused(lambda: render_dataset(tmp_path, **small), "video_01.zip", "by this version", "remove that file")


def test_an_archive_of_other_videos_is_not_overwritten(tmp_path):
    (tmp_path / "train1").mkdir()
    with zipfile.ZipFile(tmp_path / "train1/video_01.zip", "w") as archive:
        archive.writestr("video_left.avi", b"real")
    words = "video_01.zip was not rendered with these settings"
    assert_refused(lambda: render_dataset(tmp_path, **SURGERY), words)
    assert contents(tmp_path) == {"train1/video_01.zip/video_left.avi": b"real"}


@each_renderer
def test_other_settings_in_the_same_root_are_refused(tmp_path, render, small):
    render(tmp_path, **small)
    before = contents(tmp_path)
    last = {"train_videos": 0} if render is render_dataset else {"train_videos": 1}
    for change in ({"seed": 1}, last, {"seconds": 3}, {"size": (80, 48)}):
        assert_refused(partial(render, tmp_path, **{**small, **change}), "not rendered with these settings")
    assert contents(tmp_path) == before
