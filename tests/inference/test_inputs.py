from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from mistakes import assert_refused, refusals

from dinoseg.extensions.video.length import VIDEO_SUFFIXES, is_video
from dinoseg.inference import inputs


def list_inputs(source):
    return inputs.list_inputs(source, videos=VIDEO_SUFFIXES)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_media_in_subfolders_are_left_out_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "a.png", "deep/er/b.png", "other/c.mp4", "notes/d.txt")
    assert [path.name for path in list_inputs(str(tmp_path))] == ["a.png"]
    (message,) = caplog.messages
    assert "images or videos in 2 subfolders (deep, other)" in message
    assert [path.name for path in list_inputs(message.split("'")[1])] == ["a.png", "b.png", "c.mp4"]


FILES = (
    *("a.JPG", "b.Mp4", "v.avi", "notes.txt", ".hidden.png", "deep/c.png", "deep/er/x.png"),
    *("frame10.png", "frame2.png", "frame1.png", "frame[1].png"),
)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a.JPG", ["a.JPG"]),
        ("b.Mp4", ["b.Mp4"]),
        (".", ["a.JPG", "b.Mp4", "frame1.png", "frame2.png", "frame10.png", "frame[1].png", "v.avi"]),
        ("frame?.png", ["frame1.png", "frame2.png"]),
        ("frame1*", ["frame1.png", "frame10.png"]),
        ("frame[1].png", ["frame[1].png"]),  # as the file of this name exists
        ("**/*.png", ["deep/c.png", "deep/er/x.png", "frame1.png", "frame2.png", "frame10.png", "frame[1].png"]),
        ("~/b.Mp4", ["b.Mp4"]),
        ("~/*.avi", ["v.avi"]),
    ],
)
def test_inputs_are_listed_in_numeric_order(tmp_path, monkeypatch, source, found):
    touch(tmp_path, *FILES)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    listed = list_inputs(source if source.startswith("~") else f"{tmp_path}/{source}")
    assert [str(path.relative_to(tmp_path)) for path in listed] == found
    assert is_video(tmp_path / "b.Mp4") and not is_video(tmp_path / "a.JPG")


def test_images_of_unsupported_formats_are_reported(tmp_path, caplog):
    touch(tmp_path, "a.png", "b.gif", "c.HEIC", "notes.txt")
    assert list_inputs(str(tmp_path)) == [tmp_path / "a.png"]
    assert "left out 2 files of unsupported formats: b.gif, c.HEIC." in caplog.text
    (tmp_path / "a.png").unlink()
    words = "There are 2 files of unsupported formats: b.gif, c.HEIC. Convert them"
    assert_refused(lambda: list_inputs(str(tmp_path)), words)


def test_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert_refused(lambda: list_inputs(str(tmp_path)), "Permission denied")


def list_made(source):
    touch(Path(), "notes.txt", "bare", "empty/deep/a.png")
    list_inputs(source)


test_message_names_value_and_remedy = refusals(
    {
        "no file": (partial(list_made, "nowhere.png"), "input=nowhere.png: file or folder not found", ".jpg", ".mp4"),
        "an empty folder": (partial(list_made, "empty"), "input=empty: the folder holds no image or video", "Accepted"),
        "no match": (
            partial(list_made, "none*.png"),
            "input=none*.png: the pattern matches no image or video",
            "Accepted",
        ),
        "another kind": (partial(list_made, "notes.txt"), "notes.txt is of an unknown kind (.txt)", ".png"),
        "no suffix": (partial(list_made, "bare"), "bare is of an unknown kind (no suffix)"),
    }
)
