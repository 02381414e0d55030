from dataclasses import replace

import numpy as np
import pytest
import torch
from making import save, write_video

from dinoseg.config.nodes import instantiate
from dinoseg.data.formats.sarrarp import BY_OPERATION, sar_rarp50
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.scan.scan import scan
from dinoseg.data.video import index as video_index
from dinoseg.data.video.access import VideoFrame
from dinoseg.tasks.preparation.sarrarp import prepare
from dinoseg.testing import check_dataset
from dinoseg.utils.errors import UserError

CLASSES = [f"c{i}" for i in range(10)]
LENGTHS = {"train1/video_01": 61, "train2/video_02_1": 130, "train2/video_02_2": 60, "test/video_41": 181}


@pytest.fixture
def root(tmp_path):
    """Write videos and masks as they come, nothing extracted."""
    for number, (place, frames) in enumerate(LENGTHS.items()):
        write_video(tmp_path / "sar" / place / "video_left.avi", frames)
        for index in range(0, frames, 60):
            save(tmp_path / "sar" / place / f"segmentation/{index:09d}.png", np.full((32, 48), number + index // 60))
    return tmp_path / "sar"


def load(root, split, source="video", **options):
    partition = replace(BY_OPERATION, **options)
    cache_dir = root.parent / "cache"
    return sar_rarp50(root, split, classes=CLASSES, partition=partition, source=source, cache_dir=cache_dir)


def test_video_frames_equal_the_extracted_ones(root):
    for place in LENGTHS:
        assert not (root / place / "rgb").exists()
    straight = {split: load(root, split) for split in ("train", "val", "test")}
    prepare(root, workers=1)
    for split, data in straight.items():
        extracted = load(root, split, "frames")
        assert data.names == extracted.names and len(data) > 0
        assert all(isinstance(pair.image, VideoFrame) for pair in data.pairs)
        for index in np.random.default_rng(1).permutation(len(data)):
            ours, theirs = data[int(index)], extracted[int(index)]
            assert ours["name"] == theirs["name"]
            assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["mask"], theirs["mask"])
        assert data.fingerprint() != extracted.fingerprint()
    assert straight["test"].names == [f"video_41/{index:09d}" for index in (0, 60, 120, 180)]
    assert [int(straight["test"][index]["image"].float().mean().round()) for index in range(4)] == pytest.approx(
        [20, 80, 140, 200], abs=4
    )


@pytest.mark.filterwarnings("ignore:.* use of fork:DeprecationWarning")
def test_frames_of_videos_keep_the_contract(root):
    check_dataset(load(root, "test"))


def test_fingerprint_knows_video_and_frame(root):
    data = load(root, "test")
    before = data.fingerprint()
    assert before == load(root, "test").fingerprint() != data.keep(data.names[:2]).fingerprint()
    other = replace(data.pairs[0], image=VideoFrame(data.pairs[0].image.path, 1))
    assert replace(data.pairs[0], name="other") != data.pairs[0]
    data.pairs[0] = other
    assert data.fingerprint() != before
    write_video(root / "test/video_41/video_left.avi", 181, size=(64, 32))
    assert load(root, "test").fingerprint() != before


def test_the_second_run_decodes_nothing_first(root, monkeypatch):
    load(root, "train")
    video_index._known.clear()
    monkeypatch.setattr(video_index, "_scan", None)
    assert load(root, "train")[0]["image"].shape == (3, 32, 48)


def test_video_frames_can_be_scanned_and_packed(root):
    data = load(root, "test")
    records = scan(data.pairs, data.reader, workers=1)
    assert [record.image_size for record in records] == [(32, 48)] * 4 and not any(r.problems for r in records)
    assert records[2].image == f"frame 120 of {root / 'test/video_41/video_left.avi'}"


def test_masks_and_video_must_match(root):
    masks = root / "train1/video_01/segmentation"
    (masks / "000000060.png").unlink()
    lame = {**load(root, "train").lacking, **load(root, "val").lacking}
    assert lame == {
        "video_01/000000060": f"frame 60 of {root / 'train1/video_01/video_left.avi'} has no mask in {masks}."
    }
    for index in (60, 61, 120):
        save(root / f"train1/video_01/segmentation/{index:09d}.png", np.zeros((32, 48)))
    lame = {**load(root, "train").lacking, **load(root, "val").lacking}
    assert list(lame) == ["video_01/000000061", "video_01/000000120"]
    assert "the video is shorter than its masks" in lame["video_01/000000120"]
    for index in (61, 120):
        (root / f"train1/video_01/segmentation/{index:09d}.png").unlink()
    save(root / "train1/video_01/segmentation/000000033.png", np.zeros((32, 48)))
    names = load(root, "train").names + load(root, "val").names
    assert "video_01/000000033" in names and len(names) == 7
    save(root / "train1/video_01/segmentation/mask.png", np.zeros((32, 48)))
    lame = {**load(root, "train").lacking, **load(root, "val").lacking}
    assert list(lame) == ["video_01/mask"] and "mask.png has no frame in video_left.avi" in lame["video_01/mask"]


def test_sizes_and_ids_name_the_frame(root):
    save(root / "test/video_41/segmentation/000000060.png", np.zeros((30, 48)))
    save(root / "test/video_41/segmentation/000000120.png", np.full((32, 48), 11))
    data = load(root, "test")
    with pytest.raises(UserError, match=r"frame 60 of .*video_left\.avi is 48 x 32 .* is 48 x 30"):
        data[1]
    with pytest.raises(UserError, match=r"000000120\.png holds the ids 11"):
        data[2]


def test_videos_that_are_missing_damaged_or_packed(root):
    video = root / "train2/video_02_2/video_left.avi"
    whole = video.read_bytes()
    video.write_bytes(whole[: (whole.index(b"movi") + len(whole)) // 2])
    (root / "train1/video_03.zip").write_bytes(b"")
    (root / "train1/._video_04.zip").write_bytes(b"")
    sides = [load(root, split, val_fraction=0.3) for split in ("train", "val")]
    lacking = {**sides[0].lacking, **sides[1].lacking}
    assert lacking.keys() == {"video_02_2", "video_03"} and "not unpacked" in lacking["video_03"]
    assert "video_02_2/video_left.avi is truncated" in lacking["video_02_2"]
    damaged = next(data for data in sides if "video_02_2" in data.lacking)
    assert "video_02_1/000000000" in damaged.names
    with pytest.raises(UserError, match=r"(?s)incomplete pairs:\n.*video_02_2: .*is truncated: .*source=frames"):
        prepare_dataset(damaged, split="train")
    cache_dir = root.parent / "cache"
    kept = prepare_dataset(damaged, split="train", on_error="skip", cache_dir=cache_dir, workers=1)
    assert kept.names == damaged.names and "is truncated" in kept.skipped["video_02_2"]
    video.unlink()
    sides = [load(root, split, val_fraction=0.3) for split in ("train", "val")]
    assert "has no video_left.avi, which data.source=video reads" in str([data.lacking for data in sides])
    for name in ("train1/video_01", "train2/video_02_1"):
        (root / name / "video_left.avi").write_text("no video")
    with pytest.raises(UserError, match=r"(?s)has no image with its mask:.*Cannot read .* as a video"):
        load(root, "train", val_fraction=0.3)


def test_config_selects_the_video_reader(compose, root):
    keys = ("data=sarrarp", f"data.root={root}", f"cache_dir={root.parent / 'kept'}", "data.fold=1", "data.folds=2")
    data = instantiate(compose(*keys, "data.source=video").data.reader)(split="train")
    assert isinstance(data.pairs[0].image, VideoFrame) and list((root.parent / "kept/videos").glob("*.npz"))
    with pytest.raises(UserError, match="has no extracted frames"):
        instantiate(compose(*keys).data.reader)(split="train")
