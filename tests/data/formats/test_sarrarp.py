from dataclasses import replace

import numpy as np
import pytest
from making import save

from dinoseg.data.formats.sarrarp import BY_OPERATION, sar_rarp50
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.splits import regex_group
from dinoseg.testing import check_dataset
from dinoseg.utils.errors import UserError

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


def load(root, split, **options):
    return sar_rarp50(root, split, classes=CLASSES, partition=replace(BY_OPERATION, **options))


def operation(video):
    return regex_group(BY_OPERATION.group)(f"{video}/000000000")


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
    assert sorted(load(root, "train").names + load(root, "val").names) == [
        f"video_{number}/{index:09d}" for number in (1, 2, 3) for index in (0, 60)
    ]
    assert len(load(root, "test")) == 2


def test_parts_of_an_operation_stay_together(add):
    for video in ("video_11_1", "video_11_2", "video_15_1", "video_15_2", "video_2", "video_1"):
        root = add("train1", video)
    seen = set()
    for seed in range(12):
        sides = [{n.split("/")[0] for n in load(root, s, seed=seed).names} for s in ("train", "val")]
        assert not {operation(v) for v in sides[0]} & {operation(v) for v in sides[1]}
        assert sides[0] | sides[1] == {
            "video_11_1",
            "video_11_2",
            "video_15_1",
            "video_15_2",
            "video_2",
            "video_1",
        }
        seen.add(frozenset(sides[1]))
    assert len(seen) == 4
    assert load(root, "val", val_fraction=0.5).names != load(root, "val", val_fraction=0.25).names


def test_operation_names():
    assert [operation(v) for v in ("video_11_1", "video_11", "video_1")] == ["video_11", "video_11", "video_1"]


def test_unprepared_data_names_the_command(add, tmp_path):
    root = add("train1", "video_01")
    (root / "train1/video_02").mkdir()
    (root / "train1/video_02/video_left.avi").write_bytes(b"")
    (root / "train1/video_03.zip").write_bytes(b"")
    (root / "train1/._video_01.zip").write_bytes(b"")  # macOS's companion of an archive that was there
    (root / "train1/._video_04.zip").write_bytes(b"")
    told = r"(?s:.*)video_02 has no extracted frames(?s:.*)video_03.zip is not unpacked(?s:.*)mode=prepare data=sarrarp"
    with pytest.raises(UserError, match="Split train has no image with its mask:" + told + " 'data.root=.*my frames'"):
        load(root, "train", seed=0)  # video_01 is val there
    data = load(root, "train", seed=1), load(root, "train", seed=3)
    assert [list(each.lacking) for each in data] == [["video_02"], ["video_03"]]
    assert all(each.names == ["video_01/000000000", "video_01/000000060"] for each in data)
    with pytest.raises(
        UserError, match=r"(?s)video_02: .*no extracted frames.*Prepare the data set first.*on_error=skip"
    ):
        prepare_dataset(data[0], split="train")


def test_masks_and_frames_must_match(add):
    root = add("train1", "video_01", masks=(0, 60, 120), extra=(180, 186, 240))
    add("train1", "video_02")
    (root / "train1/video_01/rgb/000000060.png").unlink()
    data = [load(root, split) for split in ("train", "val")]
    names, lacking = sum((part.names for part in data), []), {**data[0].lacking, **data[1].lacking}
    assert sorted(names) == [f"video_0{video}/{index:09d}" for video, index in ((1, 0), (1, 120), (2, 0), (2, 60))]
    assert sorted(lacking) == [f"video_01/{index:09d}" for index in (60, 180, 240)]
    assert "rgb/000000180.png has no mask in" in lacking["video_01/000000180"]
    assert "segmentation/000000060.png has no extracted frame" in lacking["video_01/000000060"]
    lame = next(part for part in data if part.lacking)
    with pytest.raises(UserError, match=r"3 incomplete pairs:(?s:.*)mode=prepare data=sarrarp .*\nUnpack the archives"):
        prepare_dataset(lame, split="train")


def test_missing_or_empty_folders_are_refused(add, tmp_path):
    with pytest.raises(UserError, match="lacks the folders train1, train2, train"):
        load(tmp_path, "val")
    root = add("train1", "video_01")
    with pytest.raises(UserError, match="lacks the folders test"):
        load(root, "test")
    with pytest.raises(UserError, match="splits train, val, test, not valid"):
        load(root, "valid")
    with pytest.raises(UserError, match=r"1 group\(s\).*video_01.*two are needed"):
        load(root, "train")
    (root / "test").mkdir()
    with pytest.raises(UserError, match=r"no folder video_\* and no video_\*\.zip"):
        load(root, "test")
    add("train2", "video_01")
    with pytest.raises(UserError, match="video_01 and .*video_01 are the same video"):
        load(root, "train")


def test_pixels_are_checked_when_read(add):
    root = add("test", "video_41", masks=(0, 60, 120))
    save(root / "test/video_41/segmentation/000000000.png", np.full((4, 6), 10))
    save(root / "test/video_41/segmentation/000000060.png", np.zeros((2, 3)))
    path = root / "test/video_41/rgb/000000120.png"
    path.write_bytes(path.read_bytes()[:40])
    data = load(root, "test")
    with pytest.raises(UserError, match=r"000000000\.png holds the ids 10,"):
        data[0]
    with pytest.raises(UserError, match="is 6 x 4 .* is 3 x 2"):
        data[1]
    with pytest.raises(UserError, match=r"rgb/000000120\.png"):
        data[2]
