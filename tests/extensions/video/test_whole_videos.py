"""Whole videos that hold fewer frames than their header counts are read; truncated ones are refused."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest
from films import append_empty_slots, write_edits, write_plain
from mistakes import assert_refused

from dinoseg.extensions.prepare.sarrarp import extract_frames
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.decoder import Decoder, count_slots
from dinoseg.extensions.video.index import find_index
from dinoseg.extensions.video.length import count_frames, promised_frames
from dinoseg.extensions.video.prediction import VideoReader

TICK, DELAY = 512, 1024  # ticks of a frame of 30 fps in FFmpeg's mp4 files, and of the reordering of H.264
GAPS = [index + 3 * (index // 7) for index in range(60)]  # 84 time slots
FAST = {"movflags": "+faststart"}


def noise(index):
    return np.random.default_rng(index).integers(0, 256, (48, 64, 3), np.uint8)


def write_cut(path, *edits):
    """Write 100 frames of which an edit list shows a part; the index stands in front."""
    whole = write_plain(path.with_name(f"whole_{path.name}"), 100, pixels=noise, options=FAST)
    return write_edits(whole, path, *edits)


WHOLE = {  # how to write a video, and its number of frames
    "cut.mp4": (lambda path: write_cut(path, (1000, DELAY + 40 * TICK)), 30),
    "cut.mov": (lambda path: write_cut(path, (1500, DELAY + 55 * TICK)), 45),
    "delayed.mp4": (lambda path: write_cut(path, (500, -1), (1000, DELAY + 20 * TICK)), 30),
    "two_parts.mp4": (lambda path: write_cut(path, (1000, DELAY), (1000, DELAY + 60 * TICK)), 60),
    "repeated.mp4": (lambda path: write_cut(path, *[(1000, DELAY)] * 5), 150),
    "gaps.avi": (lambda path: write_plain(path, 60, codec="mpeg4", slots=GAPS, pixels=noise), 60),
    "gaps_h264.avi": (lambda path: write_plain(path, 60, slots=GAPS, pixels=noise), 60),
    "late_gaps.avi": (lambda path: append_empty_slots(write_plain(path, 60, codec="mjpeg", pixels=noise), 20), 60),
    "gaps.mp4": (lambda path: write_plain(path, 60, slots=GAPS, pixels=noise, options=FAST), 60),
    "plain.mp4": (lambda path: write_plain(path, 60, pixels=noise, options=FAST), 60),
    "plain.ts": (lambda path: write_plain(path, 60), 60),
    "plain.mkv": (lambda path: write_plain(path, 60), 60),
}


@cache
def whole_bytes(name):
    with TemporaryDirectory() as folder:
        return WHOLE[name][0](Path(folder) / name).read_bytes()


@pytest.mark.parametrize("name", WHOLE)
def test_every_reader_accepts_a_whole_video(name, tmp_path):
    path = tmp_path / name
    frames = WHOLE[name][1]
    path.write_bytes(whole_bytes(name))
    assert len(find_index(path, None)) == count_frames(path) == promised_frames(path) == frames
    assert extract_frames(path, tmp_path / "frames", step=60) == frames
    with VideoReader(path) as reader:
        assert reader.count == frames  # hidden frames are not announced
        assert sum(1 for _ in reader) == frames


def test_frames_of_a_cut_video_are_read_in_any_order(tmp_path):
    path = write_cut(tmp_path / "cut.mp4", (2000, DELAY + 35 * TICK))
    with VideoReader(path) as reader:
        shown = list(reader)
    for index in np.random.default_rng(0).permutation(len(shown)):
        np.testing.assert_array_equal(VideoFrame(path, int(index)).read(), shown[index])


def refuse_everywhere(path, tmp_path):
    words = (f"{path.name} is truncated: ", " frames read")
    assert_refused(lambda: find_index(path, None), *words)
    assert_refused(lambda: extract_frames(path, tmp_path / "frames", step=60), *words)
    with VideoReader(path) as reader:
        assert_refused(lambda: list(reader), f"{path.name} ends early")


TRUNCATED = {  # shares of a file's bytes that do not hold the last frames shown
    "cut.mp4": [0.45, 0.6],
    "cut.mov": [0.6, 0.9],
    "delayed.mp4": [0.3, 0.4],
    "two_parts.mp4": [0.2, 0.8],
    "repeated.mp4": [0.2],
    "gaps.avi": [0.5, 0.9],
    "gaps_h264.avi": [0.5, 0.9],
    "late_gaps.avi": [0.5, 0.9, 0.995],
    "gaps.mp4": [0.5, 0.9],
    "plain.mp4": [0.5, 0.9],
    "plain.mkv": [0.5, 0.9],
}


@pytest.mark.parametrize(("name", "share"), [(name, share) for name in TRUNCATED for share in TRUNCATED[name]])
def test_every_reader_refuses_a_truncated_video(tmp_path, name, share):
    (tmp_path / name).write_bytes(whole_bytes(name)[: int(share * len(whole_bytes(name)))])
    refuse_everywhere(tmp_path / name, tmp_path)


def test_damage_within_a_counted_video_is_refused(tmp_path):
    data = bytearray(write_plain(tmp_path / "whole.mp4", 100, pixels=noise).read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    middle = (start + end) // 2
    data[middle : middle + (end - start) // 4] = bytes((end - start) // 4)
    (tmp_path / "damaged.mp4").write_bytes(data)
    refuse_everywhere(tmp_path / "damaged.mp4", tmp_path)


@pytest.mark.parametrize("lost", [1, 2, 6])
def test_one_packet_less_than_counted_is_no_loss(tmp_path, lost):
    path = write_plain(tmp_path / "v.avi", 30, codec="mjpeg")
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 8 + 32  # number of time slots
    data[length : length + 4] = (30 + lost).to_bytes(4, "little")
    path.write_bytes(data)
    with Decoder(path) as decoder:
        while decoder.advance():
            pass
        assert decoder.is_truncated() == (lost > 1)


def is_damaged_truncated(path, frames, damaged):
    """Write a video whose first packets cannot be decoded, and return whether it counts as truncated."""
    data = write_plain(path, frames, codec="mjpeg").read_bytes()
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    for packet in packets[:damaged]:
        data = data.replace(packet, bytes(len(packet)), 1)
    path.write_bytes(data)
    with Decoder(path) as decoder:
        while decoder.advance():
            pass
        return decoder.is_truncated()


def test_one_undecodable_packet_is_no_loss(tmp_path, monkeypatch):
    path = tmp_path / "v.avi"
    assert is_damaged_truncated(path, 1, 1) and is_damaged_truncated(path, 2, 2)  # no frame is left
    assert not is_damaged_truncated(path, 30, 1) and is_damaged_truncated(path, 30, 2)
    monkeypatch.setattr(Decoder, "declared_frames", 40)  # counts frames that a cut leaves out
    assert not is_damaged_truncated(path, 30, 1) and is_damaged_truncated(path, 30, 2)


def test_slots_are_counted_behind_a_chunk_of_odd_size(tmp_path):
    path = write_plain(tmp_path / "v.avi", 30, codec="mjpeg")
    data = bytearray(path.read_bytes())
    index = data.index(b"idx1")
    data[index:index] = b"JUNK\x03\0\0\0abc\0"
    path.write_bytes(data)
    assert count_slots(path, 0) == 30 and count_slots(path, 1) == 0
