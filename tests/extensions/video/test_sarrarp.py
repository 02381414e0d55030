from dataclasses import replace

import numpy as np
import pytest
import torch
from composed_data import load as load_config
from making import save, write_video
from mistakes import assert_refused

from dinoseg.config.nodes import instantiate
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.scan.scan import scan
from dinoseg.data.splits import regex_group
from dinoseg.extensions.annotations.drawing import Drawing
from dinoseg.extensions.prepare.sarrarp import prepare
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.sarrarp import BY_OPERATION, sar_rarp50
from dinoseg.testing import check_dataset

CLASSES = [f"c{i}" for i in range(10)]


@pytest.fixture
def add(tmp_path):
    """Write a prepared video below a root whose own name holds `frames`."""
    root = tmp_path / "my frames"

    def write(folder, video, frames="rgb", masks=(0, 60), extra=(), value=1):
        place = root / folder / video
        for index in {*masks, *extra}:
            save(place / frames / f"{index:09d}.png", np.full((4, 6, 3), 50))
        for index in masks:
            save(place / "segmentation" / f"{index:09d}.png", np.full((4, 6), value))
        (place / "video_left.avi").write_bytes(b"kept as it came")
        (place / "action_discrete.txt").write_text("0,1\n")
        return root

    return write


def load(root, split, source="frames", **options):
    """Open a split, with videos' indices in a folder beside the root."""
    options = {"partition": replace(BY_OPERATION, **options), "cache_dir": root.parent / "cache"}
    return sar_rarp50(root, split, classes=CLASSES, source=source, **options)


def test_official_layout_takes_only_frames_with_masks(add):
    for number in range(1, 5):
        root = add("train1", f"video_{number:02d}", extra=(6, 12, 66))
    for number in range(5, 9):
        root = add("train2", f"video_{number:02d}")
    add("test", "video_41", masks=(0, 60, 120), value=9)
    train, val, test = (load(root, split) for split in ("train", "val", "test"))
    assert len(train) == 12 and len(val) == 4
    assert test.names == ["video_41/000000000", "video_41/000000060", "video_41/000000120"]
    check_dataset(test)
    assert test[1]["image"].shape == (3, 4, 6) and (test[1]["mask"] == 9).all()
    assert (test.mask(2) == 9).all() and test.classes == tuple(CLASSES) and len(test.palette) == 10
    assert len({data.fingerprint() for data in (train, val, test)}) == 3


def test_older_sarrarp_layout_is_read(add):
    for number in range(1, 4):
        root = add("train", f"video_{number}", frames="frames")
    add("test", "video_9", frames="frames")
    names = [f"video_{number}/{index:09d}" for number in (1, 2, 3) for index in (0, 60)]
    assert sorted(load(root, "train").names + load(root, "val").names) == names
    assert len(load(root, "test")) == 2


def test_parts_of_an_operation_stay_together(add):
    videos = {"video_11_1", "video_11_2", "video_15_1", "video_15_2", "video_2", "video_1"}
    for video in sorted(videos):
        root = add("train1", video)
    operation = regex_group(BY_OPERATION.group)
    assert operation("video_11_1/0") == operation("video_11/0") == "video_11" and operation("video_1/0") == "video_1"
    seen = set()
    for seed in range(12):
        train, val = ({n.split("/")[0] for n in load(root, split, seed=seed).names} for split in ("train", "val"))
        assert not {operation(f"{v}/0") for v in train} & {operation(f"{v}/0") for v in val} and train | val == videos
        seen.add(frozenset(val))
    assert len(seen) == 4
    assert load(root, "val", val_fraction=0.5).names != load(root, "val", val_fraction=0.25).names


def test_unprepared_data_names_the_command(add):
    root = add("train1", "video_01")
    (root / "train1/video_02").mkdir()
    for name in ("video_02/video_left.avi", "video_03.zip", "._video_01.zip", "._video_04.zip"):
        (root / "train1" / name).write_bytes(b"")  # macOS's companions of archives that were there begin with `._`
    words = ("Split train has no image with its mask:", "video_02 has no extracted frames", "video_03.zip is not ")
    words += ("unpacked", "mode=prepare data=sarrarp 'data.root=", "my frames'")
    assert_refused(lambda: load(root, "train", seed=0), *words)  # video_01 is val there
    data = load(root, "train", seed=1), load(root, "train", seed=3)
    assert [list(each.lacking) for each in data] == [["video_02"], ["video_03"]]
    assert all(each.names == ["video_01/000000000", "video_01/000000060"] for each in data)


def test_masks_and_frames_must_match(add):
    root = add("train1", "video_01", masks=(0, 60, 120), extra=(180, 186, 240))
    add("train1", "video_02")
    (root / "train1/video_01/rgb/000000060.png").unlink()
    data = [load(root, split) for split in ("train", "val")]
    names = sum((part.names for part in data), [])
    lacking = {**data[0].lacking, **data[1].lacking}
    assert sorted(names) == [f"video_0{video}/{index:09d}" for video, index in ((1, 0), (1, 120), (2, 0), (2, 60))]
    assert sorted(lacking) == [f"video_01/{index:09d}" for index in (60, 180, 240)]
    assert "rgb/000000180.png has no mask in" in lacking["video_01/000000180"]
    assert "segmentation/000000060.png has no extracted frame" in lacking["video_01/000000060"]
    lame = next(part for part in data if part.lacking)
    words = ("3 incomplete pairs:", "mode=prepare data=sarrarp ", "\nUnpack the archives")
    assert_refused(lambda: prepare_dataset(lame, split="train"), *words)


def test_missing_or_empty_folders_are_refused(add, tmp_path):
    assert_refused(lambda: load(tmp_path, "val"), "lacks the folders train1, train2, train")
    root = add("train1", "video_01")
    assert_refused(lambda: load(root, "test"), "lacks the folders test")
    assert_refused(lambda: load(root, "valid"), "splits train, val, test, not valid")
    assert_refused(lambda: load(root, "train"), "1 group(s)", "video_01", "two are needed")
    (root / "test").mkdir()
    assert_refused(lambda: load(root, "test"), "no folder video_* and no video_*.zip")
    add("train2", "video_01")
    assert_refused(lambda: load(root, "train"), "video_01 and", "video_01 are the same video")


LENGTHS = {"train1/video_01": 61, "train2/video_02_1": 130, "train2/video_02_2": 60, "test/video_41": 181}


@pytest.fixture
def videos(tmp_path):
    """Write videos and masks as they come, nothing extracted."""
    for number, (place, frames) in enumerate(LENGTHS.items()):
        write_video(tmp_path / "sar" / place / "video_left.avi", frames)
        for index in range(0, frames, 60):
            save(tmp_path / "sar" / place / f"segmentation/{index:09d}.png", np.full((32, 48), number + index // 60))
    return tmp_path / "sar"


def test_video_frames_equal_the_extracted_ones(videos):
    straight = {split: load(videos, split, "video") for split in ("train", "val", "test")}
    prepare(videos, workers=1)
    for split, data in straight.items():
        extracted = load(videos, split)
        assert data.names == extracted.names and len(data) > 0
        assert all(isinstance(pair.image, VideoFrame) for pair in data.pairs)
        for index in np.random.default_rng(1).permutation(len(data)):
            ours, theirs = data[int(index)], extracted[int(index)]
            assert ours["name"] == theirs["name"]
            assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["mask"], theirs["mask"])
        assert data.fingerprint() != extracted.fingerprint()
    assert straight["test"].names == [f"video_41/{index:09d}" for index in (0, 60, 120, 180)]
    levels = [float(straight["test"][index]["image"].float().mean()) for index in range(4)]
    assert levels == pytest.approx([20, 80, 140, 200], abs=4)


@pytest.mark.filterwarnings("ignore:.* use of fork:DeprecationWarning")
def test_frames_of_videos_are_checked_and_scanned(videos):
    data = load(videos, "test", "video")
    check_dataset(data)
    cache_dir = videos.parent / "scans"
    records = scan(data.pairs, data.reader, cache_dir=cache_dir)
    assert scan(data.pairs, data.reader, cache_dir=cache_dir) == records  # as stored
    assert [record.image_size for record in scan(data.pairs, data.reader, images=False)] == [None] * 4
    drawing = Drawing(videos / "a.json", "0", (32, 48), 1, ())  # as large as a frame that is not decoded
    (drawn,) = scan([replace(data.pairs[0], mask=drawing)], data.reader, images=False)
    assert drawn.image_size is None and drawn.pixels == {1: 32 * 48}
    assert [record.image_size for record in records] == [(32, 48)] * 4 and not any(r.problems for r in records)
    assert records[2].image == f"frame 120 of {videos / 'test/video_41/video_left.avi'}"
    save(videos / "test/video_41/segmentation/000000060.png", np.zeros((30, 48)))
    save(videos / "test/video_41/segmentation/000000120.png", np.full((32, 48), 11))
    assert_refused(lambda: data[1], "frame 60 of ", "video_left.avi is 48 x 32 ", " is 48 x 30")
    assert_refused(lambda: data[2], "000000120.png holds the ids 11")


def test_fingerprint_knows_video_and_frame(videos):
    data = load(videos, "test", "video")
    before = data.fingerprint()
    assert before == load(videos, "test", "video").fingerprint() != data.keep(data.names[:2]).fingerprint()
    assert replace(data.pairs[0], name="other") != data.pairs[0]
    data.pairs[0] = replace(data.pairs[0], image=VideoFrame(data.pairs[0].image.path, 1))
    assert data.fingerprint() != before
    write_video(videos / "test/video_41/video_left.avi", 181, size=(64, 32))
    assert load(videos, "test", "video").fingerprint() != before


def test_masks_and_video_must_match(videos):
    masks = videos / "train1/video_01/segmentation"

    def lacking():
        return {**load(videos, "train", "video").lacking, **load(videos, "val", "video").lacking}

    def write(*stems):
        for stem in stems:
            save(masks / f"{stem}.png", np.zeros((32, 48)))

    (masks / "000000060.png").unlink()
    reason = f"frame 60 of {videos / 'train1/video_01/video_left.avi'} has no mask in {masks}."
    assert lacking() == {"video_01/000000060": reason}
    write("000000060", "000000061", "000000120")
    assert list(lacking()) == ["video_01/000000061", "video_01/000000120"]
    assert "the video is shorter than its masks" in lacking()["video_01/000000120"]
    for stem in ("000000061", "000000120"):
        (masks / f"{stem}.png").unlink()
    write("000000033")
    names = load(videos, "train", "video").names + load(videos, "val", "video").names
    assert "video_01/000000033" in names and len(names) == 7
    write("mask")
    assert list(lacking()) == ["video_01/mask"]
    assert "mask.png has no frame in video_left.avi" in lacking()["video_01/mask"]


def test_videos_that_are_missing_damaged_or_packed(videos):
    def sides():
        return [load(videos, split, "video", val_fraction=0.3) for split in ("train", "val")]

    video = videos / "train2/video_02_2/video_left.avi"
    whole = video.read_bytes()
    video.write_bytes(whole[: (whole.index(b"movi") + len(whole)) // 2])
    (videos / "train1/video_03.zip").write_bytes(b"")
    (videos / "train1/._video_04.zip").write_bytes(b"")
    lacking = {name: reason for data in sides() for name, reason in data.lacking.items()}
    assert lacking.keys() == {"video_02_2", "video_03"} and "not unpacked" in lacking["video_03"]
    assert "video_02_2/video_left.avi is truncated" in lacking["video_02_2"]
    damaged = next(data for data in sides() if "video_02_2" in data.lacking)
    assert "video_02_1/000000000" in damaged.names
    words = ("incomplete pairs:\n", "video_02_2: ", "is truncated: ", "source=frames")
    assert_refused(lambda: prepare_dataset(damaged, split="train"), *words)
    cache_dir = videos.parent / "cache"
    kept = prepare_dataset(damaged, split="train", on_error="skip", cache_dir=cache_dir, workers=1)
    assert kept.names == damaged.names and "is truncated" in kept.skipped["video_02_2"]
    video.unlink()
    assert "has no video_left.avi, which data.source=video reads" in str([data.lacking for data in sides()])


def test_config_selects_the_video_reader(videos):
    keys = ("sarrarp", videos, f"cache_dir={videos.parent / 'kept'}", "data.fold=1", "data.folds=2")
    data = instantiate(load_config(*keys, "data.source=video").reader)(split="train")
    assert isinstance(data.pairs[0].image, VideoFrame) and list((videos.parent / "kept/videos").glob("*.npz"))
    reader = instantiate(load_config(*keys).reader)
    assert_refused(lambda: reader(split="train"), "has no extracted frames")
