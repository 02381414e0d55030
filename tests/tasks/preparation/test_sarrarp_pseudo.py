import binascii
import json
from dataclasses import replace

import numpy as np
import pytest
from making import save, write_video

from dinoseg.data.formats.sarrarp import BY_OPERATION, sar_rarp50
from dinoseg.data.formats.sarrarp_files import frames_sum, gaps, mask_sums
from dinoseg.data.opened import opened
from dinoseg.tasks.preparation.sarrarp import prepare
from dinoseg.utils.errors import UserError

CLASSES = [f"c{i}" for i in range(10)]
VIDEOS = ("video_01", "video_02_1", "video_02_2", "video_03", "video_04")


def write_note(video):
    """Say which masks the pseudo-labels are made of: those there are."""
    (video / "pseudo").mkdir(exist_ok=True)
    sums = {path.stem: binascii.crc32(path.read_bytes()) for path in (video / "segmentation").iterdir()}
    noted = {"what": "", "made_by": {"masks": sums}, "kept": {}, "left_out": {}}
    (video / "pseudo/pseudo.json").write_text(json.dumps(noted))


@pytest.fixture
def add(tmp_path):
    """Write a video that is extracted at 10 Hz, with some pseudo-labels."""

    def write(video, masks=(0, 60, 120), pseudo=(6, 66), folder="train1", frames=126, note=True):
        place = tmp_path / folder / video
        for index in range(0, frames, 6):
            save(place / f"rgb/{index:09d}.png", np.full((4, 6, 3), index))
        for index in masks:
            save(place / f"segmentation/{index:09d}.png", np.ones((4, 6)))
        for index in pseudo:
            save(place / f"pseudo/{index:09d}.png", [[255, 2, 3, 4, 5, 6]] * 4)
        if note:
            write_note(place)
        return tmp_path

    return write


def load(root, split, pseudo=True, source="frames", **options):
    partition = replace(BY_OPERATION, **options)
    return sar_rarp50(
        root, split, classes=CLASSES, partition=partition, pseudo=pseudo, source=source, cache_dir=root / "cache"
    )


def test_only_training_takes_them_and_only_of_its_own_operations(add):
    for video in VIDEOS:
        root = add(video)
    add("video_41", folder="test")
    sides = set()
    for options in (*({"seed": seed} for seed in range(6)), *({"fold": fold, "folds": 4} for fold in range(4))):
        plain, with_pseudo = ({s: load(root, s, p, **options) for s in ("train", "val", "test")} for p in (False, True))
        assert all(with_pseudo[split].names == plain[split].names for split in ("val", "test"))
        more = with_pseudo["train"].names[len(plain["train"]) :]
        assert with_pseudo["train"].names[: len(plain["train"])] == plain["train"].names
        videos = {name.split("/")[0] for name in plain["train"].names}
        assert more == [f"{video}/pseudo/{index:09d}" for video in sorted(videos) for index in (6, 66)]
        assert all(pair.mask.parent.name == "pseudo" for pair in with_pseudo["train"].pairs[-len(more) :])
        sides.add(frozenset(videos))
        assert ("video_02_1" in videos) == ("video_02_2" in videos)
    assert len(sides) == 4
    sample = load(root, "train")[-1]
    assert sample["mask"].tolist() == [[255, 2, 3, 4, 5, 6]] * 4 and int(sample["image"].max()) == 66


def test_a_video_that_is_partly_held_out_gives_none(add):
    """Where single frames are divided, those between them would tell of the held out ones."""
    for video in VIDEOS[:2]:
        root = add(video, masks=range(0, 126, 60), pseudo=(6, 12, 18))
    names = load(root, "train", group="^(.*)$", val_fraction=0.2).names
    val = load(root, "val", group="^(.*)$", val_fraction=0.2).names
    assert len(val) == 1 and len(names) == 5 + 3
    assert not any(name.startswith(f"{val[0].split('/')[0]}/pseudo") for name in names)


def test_videos_without_are_named(add):
    root = add("video_01")
    add("video_02_1", pseudo=(), note=False)
    add("video_03", pseudo=(6, 7))  # 7 was never extracted
    add("video_04", pseudo=())  # in none did both ways agree
    data = load(root, "train", seed=next(s for s in range(20) if load(root, "val", seed=s).names[0][:8] == "video_01"))
    assert dict(data.lacking) == {
        "video_02_1/pseudo": f"{root}/train1/video_02_1 has no pseudo-labels.",
        "video_03/pseudo/000000007": f"{root}/train1/video_03/pseudo/000000007.png has no frame.",
    }
    with pytest.raises(UserError, match=r"(?s)mode=prepare data=sarrarp data.root=.* data.prepare.propagate=true\. Or"):
        opened(data, split="train")
    assert [name for name in data.names if "pseudo" in name] == ["video_03/pseudo/000000006"]


def test_labels_of_masks_that_are_no_longer_there_are_refused(add):
    for video in VIDEOS[:1] + VIDEOS[3:]:
        root = add(video)
    seed = next(s for s in range(20) if load(root, "val", seed=s).names[0][:8] == "video_01")
    ours, note = root / "train1/video_03", root / "train1/video_03/pseudo/pseudo.json"
    good, whole = note.read_text(), (ours / "segmentation/000000060.png").read_bytes()
    assert not load(root, "train", seed=seed).lacking
    save(ours / "segmentation/000000060.png", np.full((4, 6), 2))
    data = load(root, "train", seed=seed)
    reason = f"{ours}/pseudo was made from other masks than the current ones: 000000060."
    assert dict(data.lacking) == {"video_03/pseudo": reason}
    assert "video_03/000000060" in data.names and not [name for name in data.names if "video_03/pseudo" in name]
    with pytest.raises(
        UserError,
        match=r"(?s)from other masks.*mode=prepare .* data.prepare.propagate=true\. Or "
        "remove",
    ):
        opened(data, split="train")
    assert not load(root, "train", pseudo=False, seed=seed).lacking
    (ours / "segmentation/000000060.png").write_bytes(whole)
    save(ours / "segmentation/000000180.png", np.ones((4, 6)))
    assert "than the current ones: 000000180." in load(root, "train", seed=seed).lacking["video_03/pseudo"]
    (ours / "segmentation/000000180.png").unlink()
    for bad in ("{}", "[]", '{"made_by": {"masks": 3}}', "{", '{"made_by": []}'):
        note.write_text(bad)
        told = load(root, "train", seed=seed).lacking["video_03/pseudo"]
        assert told.startswith(f"{note} does not record which masks the pseudo-labels were made from (")
    note.write_text(good)
    assert not load(root, "train", seed=seed).lacking


def test_sums_change_with_what_labels_depend_on(add):
    video = add("video_01") / "train1/video_01"
    masks, frames = mask_sums(video), frames_sum(video)
    assert masks.keys() == {"000000000", "000000060", "000000120"} and (masks, frames) == (mask_sums(video), frames)
    save(video / "segmentation/000000060.png", np.full((4, 6), 2))
    now = mask_sums(video)
    assert {stem for stem in masks if masks[stem] != now[stem]} == {"000000060"} and frames_sum(video) == frames
    frame = video / "rgb/000000066.png"
    whole = frame.read_bytes()
    save(frame, np.random.default_rng(0).integers(0, 256, (4, 6, 3)))
    assert frames_sum(video) != frames
    frame.write_bytes(whole)
    assert frames_sum(video) == frames
    frame.rename(video / "rgb/000000067.png")
    assert frames_sum(video) != frames


def test_straight_from_the_video(tmp_path):
    for number in (1, 2):
        place = tmp_path / f"train1/video_0{number}"
        write_video(place / "video_left.avi", 61)
        for index in (0, 60):
            save(place / f"segmentation/{index:09d}.png", np.zeros((32, 48)))
    prepare(tmp_path, workers=1, propagate=True)
    for number in (1, 2):
        save(tmp_path / f"train1/video_0{number}/pseudo/{24:09d}.png", np.full((32, 48), 255))
        write_note(tmp_path / f"train1/video_0{number}")
    straight, extracted = load(tmp_path, "train", source="video"), load(tmp_path, "train")
    assert straight.names == extracted.names and straight.names[-1].endswith("pseudo/000000024")
    assert all((straight[index]["image"] == extracted[index]["image"]).all() for index in range(3))
    assert len(load(tmp_path, "train", pseudo=False, source="video")) == 2


def test_what_is_to_be_propagated_is_extracted_ten_times_a_second(tmp_path):
    for place in ("train1/video_01", "train2/video_02", "train/video_03", "test/video_41"):
        write_video(tmp_path / place / "video_left.avi", 61)
        for index in (0, 60):
            save(tmp_path / place / f"segmentation/{index:09d}.png", np.zeros((32, 48)))
    prepare(tmp_path, workers=1)
    rates = {name: counts["rate"] for name, counts in prepare(tmp_path, workers=1, propagate=True).items()}
    assert rates == {"train1/video_01": 10, "train2/video_02": 10, "train/video_03": 10, "test/video_41": 1}
    for share in (-0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match=f"data.prepare.min_agreement={share}: give a share"):
            prepare(tmp_path, workers=1, min_agreement=share)


def test_gaps_lie_between_masks_a_second_apart(add):
    root = add("video_01", masks=(0, 60, 120, 240), frames=246)
    found = [[int(path.stem) for path in gap] for gap in gaps(root / "train1/video_01")]
    assert found == [list(range(0, 61, 6)), list(range(60, 121, 6))]
    (root / "train1/video_01/rgb/000000060.png").unlink()
    assert gaps(root / "train1/video_01") == []
    assert gaps(root / "nowhere") == []
    save(root / "train1/video_05/frames/note.png", np.zeros((2, 2)))  # another tool's, at 1 Hz
    for index in (0, 60):
        save(root / f"train1/video_05/frames/{index:09d}.png", np.zeros((2, 2)))
        save(root / f"train1/video_05/segmentation/{index:09d}.png", np.zeros((2, 2)))
    assert gaps(root / "train1/video_05") == []
