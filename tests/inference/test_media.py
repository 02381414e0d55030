import resource
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinoseg.errors import UserError
from dinoseg.inference import media
from dinoseg.inference.media import VideoReader, VideoWriter, is_video, list_inputs


def make_video(path, frames=12, size=(48, 64), codec="MJPG", fps=20.0):
    """Each frame is one grey level, brighter to the right, so that order and turning can be seen."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, size[::-1])
    assert writer.isOpened()
    for index in range(frames):
        ramp = np.linspace(0, 60, size[1]).astype(np.uint8) + np.uint8(10 * index)
        writer.write(np.broadcast_to(ramp[None, :, None], (*size, 3)).copy())
    writer.release()
    return path


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


class TestListInputs:
    def test_a_file_of_either_kind(self, tmp_path):
        touch(tmp_path, "a.JPG", "b.Mp4")
        assert list_inputs(str(tmp_path / "a.JPG")) == [tmp_path / "a.JPG"]
        assert list_inputs(str(tmp_path / "b.Mp4")) == [tmp_path / "b.Mp4"]
        assert is_video(tmp_path / "b.Mp4") and not is_video(tmp_path / "a.JPG")

    def test_a_folder_gives_its_own_media_sorted(self, tmp_path):
        touch(tmp_path, "b.png", "a.jpg", "notes.txt", ".hidden.png", "deep/c.png", "v.avi")
        (tmp_path / "folder.png").mkdir()
        assert [path.name for path in list_inputs(str(tmp_path))] == ["a.jpg", "b.png", "v.avi"]

    def test_frames_come_as_they_are_counted(self, tmp_path):
        touch(tmp_path, "frame10.png", "frame2.png", "frame1.png")
        expected = ["frame1.png", "frame2.png", "frame10.png"]
        for source in (tmp_path, tmp_path / "*.png"):
            assert [path.name for path in list_inputs(str(source))] == expected

    def test_patterns(self, tmp_path):
        touch(tmp_path, "x1.png", "x2.png", "y.png", "deep/x3.png", "x.txt")
        assert [path.name for path in list_inputs(f"{tmp_path}/x?.png")] == ["x1.png", "x2.png"]
        assert [path.name for path in list_inputs(f"{tmp_path}/x*")] == ["x1.png", "x2.png"]
        assert {path.name for path in list_inputs(f"{tmp_path}/**/*.png")} == {
            "x1.png",
            "x2.png",
            "x3.png",
            "y.png",
        }

    def test_a_name_that_looks_like_a_pattern_is_a_name_first(self, tmp_path):
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
            ("nowhere.png", r"No such file or folder: input=.*nowhere\.png.*\.jpg.*\.mp4"),
            ("empty", r"The folder .*empty holds no image or video directly.*Accepted"),
            ("none*.png", r"The pattern .*none\*\.png matches no image or video.*Accepted"),
            ("notes.txt", r"notes\.txt is of an unknown kind \(\.txt\).*\.png"),
            ("bare", r"bare is of an unknown kind \(no suffix\)"),
            ("*.txt", "matches no image or video"),
        ],
    )
    def test_nothing_to_read_is_named(self, tmp_path, source, message):
        (tmp_path / "empty").mkdir()
        touch(tmp_path, "notes.txt", "bare", "empty/deep/a.png")
        with pytest.raises(UserError, match=message):
            list_inputs(str(tmp_path / source))

    def test_a_folder_without_permission(self, tmp_path, monkeypatch):
        def denied(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", denied)
        with pytest.raises(UserError, match="Permission denied"):
            list_inputs(str(tmp_path))


class TestVideoReader:
    @pytest.mark.parametrize(("suffix", "codec"), [("avi", "MJPG"), ("mp4", "mp4v"), ("mkv", "mp4v")])
    def test_frames_come_in_order_as_rgb(self, tmp_path, suffix, codec):
        path = make_video(tmp_path / f"v.{suffix}", codec=codec)
        with VideoReader(path) as reader:
            assert reader.size == (48, 64) and reader.fps == pytest.approx(20) and reader.count == 12
            frames = list(reader)
        assert len(frames) == reader.frames_read == 12
        assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in frames)
        levels = [float(frame.mean()) for frame in frames]
        assert np.allclose(np.diff(levels), 10, atol=1.5)

    def test_channels_are_red_green_blue(self, tmp_path):
        path = tmp_path / "red.avi"
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 32))
        writer.write(np.full((32, 32, 3), (0, 0, 255), np.uint8))  # OpenCV writes BGR
        writer.release()
        with VideoReader(path) as reader:
            red, green, blue = next(iter(reader)).reshape(-1, 3).mean(axis=0)
        assert red > 240 and green < 15 and blue < 15

    def test_a_rotation_tag_is_obeyed(self, tmp_path):
        data = bytearray(make_video(tmp_path / "flat.mp4", codec="mp4v").read_bytes())
        matrix = data.index(b"tkhd") + 44  # ISO 14496-12, track header version 0
        data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
        (tmp_path / "turned.mp4").write_bytes(data)
        with VideoReader(tmp_path / "turned.mp4") as reader:
            assert reader.size == (64, 48)
            first = next(iter(reader)).astype(int)
        assert first[-1].mean() - first[0].mean() > 40  # left to right has become top to bottom
        assert abs(first[:, 0].mean() - first[:, -1].mean()) < 5

    @pytest.mark.parametrize(("suffix", "codec"), [("avi", "MJPG"), ("mkv", "mp4v")])
    def test_a_truncated_video_is_named_with_its_frames(self, tmp_path, suffix, codec):
        whole = make_video(tmp_path / f"whole.{suffix}", frames=25, codec=codec).read_bytes()
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        with VideoReader(path) as reader, pytest.raises(UserError) as error:
            list(reader)
        assert 0 < reader.frames_read < 25
        assert f"cut.{suffix} ends early: {reader.frames_read} of 25 frames read" in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"no video at all" * 99, None])
    def test_what_is_no_video_is_named_and_nothing_is_printed(self, tmp_path, content, capfd):
        path = tmp_path / "bad.mp4"
        if content is None:  # an mp4 without its index, which stands at the end
            content = make_video(tmp_path / "whole.mp4", codec="mp4v").read_bytes()[:-400]
        path.write_bytes(content)
        capfd.readouterr()
        with pytest.raises(UserError, match=r"Cannot read .*bad\.mp4 as a video: 0 frames read.*ffmpeg"):
            VideoReader(path)
        assert capfd.readouterr().err == ""

    def test_a_frame_rate_that_is_nonsense_becomes_25(self, tmp_path, monkeypatch):
        path = make_video(tmp_path / "v.avi")
        real = cv2.VideoCapture

        class Odd:
            def __init__(self, *arguments):
                self.capture = real(*arguments)

            def get(self, key):
                return 90000.0 if key == cv2.CAP_PROP_FPS else self.capture.get(key)

            def __getattr__(self, name):
                return getattr(self.capture, name)

        monkeypatch.setattr(media.cv2, "VideoCapture", Odd)
        with VideoReader(path) as reader:
            assert reader.fps == 25


class TestVideoWriter:
    @pytest.mark.parametrize("size", [(48, 64), (47, 63), (2, 2)])
    def test_what_is_written_can_be_read(self, tmp_path, size):
        path = tmp_path / "deep" / "out.mp4"
        with VideoWriter(path, 29.97, size) as writer:
            for index in range(7):
                writer.write(np.full((*size, 3), (30 * index, 0, 200), np.uint8))
                assert not path.exists()
        assert [item.name for item in path.parent.iterdir()] == ["out.mp4"]
        with VideoReader(path) as reader:
            assert reader.fps == pytest.approx(29.97, abs=0.01)
            assert reader.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
            frames = list(reader)
        assert len(frames) == 7
        assert np.abs(frames[6].reshape(-1, 3).mean(axis=0) - (180, 0, 200)).max() < 12

    def test_an_exception_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", 25, (48, 64)) as writer:
            writer.write(np.zeros((48, 64, 3), np.uint8))
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []

    def test_an_exception_leaves_an_older_file_alone(self, tmp_path):
        path = tmp_path / "out.mp4"
        path.write_bytes(b"older")
        with pytest.raises(RuntimeError), VideoWriter(path, 25, (48, 64)):
            raise RuntimeError
        assert path.read_bytes() == b"older"

    def test_frames_that_did_not_arrive_are_an_error(self, tmp_path):
        writer = VideoWriter(tmp_path / "out.mp4", 25, (48, 64))
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.frames_written = 9
        with pytest.raises(UserError, match=r"Cannot write .*out\.mp4: 1 of 9 frames arrived.*disk space"):
            writer.close()
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_told_once(self, tmp_path, capfd):
        draw = np.random.default_rng(0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            with (
                pytest.raises(UserError, match="of 300 frames"),
                VideoWriter(tmp_path / "a.mp4", 25, (96, 128)) as writer,
            ):
                for _ in range(300):
                    writer.write(draw.integers(0, 256, (96, 128, 3)).astype(np.uint8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == [] and "Failed to write" not in capfd.readouterr().err

    def test_a_frame_of_another_size_is_refused(self, tmp_path):
        with (
            pytest.raises(ValueError, match="does not fit"),
            VideoWriter(tmp_path / "o.mp4", 25, (8, 8)) as w,
        ):
            w.write(np.zeros((8, 10, 3), np.uint8))

    def test_no_encoder_is_named(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(media, "_CODECS", ("av01", "hev1"))
        with pytest.raises(UserError, match=r"OpenCV opens none of av01, hev1"):
            VideoWriter(tmp_path / "out.mp4", 25, (48, 64))
        assert list(tmp_path.iterdir()) == []
        assert capfd.readouterr().err == ""
