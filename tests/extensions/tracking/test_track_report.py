import csv
from fractions import Fraction

import av
import numpy as np
import pytest
from films import write_film
from making import save
from PIL import Image

from dinoseg.extensions.tracking.video.report import ObjectRow, object_rows, write_track_report
from dinoseg.extensions.video.frames import FolderReader
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.report.palette import default_palette, voc_palette, write_indexed_png
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids


def test_the_palette_is_pascal_vocs():
    def bit_by_bit(index):
        red = green = blue = 0
        for shift in range(7, -1, -1):
            red |= (index & 1) << shift
            green |= (index >> 1 & 1) << shift
            blue |= (index >> 2 & 1) << shift
            index >>= 3
        return red, green, blue

    assert voc_palette() == tuple(bit_by_bit(index) for index in range(256))


def test_indexed_image_has_ids_and_colours(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(np.uint8)
    write_indexed_png(tmp_path / "a/b.png", ids)
    with Image.open(tmp_path / "a/b.png") as image:
        assert image.mode == "P" and np.array_equal(image, ids)
        assert np.array_equal(image.convert("RGB"), np.array(voc_palette(), np.uint8)[ids])
    assert np.array_equal(read_ids(tmp_path / "a/b.png"), ids)
    write_indexed_png(tmp_path / "one.png", np.zeros((1, 1), np.uint8))
    assert read_ids(tmp_path / "one.png").tolist() == [[0]]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b.png", "one.png"]


def by_hand(mask, label):
    places = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x] == label]
    ys, xs = [y for y, _ in places], [x for _, x in places]
    return [len(places), sum(xs) / len(xs), sum(ys) / len(ys), min(xs), min(ys), max(xs), max(ys)]


def test_rows_against_counting_by_hand():
    draw = np.random.default_rng(2)
    for _ in range(20):
        mask = draw.choice([0, 0, 0, 1, 4, 254], (7, 11)).astype(np.uint8)
        rows = object_rows(3, "x", mask)
        assert [row[:3] for row in rows] == [(3, "x", label) for label in (1, 4, 254) if (mask == label).any()]
        for row in rows:
            assert row[3:] == pytest.approx(by_hand(mask, row[2]), abs=6e-4)
            assert all(type(value) in (int, float) for value in row[2:])
    assert object_rows(0, "x", np.zeros((3, 4), np.uint8)) == []


@pytest.fixture
def run(tmp_path):
    for number in range(3):
        save(tmp_path / f"in/{number:05d}.png", np.full((31, 41, 3), 100))
        mask = np.zeros((31, 41), np.uint8)
        if number != 1:
            mask[4:24, 5 + number : 25 + number] = 2
        write_indexed_png(tmp_path / f"out/masks/{number:05d}.png", mask)
    return tmp_path


def test_the_overlay_and_the_table(run):
    seen, passed = write_track_report(FolderReader(run / "in"), run / "out", opacity=0.5)
    assert seen == [2] and passed.items == 3
    assert sorted(path.name for path in (run / "out").iterdir()) == ["masks", "objects.csv", "overlay.mp4"]
    with open(run / "out/objects.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(ObjectRow._fields)
    assert rows[1:] == [
        ["0", "00000", "2", "400", "14.5", "13.5", "5", "4", "24", "23"],
        ["2", "00002", "2", "400", "16.5", "13.5", "7", "4", "26", "23"],
    ]
    with VideoReader(run / "out/overlay.mp4") as video:
        assert video.fps == 25 and video.size == (32, 42)  # even, as encoders want it
        frames = list(video)
    assert len(frames) == 3
    tinted = (100 + np.array(default_palette(3)[2])) / 2
    assert np.abs(frames[0][8:20, 9:21].reshape(-1, 3).mean(0) - tinted).max() < 12
    assert np.abs(frames[1].astype(int) - 100).max() < 12


def test_the_overlay_of_a_video_has_its_times(tmp_path):
    ticks = [0, 3000, 6000, 21000, 24000]
    path = write_film(tmp_path / "in.mp4", rate=Fraction(30), frames=len(ticks), times=ticks)
    for number in range(len(ticks)):
        write_indexed_png(tmp_path / f"out/masks/{number:09d}.png", np.ones((48, 64), np.uint8))
    with VideoReader(path) as frames:
        write_track_report(frames, tmp_path / "out", opacity=0.5)
    with av.open(str(tmp_path / "out/overlay.mp4")) as overlay:
        assert [frame.pts * frame.time_base * 90000 for frame in overlay.decode(video=0)] == ticks


def test_replaced_mask_is_named_and_no_partial_report_is_left(run):
    write_indexed_png(run / "out/masks/00002.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(UserError, match=r"00002\.png differs in size from its frame"):
        write_track_report(FolderReader(run / "in"), run / "out", opacity=0.5)
    (run / "out/masks/00002.png").unlink()
    with pytest.raises(UserError, match=r"File not found: .*00002\.png"):
        write_track_report(FolderReader(run / "in"), run / "out", opacity=0.5)
    assert [path.name for path in (run / "out").iterdir()] == ["masks"]
