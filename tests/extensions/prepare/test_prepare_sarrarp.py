import errno
import zipfile
from pathlib import Path

import numpy as np
import pytest
from failing import fail_after
from held_locks import start_behind_lock
from making import save, write_video
from mistakes import assert_refused, refusals
from PIL import Image

from dinoseg.extensions.prepare import sarrarp
from dinoseg.extensions.prepare.sarrarp import prepare
from dinoseg.extensions.video.sarrarp import sar_rarp50
from dinoseg.utils.errors import UserError


@pytest.fixture
def add(tmp_path):
    """Write a video with masks as it is downloaded: zipped, or unpacked already."""
    root = tmp_path / "sar"

    def write(folder, video, frames=130, masks=None, zipped=True, top=""):
        place = tmp_path / "build" / folder / video if zipped else root / folder / video
        write_video(place / "video_left.avi", frames)
        for index in range(0, frames, 60) if masks is None else masks:
            save(place / "segmentation" / f"{index:09d}.png", np.full((32, 48), index // 60))
        (root / folder).mkdir(parents=True, exist_ok=True)
        if zipped:
            with zipfile.ZipFile(root / folder / f"{video}.zip", "w") as opened:
                for path in sorted(p for p in place.rglob("*") if p.is_file()):
                    opened.write(path, top + path.relative_to(place).as_posix())
        return root

    return write


def frames(root, video):
    return sorted(path.stem for path in (root / video / "rgb").glob("*.png"))


def test_archives_become_a_data_set(add):
    root = add("train1", "video_01", top="video_01/")
    add("train2", "video_02", zipped=False, frames=121)
    add("test", "video_41", frames=60)
    counts = prepare(root, workers=2)
    assert counts == {
        "test/video_41": {"rate": 1, "decoded": 60, "frames": 1, "masks": 1},
        "train1/video_01": {"rate": 1, "decoded": 130, "frames": 3, "masks": 3},
        "train2/video_02": {"rate": 1, "decoded": 121, "frames": 3, "masks": 3},
    }
    assert frames(root, "train1/video_01") == ["000000000", "000000060", "000000120"]
    for index in (0, 60, 120):  # the right frame, in the right colours
        pixels = np.asarray(Image.open(root / f"train1/video_01/rgb/{index:09d}.png"))
        assert pixels.shape == (32, 48, 3) and abs(float(pixels.mean()) - (index + 20)) < 4
    train, val, test = (sar_rarp50(root, s, classes=[f"c{i}" for i in range(10)]) for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (3, 3, 1) and int(train[2]["mask"][0, 0]) == 2
    assert (root / "train1/video_01.zip").exists() and not [p for p in root.rglob("*.part")]


def test_ten_a_second_then_one_a_second(add):
    root = add("train1", "video_01")
    assert prepare(root, rate=10, workers=1)["train1/video_01"]["frames"] == 22
    assert frames(root, "train1/video_01")[:3] == ["000000000", "000000006", "000000012"]
    assert prepare(root, rate=1, workers=1)["train1/video_01"]["rate"] == 10  # holds what 1 Hz needs
    root = add("train2", "video_02")
    prepare(root, rate=1, workers=1)
    assert prepare(root, rate=10, workers=1)["train2/video_02"]["frames"] == 22


def test_repeated_preparation_does_only_missing_work(add, monkeypatch):
    root = add("train1", "video_01")
    prepare(root, workers=1)
    seen = []
    decode = sarrarp.extract_frames
    monkeypatch.setattr(sarrarp, "extract_frames", lambda path, *a, **k: seen.append(path) or decode(path, *a, **k))
    add("train1", "video_02")
    prepare(root, workers=1)
    assert [path.parent.name for path in seen] == ["video_02"]
    (root / "train1/video_01/rgb/000000060.png").unlink()
    whole = (root / "train1/video_01/rgb/000000000.png").stat().st_mtime_ns
    prepare(root, workers=1)
    assert [path.parent.name for path in seen] == ["video_02", "video_01"]
    assert len(frames(root, "train1/video_01")) == 3
    assert (root / "train1/video_01/rgb/000000000.png").stat().st_mtime_ns == whole


def test_archives_can_go_once_verified(add):
    root = add("train1", "video_01")
    add("train1", "video_02", masks=[0])
    assert_refused(lambda: prepare(root, workers=1, keep_archives=False), "1 of 2")
    assert [path.name for path in (root / "train1").glob("*.zip")] == ["video_02.zip"]
    (root / "train1/video_02.zip").unlink()
    (root / "train1/video_01/video_left.avi").unlink()
    assert list(prepare(root, workers=1, videos=["video_01"])) == ["train1/video_01"]


def test_frames_of_another_tool_are_left_alone(add, tmp_path):
    root = add("train", "video_1", zipped=False)
    for index in (0, 60, 120):
        save(root / f"train/video_1/frames/{index:09d}.png", np.zeros((32, 48, 3)))
    assert prepare(root, workers=1)["train/video_1"] == {"rate": 1, "frames": 3, "masks": 3}
    assert not (root / "train/video_1/rgb").exists()
    (root / "train/video_1/video_left.avi").rename(tmp_path / "away.avi")
    assert prepare(root, workers=1)["train/video_1"]["frames"] == 3
    assert_refused(lambda: prepare(root, workers=1, rate=10), "1 frame per second; 10 need video_left.avi")
    (tmp_path / "away.avi").rename(root / "train/video_1/video_left.avi")
    (root / "train/video_1/frames/000000060.png").unlink()
    assert_refused(lambda: prepare(root, workers=1), "1 mask without frame: 000000060")
    assert prepare(root, workers=1, rate=10)["train/video_1"]["frames"] == 22  # into rgb/, from the video


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_truncated_video_fails_alone(add, workers):
    root = add("train1", "video_01", zipped=False, frames=400)
    add("train1", "video_02")
    add("train1", "video_03", zipped=False)
    path = root / "train1/video_01/video_left.avi"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (root / "train1/video_03/video_left.avi").write_bytes(b"no video")
    start = "2 of 3 videos could not be prepared, the others are ready:"
    message = assert_refused(lambda: prepare(root, workers=workers), start, "- train1/video_03: Cannot read")
    line = next(line for line in message.splitlines() if line.startswith("- train1/video_01"))
    assert message.startswith(start) and "is truncated: " in line and ", 400 promised" in line
    assert frames(root, "train1/video_02") == ["000000000", "000000060", "000000120"]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([0, 60], r"130 frames, so it needs 3 masks; segmentation/ has 2 \(missing: 000000120;"),
        ([0, 60, 120, 180], r"has 4 \(missing: none; without a frame: 000000180\)"),
        ([0, 6, 120], r"has 3 \(missing: 000000060; without a frame: 000000006\)"),
        ([], r"has no masks in segmentation/"),
    ],
)
def test_masks_are_counted(add, masks, message):
    root = add("train1", "video_01", masks=masks)
    with pytest.raises(UserError, match=message):
        prepare(root, workers=1)
    assert not (root / "train1/video_01/.prepared.json").exists()


def test_archive_without_video_is_refused(add):
    root = add("train1", "video_01")
    with zipfile.ZipFile(root / "train1/video_02.zip", "w") as opened:
        opened.writestr("segmentation/000000000.png", "")
        opened.writestr("readme.txt", "")
    (root / "train1/video_03.zip").write_bytes(b"cut off")
    holds = "video_02 has no video_left.avi; it holds readme.txt, segmentation"
    assert_refused(lambda: prepare(root, workers=1), holds, "- train1/video_03: ", "is damaged")
    assert len(frames(root, "train1/video_01")) == 3


def test_full_disk_stops_cleanly_and_the_next_run_resumes(add, monkeypatch):
    for number in (1, 2, 3):
        root = add("train1", f"video_{number:02d}")
    fail_after(monkeypatch, sarrarp, "write_png", 4, OSError(errno.ENOSPC, "No space left on device"))
    assert_refused(lambda: prepare(root, workers=1), "disk of ", " is full: 1 of 3 videos are ready, ", "run again")
    assert not (root / "train1/video_02/.prepared.json").exists()
    assert not (root / "train1/video_03").exists()
    monkeypatch.undo()
    assert len(prepare(root, workers=1)) == 3


def test_a_second_run_waits_for_the_first(add, caplog):
    root = add("train1", "video_01", frames=61)
    with start_behind_lock(root / ".prepare.lock", caplog, prepare, root, workers=1):
        assert not (root / "train1/video_01/rgb").exists()
    assert frames(root, "train1/video_01") == ["000000000", "000000060"]


def test_videos_can_be_selected(add):
    root = add("train1", "video_01", frames=10)
    add("test", "video_41", frames=10)
    assert list(prepare(root, workers=1, videos=["test/video_41"])) == ["test/video_41"]
    choices = "video_1 does not exist. Choose from test/video_41, train1/video_01"
    assert_refused(lambda: prepare(root, videos=["video_1"]), choices)
    (root / "train1/masks.zip").write_bytes(b"")
    assert_refused(lambda: prepare(root), "masks.zip is not named after a video: rename")


test_message_names_value_and_remedy = refusals(
    {
        "rate": (lambda: prepare(Path(), rate=5), "rate=5: choose 1"),
        "no folder": (lambda: prepare(Path("gone")), "Nothing to prepare under root=", "gone: no video_*.zip"),
    }
)
