from pathlib import Path

import pytest

from dinoseg.inference.inputs import is_video, list_inputs
from dinoseg.utils.errors import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


class TestListInputs:
    def test_single_image_or_video_is_listed(self, tmp_path):
        touch(tmp_path, "a.JPG", "b.Mp4")
        assert list_inputs(str(tmp_path / "a.JPG")) == [tmp_path / "a.JPG"]
        assert list_inputs(str(tmp_path / "b.Mp4")) == [tmp_path / "b.Mp4"]
        assert is_video(tmp_path / "b.Mp4") and not is_video(tmp_path / "a.JPG")

    def test_a_folder_gives_its_own_media_sorted(self, tmp_path):
        touch(tmp_path, "b.png", "a.jpg", "notes.txt", ".hidden.png", "deep/c.png", "v.avi")
        (tmp_path / "folder.png").mkdir()
        assert [path.name for path in list_inputs(str(tmp_path))] == ["a.jpg", "b.png", "v.avi"]

    def test_media_in_subfolders_are_left_out_with_a_warning(self, tmp_path, caplog):
        touch(tmp_path, "a.png", "deep/er/b.png", "other/c.mp4", "notes/d.txt")
        assert [path.name for path in list_inputs(str(tmp_path))] == ["a.png"]
        (message,) = caplog.messages
        assert "images or videos in 2 subfolders (deep, other)" in message
        assert [path.name for path in list_inputs(message.split("'")[1])] == ["a.png", "b.png", "c.mp4"]

    def test_frames_are_sorted_numerically(self, tmp_path):
        touch(tmp_path, "frame10.png", "frame2.png", "frame1.png")
        expected = ["frame1.png", "frame2.png", "frame10.png"]
        for source in (tmp_path, tmp_path / "*.png"):
            assert [path.name for path in list_inputs(str(source))] == expected

    def test_glob_patterns_are_expanded(self, tmp_path):
        touch(tmp_path, "x1.png", "x2.png", "y.png", "deep/x3.png", "x.txt")
        assert [path.name for path in list_inputs(f"{tmp_path}/x?.png")] == ["x1.png", "x2.png"]
        assert [path.name for path in list_inputs(f"{tmp_path}/x*")] == ["x1.png", "x2.png"]
        assert {path.name for path in list_inputs(f"{tmp_path}/**/*.png")} == {
            "x1.png",
            "x2.png",
            "x3.png",
            "y.png",
        }

    def test_existing_name_with_glob_characters_is_a_file(self, tmp_path):
        touch(tmp_path, "frame[1].png", "frame1.png")
        assert list_inputs(str(tmp_path / "frame[1].png")) == [tmp_path / "frame[1].png"]

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        touch(tmp_path, "a.png")
        assert list_inputs("~/a.png") == [tmp_path / "a.png"]
        assert list_inputs("~/*.png") == [tmp_path / "a.png"]

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("nowhere.png", r"File or folder not found: input=.*nowhere\.png.*\.jpg.*\.mp4"),
            ("empty", r"The folder .*empty holds no image or video directly.*Accepted"),
            ("none*.png", r"The pattern .*none\*\.png matches no image or video.*Accepted"),
            ("notes.txt", r"notes\.txt is of an unknown kind \(\.txt\).*\.png"),
            ("bare", r"bare is of an unknown kind \(no suffix\)"),
            ("*.txt", "matches no image or video"),
        ],
    )
    def test_source_without_images_is_named(self, tmp_path, source, message):
        (tmp_path / "empty").mkdir()
        touch(tmp_path, "notes.txt", "bare", "empty/deep/a.png")
        with pytest.raises(UserError, match=message):
            list_inputs(str(tmp_path / source))

    def test_folder_without_permission_is_refused(self, tmp_path, monkeypatch):
        def deny_access(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", deny_access)
        with pytest.raises(UserError, match="Permission denied"):
            list_inputs(str(tmp_path))


def test_images_of_unsupported_formats_are_reported(tmp_path, caplog):
    for name in ("a.png", "b.gif", "c.HEIC", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_inputs(str(tmp_path))] == ["a.png"]
    assert "left out 2 files of unsupported formats: b.gif, c.HEIC." in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="There are 2 files of unsupported formats: b.gif, c.HEIC. Convert them"):
        list_inputs(str(tmp_path))
