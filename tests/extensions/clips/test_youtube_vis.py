"""YouTube-VIS is read back equal, its mistakes are named, and slots are trained and evaluated on it."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from command_line import SLOTS, call
from composed_data import load
from mistakes import assert_refused
from sklearn.metrics import adjusted_rand_score

from dinoseg.config.nodes import instantiate
from dinoseg.core.objects import RunLengths
from dinoseg.extensions.annotations.rle import to_text
from dinoseg.extensions.clips.youtube_vis import YoutubeVis
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png

SIZE = (32, 40)
SEGMENTS = ("annotations", 1, "segmentations")
VIDEOS = {"0043f083b5": 5, "00ad5016a4": 4, "0b97736357": 6}  # frames


def masks_of(video):
    """Return the masks (objects, frames, H, W) bool of a video; the second object is not visible in frame 1."""
    rng = np.random.default_rng(list(VIDEOS).index(video))
    masks = np.zeros((2, VIDEOS[video], *SIZE), bool)
    for number in range(2):
        for frame in range(VIDEOS[video]):
            top, left = rng.integers(0, 14, 2)
            masks[number, frame, top : top + 15, left : left + 18] = True
    masks[1, 1] = False
    return masks


def segmentations(masks, compressed):
    size = list(SIZE)
    texts = [RunLengths.of_mask(mask).to_counts(mask.size) for mask in masks]
    texts = [to_text(each) if compressed else each.tolist() for each in texts]
    return [{"size": size, "counts": text} if mask.any() else None for text, mask in zip(texts, masks, strict=True)]


def annotations():
    videos, objects = [], []
    for number, (name, frames) in enumerate(VIDEOS.items(), 7):
        names = [f"{name}/{5 * frame:05d}.jpg" for frame in range(frames)]
        sides = {"height": SIZE[0], "width": SIZE[1], "length": frames}
        videos.append({"id": number, "file_names": names, **sides})
        for index, masks in enumerate(masks_of(name)):
            ids = {"id": 10 * number + index, "video_id": number, "category_id": 3 + index, "iscrowd": 0}
            objects.append({**ids, "segmentations": segmentations(masks, compressed=index == 0)})
    crowd = {"id": 1, "video_id": 7, "iscrowd": 1, "segmentations": [None] * VIDEOS["0043f083b5"]}
    categories = [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}]
    return {"info": {}, "videos": videos, "annotations": [crowd, *objects], "categories": categories}


def write_annotations(root, given):
    (root / "train/instances.json").write_text(json.dumps(given))


def refused(root, split, *words, **options):
    assert_refused(lambda: YoutubeVis(str(root), **{"held_out": 1} | options).videos(split), *words)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "ytvis"
    for name, frames in VIDEOS.items():
        for frame in range(frames):
            pixels = np.random.default_rng([frame, frames]).integers(0, 100, (*SIZE, 3), np.uint8)
            pixels[masks_of(name)[:, frame].any(0)] += 120
            write_png(folder / f"train/JPEGImages/{name}/{5 * frame:05d}.jpg", pixels)
    write_annotations(folder, annotations())
    return folder


def expected_mask(video, frame):
    first, second = masks_of(video)[:, frame]
    return np.where(second, 2, np.where(first, 1, 0))


@pytest.mark.parametrize("place", ["train/instances.json", "train.json", "instances_train.json"])
def test_clips_are_read_back_equal(root, place):
    (root / "train/instances.json").rename(root / place)
    data = load("youtube_vis", root, "data.held_out=1")
    train, val = (instantiate(data.clips)(split=split) for split in ("train", "val"))
    assert [clip["name"] for clip in train] == list(VIDEOS)[:2] and [clip["name"] for clip in val] == list(VIDEOS)[2:]
    for clips in (train, val):
        for clip in clips:
            for frame, mask in enumerate(clip["masks"].numpy()):
                np.testing.assert_array_equal(mask, expected_mask(clip["name"], frame))
            assert clip["annotated"].all() and clip["frame_names"][:2] == ["00000", "00005"]
    pairs = instantiate(data.reader)(split="val")
    assert len(pairs) == 6
    np.testing.assert_array_equal(pairs[1]["mask"], expected_mask(list(VIDEOS)[2], 1) > 0)


def test_polygons_and_videos_without_objects(root):
    given = annotations()
    given["annotations"] = [given["annotations"][1]]
    given["annotations"][0]["segmentations"][0] = [[2, 3, 12, 3, 12, 9, 2, 9]]
    write_annotations(root, given)
    videos = [video for split in ("train", "val") for video in YoutubeVis(str(root), held_out=1).videos(split)]
    assert videos[0].mask(0).sum() == 60 and videos[0].mask(0)[3:9, 2:12].all()
    assert [len(video.masks) for video in videos] == [len(video.frames) for video in videos]
    assert not videos[1].mask(0).any() and videos[1].mask(0).shape == videos[0].mask(0).shape
    assert videos[0].fps == 6


def test_other_folders_are_taken_whole_and_test_has_no_masks(root):
    (root / "valid").mkdir()
    (root / "valid/instances.json").write_text(json.dumps(annotations() | {"annotations": None}))
    (root / "valid/JPEGImages").symlink_to(root / "train/JPEGImages")
    videos = YoutubeVis(str(root)).videos("test")
    assert [len(video.frames) for video in videos] == list(VIDEOS.values())
    assert not any(video.masks for video in videos)
    layout = YoutubeVis(str(root), splits={"val": "valid"})
    assert len(layout.videos("train")) == len(layout.videos("val")) == len(VIDEOS)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("videos",), 3, "videos"),
        (("videos", 0), 3, r"videos\[0\] has no whole number as id: 3"),
        (("videos", 0, "id"), "7", r"videos\[0\] has no whole number as id: '7'"),
        (("videos", 1, "id"), 7, r"videos\[1\] has the id 7 of another video"),
        (("videos", 0, "file_names"), [], r"videos\[0\] has no file_names"),
        (("videos", 0, "file_names", 0), "../secret/a.jpg", r"file name .*secret.*give <video>/<frame>.jpg"),
        (("videos", 0, "file_names", 0), "other/a.jpg", r"several folders"),
        (("videos", 0, "file_names", 0), "0043f083b5/\udc80.jpg", r"give <video>/<frame>.jpg"),
        (("videos", 0, "height"), 0, r"videos\[0\] \(id 7\): height 0 and width 40 are not an image size"),
        (("videos", 0, "width"), True, r"height 32 and width True are not an image size"),
        (("videos", 0, "file_names", 1), "0043f083b5/00000.png", r"two frames with one name"),
        (("annotations",), 0, "annotations is not a list"),
        *(
            (
                ("annotations", 1, "iscrowd"),
                flag,
                r"annotations\[1\] \(id 70\): its iscrowd is .*; it must be 0, 1, true",
            )
            for flag in ("0", None, 2)
        ),
        (("annotations", 1), 4, r"annotations\[1\] is not an object"),
        (("annotations", 1, "video_id"), 99, r"annotations\[1\] \(id 70\) belongs to video 99, which"),
        (("annotations", 1, "video_id"), "7", r"belongs to video '7', which is not in videos"),
        (SEGMENTS, [None], r"has 1 segmentation, its video 0043f083b5 5 frames: give one"),
        (SEGMENTS, "xxxxx", r"has the segmentations 'xxxxx': give a list .* each of the 5 fr"),
        ((*SEGMENTS, 2), "x", r"\(id 70\), frame 2 of video 0043f083b5: its segmentation is 'x'"),
        ((*SEGMENTS, 0, "size"), [40, 32], r"has the size \[40, 32\], its image \[32, 40\]"),
        (("annotations", 5, "segmentations", 3, "size"), [1, 2], r"annotations\[5\] \(id 90\), frame 3 of video 0b97"),
        ((*SEGMENTS, 0, "counts"), [5, 6], r"add up to 11 pixels; its mask has 1280"),
    ],
)
def test_damaged_annotations_are_named(root, where, value, message):
    given = annotations()
    holder = given
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    write_annotations(root, given)
    with pytest.raises(UserError, match=message) as caught:
        YoutubeVis(str(root), held_out=1).videos("train")
    assert str(root / "train/instances.json") in str(caught.value)


def test_missing_files_broken_json_and_too_many_held_out_videos(root):
    refused(root, "val", "lists 3 videos, and data.held_out=3 of them are val: none", held_out=3)
    (root / "train/JPEGImages/0043f083b5/00005.jpg").unlink()
    refused(root, "train", "0043f083b5 lacks 1 frame that ", " lists: 00005.jpg")
    (root / "train/JPEGImages/0043f083b5").rename(root / "elsewhere")
    refused(root, "train", "No folder ", "0043f083b5, which")
    path = root / "train/instances.json"
    path.write_text("{")
    refused(root, "train", "Cannot read ", "instances.json as annotations of YouTube-VIS")
    path.unlink()
    refused(root, "train", "No annotations in ", ": train/instances.json, train.json")


def test_frames_of_another_size_are_refused(root):
    video = YoutubeVis(str(root), held_out=1).videos("train")[0]
    square = replace(video, square=24)  # sizes are compared before
    write_png(video.frames[0], np.zeros((40, 32, 3), np.uint8))
    assert_refused(lambda: square.image(0), "00000.jpg is 32 x 40 (width x height), its mask ", "is 40 x 32")
    assert square.image(1).shape == (24, 24, 3)


def test_sizes_are_compared_when_a_training_starts(root, monkeypatch):
    """Of each video, the header of one frame is read, and no mask is decoded."""
    monkeypatch.setattr(
        "dinoseg.extensions.annotations.drawing.from_text", lambda *_: pytest.fail("a mask was decoded")
    )
    given = annotations()
    video = given["videos"][2]
    objects = [each for each in given["annotations"] if each["video_id"] == 9]
    video["height"], video["width"] = SIZE[::-1]
    for segmentation in itertools.chain.from_iterable(each["segmentations"] for each in objects):
        if segmentation is not None:
            segmentation["size"] = list(SIZE[::-1])
    write_annotations(root, given)
    layout = YoutubeVis(str(root), held_out=1)
    assert len(layout.videos("train")) == 2
    words = ("0b97736357/00000.jpg is 40 x 32 (width x height), its mask ", "instances.json", " is 32 x 40. Replace")
    refused(root, "val", *words)
    (root / "train/JPEGImages/0b97736357/00000.jpg").write_bytes(b"")
    refused(root, "val", "00000.jpg")
    write_annotations(root, given | {"annotations": None})
    assert len(layout.videos("val")) == 1  # without masks


def test_videos_without_objects_do_not_count_in_fg_ari(compose):
    protocols = compose("data=youtube_vis", "data.root=.", "trainer=slots").data.tracking.protocols
    assert [protocol.labelled_background for protocol in (protocols.none, protocols.first_frame)] == [False, False]
    assert instantiate(compose("data=movi", "data.root=.").data.tracking.protocols.none).labelled_background


@pytest.mark.heavy
def test_slots_are_trained_evaluated_and_checked(root):
    words = [word for word in SLOTS if not word.startswith("data=") and not word.startswith("data.root=")]
    words += ["data=youtube_vis", f"data.root={root}", "data.held_out=1", "data.batch_size=2", "trainer.score=fg_ari"]
    words += ["trainer.steps=2", "trainer.val_every=2", "mode.metrics_only=true", "data.clips.eval_square=24"]
    done = call(root, *words, "hydra.run.dir=run")
    assert done.status == 0, done.err
    done = call(root, "mode=eval", "resume=run", "hydra.run.dir=eval", "engine=cpu")
    assert done.status == 0, done.err
    scores = json.loads((root / "eval/scores.json").read_text())["scores"]
    video = list(VIDEOS)[2]
    rows = np.floor((np.arange(24) + 0.5) * 32 / 24).astype(int)
    true, found = [], []
    for frame in range(6):
        square = expected_mask(video, frame)[:, 4:36][rows][:, rows]
        np.testing.assert_array_equal(read_ids(root / f"eval/references/{video}/{5 * frame:05d}.png"), square)
        true.append(square.ravel())
        found.append(read_ids(root / f"eval/masks/{video}/{5 * frame:05d}.png").ravel())
    true, found = np.concatenate(true), np.concatenate(found)
    overlaps = [
        max(((true == one) & (found == other)).sum() / ((true == one) | (found == other)).sum() for other in set(found))
        for one in (1, 2)
    ]
    assert scores["mBO"] == pytest.approx(np.mean(overlaps), rel=1e-6)
    assert scores["FG-ARI"] == pytest.approx(adjusted_rand_score(true[true > 0], found[true > 0]), rel=1e-6)
    done = call(root, "mode=doctor", "data=youtube_vis", f"data.root={root}", "data.held_out=1", "hydra.run.dir=d")
    assert done.status == 0, done.err
