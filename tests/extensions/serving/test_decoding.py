"""Hostile uploads end in the process that decodes them; a labelled video has a mask for each frame, or no file."""

import os
import sys
import threading
import zipfile
import zlib
from contextlib import closing
from functools import partial

import av
import numpy as np
import pytest
from child_functions import stuck
from image_files import tiff_file
from mistakes import assert_refused
from PIL import Image
from serving_stand_ins import FACTS, InThread, encode_image, picture

from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.serving import decoding
from dinoseg.extensions.serving.decoding import ImageDecoder, VideoDecoder, is_video
from dinoseg.extensions.serving.mask_editor import MaskEditor
from dinoseg.extensions.serving.video import write_labelled_video
from dinoseg.extensions.video.length import count_frames
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.utils.errors import UserError

LIMITS = {"max_pixels": 2000, "max_seconds": 1.0}


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(encode_image(picture()))
    return path


def write_video(path, frames=3, size=(32, 48)):
    with VideoWriter(path, 10.0, size) as writer:
        for number in range(frames):
            writer.write(np.full((*size, 3), 20 * number, np.uint8))
    return path


def test_a_slow_image_is_killed_and_the_next_one_is_decoded(image, monkeypatch):
    assert decoding.SECONDS == 10  # as docs/security.md says
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode_images", stuck)
        decoder = ImageDecoder(10_000)
    with closing(decoder):
        monkeypatch.setattr(decoding, "SECONDS", 60.0)
        decoder._request({"path": "", "max_pixels": 0})  # the answer of `stuck`, which is ready then
        monkeypatch.setattr(decoding, "SECONDS", 0.1)
        assert_refused(lambda: decoder.decode(image), "The file is not decoded within 0.1 s")
        monkeypatch.setattr(decoding, "SECONDS", 60.0)
        decoder._function = decoding.decode_images
        assert (decoder.decode(image) == picture()).all()


def test_killed_decoder_does_not_affect_the_next_image(image, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.write_bytes(encode_image(picture(8, 9), "WEBP", lossless=True))
    with closing(ImageDecoder(10_000)) as decoder:
        assert (decoder.decode(image) == picture()).all()
        decoder.kill()
        assert (decoder.decode(other) == picture(8, 9)).all()
        with monkeypatch.context() as patched:
            patched.setattr(decoding.Child, "receive", lambda child: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                decoder.decode(image)
        assert (decoder.decode(other) == picture(8, 9)).all()


def tiff_in_one_tile(width, height):
    """Return a grey TIFF file of 16 x 16 pixels in a deflated tile of these sides."""
    block = zlib.compress(bytes(256))
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 8, 325: len(block)}
    return tiff_file([(tag, 4, 1, value) for tag, value in values.items()], block)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not bound memory")
@pytest.mark.parametrize(
    "data", [encode_image(Image.new("RGB", (2000, 2000))), tiff_in_one_tile(26_000, 20_000)], ids=["pixels", "tile"]
)
def test_memory_of_decoding_is_bounded(tmp_path, monkeypatch, data):
    monkeypatch.setattr(decoding, "_IMAGE_MEMORY", (0, 2**23))
    (tmp_path / "a").write_bytes(data)
    with closing(ImageDecoder(2**22)) as decoder, pytest.raises(UserError, match="Not enough memory"):
        decoder.decode(tmp_path / "a")


def test_memory_depends_on_the_pixels(tmp_path, monkeypatch):
    given = []

    class Recorded(InThread):
        def __init__(self, function, memory):
            given.append(memory)
            super().__init__(lambda channel: None, memory)

    monkeypatch.setattr(decoding, "Child", Recorded)
    ImageDecoder(1000).close()
    assert_refused(lambda: VideoDecoder(tmp_path / "a", max_pixels=1000, max_seconds=1), "crashed its decoder")
    assert given == [40 * 1000 + 2**28, 64 * 1000 + 2**29]  # as docs/security.md says


def test_large_images_are_not_decoded(image, monkeypatch):
    monkeypatch.setattr(decoding, "read_image", lambda path: pytest.fail("decoded"))
    assert_refused(
        lambda: decoding.read_bounded_image(image, 23), "6 x 4 pixels, more than 23, the limit of mode.max_pixels"
    )


def test_a_video_is_known_by_its_content(tmp_path, image):
    assert is_video(write_video(tmp_path / "a.mp4")) and not is_video(image)
    (tmp_path / "list.mp4").write_bytes(b"#EXTM3U\n/etc/passwd")
    assert not is_video(tmp_path / "list.mp4")


def test_frames_come_from_a_process_unchanged(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with VideoReader(path) as reader, closing(VideoDecoder(path, **LIMITS)) as video:
        assert (video.size, video.count, video.rate) == (reader.size, reader.count, reader.rate)
        assert video.traits == reader.traits
        for (frame, time), (wanted, shown) in zip(video.frames(), reader.timed_frames(), strict=True):
            assert (frame == wanted).all() and time == shown


def write_packets_without_frames(path, count):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for number in range(count):
            packet = av.Packet(b"\0")
            packet.stream, packet.pts, packet.dts = stream, number, number
            container.mux(packet)
    return path


def test_packets_without_frames_are_bounded(tmp_path, monkeypatch):
    path = write_packets_without_frames(tmp_path / "a.mkv", 60)
    monkeypatch.setattr("dinoseg.extensions.video.decoder._MAX_SILENT", 50)
    assert_refused(lambda: VideoReader(path), "a.mkv has 50 packets in a row without a frame")
    assert count_frames(path) == 0
    monkeypatch.setattr(decoding, "Child", InThread)
    with pytest.raises(UserError, match="^The file has more than 20 packets"):
        VideoDecoder(path, max_pixels=10**6, max_seconds=0.01)


def test_long_and_large_videos_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "Child", InThread)
    path = write_video(tmp_path / "a.mp4", frames=12, size=(64, 64))
    for pixels, seconds, *words in ((5000, 1.0, "has 12 frames or more", " limit is 1 s"), (4000, 2.0, "64 x 64")):
        assert_refused(partial(VideoDecoder, path, max_pixels=pixels, max_seconds=seconds), *words)
    with closing(VideoDecoder(path, max_pixels=5000, max_seconds=2.0)) as video:
        video._max_seconds = 0.2  # as if its header stated fewer frames than it has
        assert_refused(lambda: list(video.frames()), "has 3 frames or more")


@pytest.mark.parametrize("share", [0.02, 0.7])
def test_broken_videos_are_refused_without_their_path(tmp_path, monkeypatch, share):
    monkeypatch.setattr(decoding, "Child", InThread)
    path = write_video(tmp_path / "a.mp4", frames=12, size=(64, 64))
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError) as error, closing(VideoDecoder(path, max_pixels=5000, max_seconds=2)) as video:
        list(video.frames())
    assert str(tmp_path) not in str(error.value)


def test_killing_wakes_who_waits_for_a_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "Child", InThread)
    released = threading.Event()
    monkeypatch.setattr(decoding, "read_bounded_image", lambda *_: released.wait() and picture())
    with closing(ImageDecoder(1)) as decoder:
        threading.Timer(0.05, decoder.kill).start()
        assert_refused(lambda: decoder.decode(tmp_path / "a"), "crashed its decoder process")
        released.set()


def test_a_frame_that_takes_too_long_is_an_error(tmp_path, monkeypatch):
    def stall(channel):
        channel.receive()
        about = {"size": [1, 1], "count": 1, "rate": [1, 1], "tick": [1, 1], "aspect": [1, 1], "colours": [1, 1, 1]}
        channel.send(about)
        channel.receive()

    monkeypatch.setattr(decoding, "Child", InThread)
    monkeypatch.setattr(decoding, "decode_video", stall)
    with closing(VideoDecoder(tmp_path / "a", **LIMITS)) as video:
        monkeypatch.setattr(decoding, "SECONDS", 0.1)
        assert_refused(lambda: next(video.frames()), "is not decoded within 0.1 s")


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

    assert_refused(lambda: write_labelled_video(video, tmp_path, FACTS.palette, segment, draw, stop), "Cancelled")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
