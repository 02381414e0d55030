import os
import resource
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from chromium import opened_page
from films import write_film, write_plain
from mistakes import assert_refused

from dinoseg.extensions.video import prediction as video_file
from dinoseg.extensions.video import writer as video_writer
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.prediction import VideoReader, VideoTraits
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.utils.errors import UserError


def encode(path, frames, *, codec="libx264", layout="yuv444p", matrix=None, aspect=None, turned=0, **options):
    """Write images (H, W, 3) with a codec's options, tags of colours, and a matrix or degrees to turn them."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], layout
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.codec_context.colorspace = matrix
        if turned:
            stream.set_display_matrix(turned)
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=layout)))
        file.mux(stream.encode(None))
    return path


def noise(size=(48, 64), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def grey(index):
    return np.full((48, 64, 3), 10 * index, np.uint8)


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "mjpeg"), ("mp4", "libx264"), ("mkv", "libx264")])
def test_frames_come_in_order_as_rgb(tmp_path, suffix, codec):
    path = write_plain(tmp_path / f"v.{suffix}", 12, codec=codec, rate=20, pixels=grey)
    with VideoReader(path) as reader:
        assert reader.size == (48, 64) and reader.fps == pytest.approx(20)
        # names up to the announced length are known
        assert reader.position("12") == reader.count == 12 and reader.position("99") is None
        frames = list(reader)
    assert len(frames) == reader.frames_read == 12
    assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in frames)
    levels = [float(frame.mean()) for frame in frames]
    assert np.allclose(np.diff(levels), 10, atol=1.5)


@pytest.mark.parametrize(("layout", "matrix"), [("yuv420p", 1), ("yuv444p", 5), ("yuv420p10le", 9), ("gray", 2)])
def test_frames_are_to_the_bit_those_that_data_sets_read(tmp_path, layout, matrix):
    path = encode(tmp_path / "v.mkv", [noise((50, 66))] * 3, codec="ffv1", layout=layout, matrix=matrix)
    with VideoReader(path) as reader:
        for index, frame in enumerate(reader):
            assert np.array_equal(frame, VideoFrame(path, index).read())
    assert reader.frames_read == 3


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
                         + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)])  # fmt: skip
def test_all_eight_ways_to_turn_and_mirror(tmp_path, matrix):
    stored = noise((3, 4))[..., :1].repeat(16, 0).repeat(16, 1).repeat(3, 2)
    a, b, c, d = (65536 * number for number in matrix)
    path = encode(tmp_path / "v.mp4", [stored], turned=[a, b, 0, c, d, 0, 0, 0, 1 << 30], crf="0")
    a, b, c, d = matrix
    shown = np.zeros((64, 48, 3) if b else (48, 64, 3), np.uint8)
    for y in range(48):
        for x in range(64):
            column, row = a * x + c * y, b * x + d * y  # negative ones count from the other end
            shown[row - (b + d < 0), column - (a + c < 0)] = stored[y, x]
    with VideoReader(path) as reader:
        assert reader.size == shown.shape[:2]
        (frame,) = reader
    assert frame.shape == shown.shape and np.abs(frame.astype(int) - shown).max() < 6


@pytest.mark.parametrize("disposition", [Disposition.attached_pic, Disposition.default])
def test_the_cover_of_a_song_is_no_video(tmp_path, disposition):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        song, cover = file.add_stream("aac", rate=8000), file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 16, "yuvj420p", disposition
        file.mux(cover.encode(av.VideoFrame(32, 16, "yuvj420p")))
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        heard.rate = 8000
        for stream, last in ((song, heard), (song, None), (cover, None)):
            file.mux(stream.encode(last))
    if disposition == Disposition.default:
        assert VideoReader(path).size == (16, 32)
    else:
        assert_refused(lambda: VideoReader(path), "a.mp4 has no video stream")


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "mjpeg"), ("mkv", "mpeg4")])
def test_a_truncated_video_is_named_with_its_frames(tmp_path, suffix, codec):
    path = write_plain(tmp_path / f"cut.{suffix}", 25, codec=codec, pixels=lambda index: noise(seed=index))
    os.truncate(path, path.stat().st_size // 2)
    with VideoReader(path) as reader, pytest.raises(UserError) as error:
        list(reader)
    assert 0 < reader.frames_read < 25
    assert f"cut.{suffix} ends early: {reader.frames_read} of 25 frames read" in str(error.value)


def test_a_frame_rate_that_is_nonsense_becomes_25(tmp_path, monkeypatch):
    path = write_plain(tmp_path / "v.mp4", 3)
    rate = property(lambda _: Fraction(90000), lambda *_: None)
    monkeypatch.setattr(video_file.Decoder, "rate", rate, raising=False)
    with VideoReader(path) as reader:
        assert reader.fps == 25


def test_interlaced_frames_come_as_stored(tmp_path):
    with VideoReader(encode(tmp_path / "v.mp4", [noise()] * 3, flags="+ildct+ilme", crf="0")) as reader:
        frames = list(reader)
    assert len(frames) == 3 and np.abs(frames[1].astype(int) - noise()).max() < 8


def test_video_with_longer_sound_is_not_truncated(tmp_path):
    for suffix in ("mkv", "ts", "webm"):
        path = write_film(tmp_path / f"v.{suffix}", seconds_of_sound=2)
        with VideoReader(path) as reader:
            assert len(list(reader)) == 24


def copy_film(source, target):
    with (
        VideoReader(source) as reader,
        VideoWriter(target, reader.rate, reader.size, like=reader.traits) as writer,
    ):
        for frame, time in reader.timed_frames():
            writer.write(frame, time)
    return av.open(str(target))


def times_of(file):
    return [frame.pts * frame.time_base for frame in file.decode(video=0)]


def test_frame_rate_is_preserved(tmp_path):
    with copy_film(write_film(tmp_path / "in.mkv"), tmp_path / "out.mp4") as copy:
        picture = copy.streams.video[0]
        assert picture.codec_context.name == "h264" and picture.codec_context.pix_fmt == "yuv420p"
        assert picture.average_rate == Fraction(24000, 1001) and picture.frames == 24 and not copy.streams.audio
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index at the start, as browsers need it


def test_uneven_frame_times_are_preserved(tmp_path):
    ticks = [0, 3000, 6000, 21000, 24000, 30000, 90000, 93000]
    source = write_film(tmp_path / "in.mp4", rate=Fraction(30), frames=8, times=ticks)
    with copy_film(source, tmp_path / "out.mp4") as copy, av.open(str(source)) as original:
        times = times_of(copy)
        assert times == times_of(original) == [Fraction(tick, 90000) for tick in ticks]


@pytest.mark.parametrize("matrix", [1, 5, 9, 0, 8])  # BT.709, BT.601, BT.2020; RGB and YCgCo, which are not written
def test_colours_are_preserved(tmp_path, matrix):
    tags = (matrix or 1, 1, matrix)
    traits = VideoTraits(Fraction(1, 10), Fraction(1), tags)
    colours = [(200, 40, 40), (30, 180, 60), (40, 60, 220)]
    with VideoWriter(tmp_path / "out.mp4", 10, (16, 16), like=traits) as writer:
        for colour in colours:
            writer.write(np.full((16, 16, 3), colour, np.uint8))
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert reader.traits.colours == (*tags[:2], 2 if matrix in (0, 8) else matrix)
        seen = [frame.reshape(-1, 3).mean(axis=0) for frame in reader]
    assert np.abs(np.array(seen) - colours).max() < 4


@pytest.mark.parametrize("turned", [False, True])
def test_pixel_aspect_ratio_is_copied(tmp_path, turned):
    quarter = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30] if turned else 0
    encode(tmp_path / "in.mp4", [noise()], layout="yuv420p", aspect=Fraction(4, 3), turned=quarter)
    with copy_film(tmp_path / "in.mp4", tmp_path / "out.mp4") as copy:
        assert copy.streams.video[0].sample_aspect_ratio == (Fraction(3, 4) if turned else Fraction(4, 3))


def test_long_gaps_between_frames_are_preserved(tmp_path):
    traits = VideoTraits(Fraction(1, 2**19), Fraction(1), (2, 2, 2))
    with VideoWriter(tmp_path / "out.mp4", 10, (16, 16), like=traits) as writer:
        for time in (0, 900, 1800, 2700):
            writer.write(np.zeros((16, 16, 3), np.uint8), Fraction(time))
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert times_of(file) == [0, 900, 1800, 2700]
    with (
        pytest.raises(UserError, match=r"frame 1 is 99999999\.0 s after the start, more than 1024 s.*setpts"),
        VideoWriter(tmp_path / "far.mp4", 10, (16, 16), like=traits) as writer,
    ):
        for time in (0, 99999999):
            writer.write(np.zeros((16, 16, 3), np.uint8), Fraction(time))
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (2, 2)])
def test_written_video_can_be_read(tmp_path, size):
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


def test_frames_that_did_not_arrive_are_an_error(tmp_path):
    writer = VideoWriter(tmp_path / "out.mp4", 25, (48, 64))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="does not fit"):
        writer.write(np.zeros((48, 65, 3), np.uint8))
    writer.frames_written = 9
    assert_refused(writer.close, "Cannot write ", "out.mp4: 1 of 9 frames arrived", "disk space")
    assert_refused(VideoWriter(tmp_path / "none.mp4", 25, (48, 64)).close, "0 of 0 frames arrived")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_error_and_leaves_no_file(tmp_path, capfd):
    draw = np.random.default_rng(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with (
            pytest.raises(UserError, match="File too large. Free some disk space"),
            VideoWriter(tmp_path / "a.mp4", 25, (96, 128)) as writer,
        ):
            for _ in range(300):
                writer.write(draw.integers(0, 256, (96, 128, 3)).astype(np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [] and "Failed to write" not in capfd.readouterr().err


def test_no_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(video_writer, "_CODECS", {"none": {}, "either": {}})
    with pytest.raises(UserError, match="PyAV lacks the encoders none, either"):
        VideoWriter(tmp_path / "out.mp4", 25, (48, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("older", [None, b"older"])
def test_exception_leaves_the_folder_as_it_was(tmp_path, older):
    path = tmp_path / "out.mp4"
    if older:
        path.write_bytes(older)
    with pytest.raises(RuntimeError), VideoWriter(path, 25, (48, 64)) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        raise RuntimeError
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [older] * bool(older)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no video at all" * 99),
        lambda path: path.write_bytes(write_plain(path, 12).read_bytes()[:-400]),  # its index, at the end
        lambda path: path.write_text(f"ffconcat version 1.0\nfile {write_plain(path.with_name('a.mp4'), 3).name}\n"),
    ],
)
def test_invalid_video_is_named_without_decoder_output(tmp_path, write, capfd):
    write(tmp_path / "bad.mp4")
    capfd.readouterr()
    assert_refused(lambda: VideoReader(tmp_path / "bad.mp4"), "bad.mp4 as a video: 0 frames read", "ffmpeg")
    assert capfd.readouterr().err == ""


@pytest.mark.heavy
def test_overlay_plays_in_a_browser(tmp_path):
    copy_film(write_film(tmp_path / "in.mkv", frames=48), tmp_path / "out.mp4").close()
    (tmp_path / "page.html").write_text("<link rel=icon href=data:,><video id=v src=out.mp4 muted></video>")
    with opened_page(f"file://{tmp_path}/page.html") as page:
        page.wait_for_function("document.getElementById('v').readyState >= 2", timeout=120_000)
        page.evaluate("document.getElementById('v').play()")
        page.wait_for_function("document.getElementById('v').currentTime > 0.5", timeout=120_000)
        state = page.evaluate("(v => [v.videoWidth, v.videoHeight, v.error])(v)")
        assert state == [64, 48, None] and page.complaints == []
