import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
from making import write_video
from mistakes import assert_refused

from dinoseg.extensions.video import access as video_access
from dinoseg.extensions.video import index as video_index
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.index import find_index, index_videos

SIZE = (64, 48)


def picture(index):
    rng = np.random.default_rng(7)
    base = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), SIZE)
    frame = np.roll(base, (index * 3, index), (1, 0)).copy()
    cv2.putText(frame, str(index), (4, 30), 0, 0.8, (255, 255, 255), 2)
    return frame


def write(path, fourcc, count, draw=picture):
    return write_video(path, count, SIZE, fourcc, draw)


def packets(path):
    """Yield each packet of a video, and whether it holds a key frame."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
    good, packet = capture.read()
    while good:
        yield packet, capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME)
        good, packet = capture.read()


def remux(source, target, fourcc):
    """Copy a video's packets with times of a varying rate."""
    raw = [cv2.VIDEOWRITER_PROP_RAW_VIDEO, 1]
    writer = cv2.VideoWriter(str(target), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*fourcc), 60, SIZE, raw)
    assert writer.isOpened()
    for index, (packet, is_key) in enumerate(packets(source)):
        writer.set(cv2.VIDEOWRITER_PROP_KEY_FLAG, is_key)
        writer.set(cv2.VIDEOWRITER_PROP_PTS, index + index // 7 + 5 * (index // 31))
        writer.set(cv2.VIDEOWRITER_PROP_DTS_DELAY, 0)
        writer.write(packet)
    writer.release()
    return target


def sequential(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        good, image = capture.read()
        if not good:
            return frames
        frames.append(image[..., ::-1])


@pytest.fixture
def avi(tmp_path):
    return write(tmp_path / "a.avi", "XVID", 61)


def same(paths, cache_dir=None):
    """Read frames of videos in any order, and compare them with decoding from the start."""
    rng = np.random.default_rng(0)
    truth = {path: sequential(path) for path in paths}
    jobs = [(path, index) for path in paths for index in [*range(len(truth[path])), *range(0, len(truth[path]), 5)]]
    for number in rng.permutation(len(jobs))[:60]:
        path, index = jobs[number]
        found = VideoFrame(path, index, cache_dir).read()
        np.testing.assert_array_equal(found, truth[path][index], err_msg=f"{path} {index}")
    return truth


def test_any_order_equals_decoding_from_the_start(tmp_path):
    """Plain jumps of OpenCV miss in videos of varying rate, and in MPEG streams."""
    xvid = write(tmp_path / "plain.avi", "XVID", 150)
    bare = tmp_path / "bare.m4v"  # without container, and so without times
    bare.write_bytes(b"".join(packet.tobytes() for packet, _ in packets(xvid)))
    paths = [
        xvid,
        bare,
        write(tmp_path / "one.avi", "XVID", 1),
        write(tmp_path / "motion.avi", "MJPG", 40),
        write(tmp_path / "lossless.avi", "FFV1", 30),
        write(tmp_path / "part4.mp4", "mp4v", 130),
        write(tmp_path / "program.mpg", "mpg1", 80),
        remux(xvid, tmp_path / "gaps.mp4", "mp4v"),
        remux(xvid, tmp_path / "gaps.mkv", "XVID"),
        remux(xvid, tmp_path / "gaps.avi", "XVID"),
    ]
    for path in paths:
        assert len(find_index(path, None)) == len(same([path])[path])


def test_few_videos_stay_open_and_equal_frames_are_separate(tmp_path):
    same([write(tmp_path / f"{number}.avi", "MJPG", 4 + number) for number in range(7)])
    assert len(video_access._open.readers) <= 4
    path = write(tmp_path / "still.avi", "XVID", 90, lambda index: picture(3 if index < 70 else index))
    frames = same([path])[path]
    assert any(np.array_equal(frames[index], frames[index + 1]) for index in range(60))


def test_stored_video_index_avoids_another_scan(avi, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "cache"
    same([avi], cache)
    (kept,) = (cache / "videos").iterdir()
    assert kept.name.startswith("a_") and kept.suffix == ".npz"
    video_index._known.clear()
    with monkeypatch.context() as patch:
        patch.setattr(video_index, "open_decoder", None)
        same([avi], cache)
    video_index._known.clear()
    kept.write_bytes(kept.read_bytes()[:100])
    same([avi], cache)
    assert "indexing again" in caplog.text and len(np.load(kept)["times"]) == 61
    video_index._known.clear()
    (tmp_path / "file").write_text("a file where the folder should be")
    same([avi], tmp_path / "file")
    assert "Cannot store" in caplog.text


def test_a_replaced_video_is_noticed(avi):
    before = VideoFrame(avi, 20).read()
    write(avi, "XVID", 40, lambda index: picture(index + 100))
    os.utime(avi, ns=(1, 1))
    assert not np.array_equal(same([avi])[avi][20], before)
    assert_refused(lambda: VideoFrame(avi, 40).read(), "no frame 40")
    index = video_index._known[video_index.file_key(avi)]
    index.sums[30] ^= 1  # pixels that changed under the same stamp
    assert_refused(lambda: VideoFrame(avi, 30).read(), "Frame 30 of ", "a.avi has changed since")
    assert VideoFrame(avi, 31).read().shape == (48, 64, 3)


class Lying:
    """A decoder that lands elsewhere than it is told to, and may lie about the time there."""

    def __init__(self, decoder, honest):
        self.decoder, self.honest, self.shift = decoder, honest, 0

    def jump(self, time):
        self.shift = Fraction(100, 60)
        self.decoder.jump(time + 1000 * float(self.shift))

    @property
    def time(self):
        return self.decoder.time - (0 if self.honest else self.shift)

    def __getattr__(self, name):
        return getattr(self.decoder, name)


@pytest.mark.parametrize("honest", [True, False])
def test_inexact_seeks_are_corrected(tmp_path, monkeypatch, honest):
    path = write(tmp_path / "a.avi", "XVID", 300)
    opened = []

    def open_lying(path):
        opened.append(path)
        return Lying(video_index.open_decoder(path), honest)

    monkeypatch.setattr(video_access, "open_decoder", open_lying)
    truth = sequential(path)
    for index in (250, 3, 299, 120):
        np.testing.assert_array_equal(VideoFrame(path, index).read(), truth[index])
    assert len(opened) > 1


def checksums(path, indices):
    return [zlib.crc32(np.ascontiguousarray(VideoFrame(path, index).read())) for index in indices]


@pytest.mark.filterwarnings("ignore:.* use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.heavy)])
def test_processes_and_threads_do_not_disturb_one_another(avi, method):
    indices = [60, 3, 41, 7, 20]
    wanted = [zlib.crc32(np.ascontiguousarray(sequential(avi)[index])) for index in indices]
    assert checksums(avi, indices) == wanted
    context = get_context(method)
    with context.Pool(2) as pool:
        waiting = [pool.apply_async(checksums, (avi, indices)) for _ in range(4)]
        assert checksums(avi, indices) == wanted
        assert [job.get(60) for job in waiting] == [wanted] * 4
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda _: checksums(avi, indices), range(9))) == [wanted] * 9


def test_missing_frames_and_videos_are_refused(avi, tmp_path):
    def refused(name, *words, index=0):
        assert_refused(lambda: VideoFrame(tmp_path / name, index).read(), *words)

    for index in (61, 10_000, -1):
        refused("a.avi", f"a.avi has no frame {index}: it has 61 frames, 0 to 60", index=index)
    refused("gone.avi", "Cannot read the video ", "gone.avi: No such file")
    for name, content in (("text.avi", b"no video"), ("empty.avi", b"")):
        (tmp_path / name).write_bytes(content)
        refused(name, "Cannot read ", f"{name} as a video")


@pytest.mark.parametrize("workers", [1, 2, None])
def test_many_videos_are_read_concurrently(tmp_path, workers):
    paths = [write(tmp_path / f"{number}.avi", "MJPG", number + 1) for number in range(4)]
    bad, gone = tmp_path / "bad.avi", tmp_path / "gone.avi"
    bad.write_text("no video")
    found, wrong = index_videos([*paths[:2], bad, *paths[2:], gone], tmp_path / "cache", workers=workers)
    assert list(found) == paths and [len(found[path]) for path in paths] == [1, 2, 3, 4]
    assert all(index.fps == 60 for index in found.values())
    assert [*wrong] == [bad, gone] and "Cannot read" in wrong[bad] and "No such file" in wrong[gone]
    assert len(list((tmp_path / "cache/videos").iterdir())) == 4, "no lock and no part is left"
