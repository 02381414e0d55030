import json
import os
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composed_data import load
from making import DATA, save, write_video
from mistakes import assert_refused, refusals
from PIL import Image

from dinoseg.config.nodes import instantiate
from dinoseg.data.checks.errors import check_groups, describe_split
from dinoseg.data.splits import Partition
from dinoseg.extensions.clips.cut import Clips, Cut, open_clips
from dinoseg.extensions.clips.davis import Davis
from dinoseg.extensions.clips.foreground import foreground
from dinoseg.extensions.clips.movi import Movi
from dinoseg.extensions.clips.video_folder import VideoFolder
from dinoseg.extensions.clips.videos import DecodedFrames, Video, select_split
from dinoseg.extensions.clips.view import ClipView, clip_batches
from dinoseg.extensions.clips.youtube_vos import YoutubeVos
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.utils.files import natural_order

SIDES = ("train", "val")
CLASSES = ["background", "object"]


def pixels(video, index, size=(6, 9)):
    return np.random.default_rng([ord(letter) for letter in video] + [index]).integers(0, 256, (*size, 3), np.uint8)


def ids(video, index, values, size=(6, 9)):
    return np.random.default_rng([len(video), index]).choice(np.array(values, np.uint8), size)


def save_palette(path, numbers):
    """Write indexed, with the colours of PASCAL VOC for the first ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(numbers)
    indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [7] * (252 * 3))
    indexed.save(path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def davis(tmp_path):
    """Write DAVIS 2017 with two sequences to train on, one to validate and one test sequence of one mask."""
    root = tmp_path / "DAVIS"
    sequences = {"bear": (7, [0, 1]), "dogs": (5, [0, 1, 2, 255]), "tennis": (6, [0, 2, 3]), "t": (4, [0, 1])}
    for name, (frames, values) in sequences.items():
        for index in range(frames):
            save(root / f"JPEGImages/480p/{name}/{index:05d}.jpg", pixels(name, index), quality=95)
            if name != "t" or index == 0:
                save_palette(root / f"Annotations/480p/{name}/{index:05d}.png", ids(name, index, values))
    for name, lines in (("train", "bear\ndogs\n"), ("val", "tennis"), ("test-dev", "t\n\n")):
        write_text(root / f"ImageSets/2017/{name}.txt", lines)
    return root


def config(name, root, *more):
    return load(name, root, f"cache_dir={root.parent / 'cache'}", *more)


def clips_of(name, root, split, *more):
    return instantiate(config(name, root, *more).clips)(split=split)


def reader_of(name, root, *more):
    return instantiate(config(name, root, *more).reader)


def names_of(layout, split):
    return [video.name for video in layout.videos(split)]


def refused(layout, split, *words):
    assert_refused(lambda: layout.videos(split), *words)


def appears(clip):
    """Return object id to frame of the clip."""
    assert clip["appears"].shape == (255,) and clip["appears"].dtype == torch.int64
    return {number: frame for number, frame in enumerate(clip["appears"].tolist()) if frame >= 0}


def test_davis_is_read_back_equal(davis):
    clips = clips_of("davis2017", davis, "train")
    assert [clip["name"] for clip in clips] == ["bear", "dogs"] and len(clips) == 2
    for clip, frames, values in zip(clips, (7, 5), ([0, 1], [0, 1, 2, 255]), strict=True):
        name = clip["name"]
        assert clip["frames"].shape == (frames, 3, 6, 9) and clip["frames"].dtype == torch.uint8
        assert clip["frame_names"] == [f"{index:05d}" for index in range(frames)] and clip["annotated"].all()
        assert (clip["start"], clip["stride"], clip["masks"].dtype) == (0, 1, torch.uint8)
        for index in range(frames):
            stored = np.asarray(Image.open(davis / f"JPEGImages/480p/{name}/{index:05d}.jpg"))
            np.testing.assert_array_equal(clip["frames"][index].permute(1, 2, 0), stored)
            np.testing.assert_array_equal(clip["masks"][index], ids(name, index, values))
    assert clips.videos[0].fps == 24 and appears(clips[1]) == {1: 0, 2: 0}
    assert appears(clips_of("davis2017", davis, "val")[0]) == {2: 0, 3: 0}
    (clip,) = clips_of("davis2017", davis, "test")  # whose first mask alone is there
    assert clip["annotated"].tolist() == [True, False, False, False]
    assert (clip["masks"][1:] == 255).all() and set(clip["masks"][0].unique().tolist()) <= {0, 1}


def test_davis_2016_of_both_releases(tmp_path):
    root = tmp_path / "DAVIS"
    for size in ("480p", "Full-Resolution", "1080p"):
        for index in range(3):
            save(root / f"JPEGImages/{size}/cows/{index:05d}.jpg", pixels("cows", index))
            mask = ids("cows", index, [0, 255])
            save(root / f"Annotations/{size}/cows/{index:05d}.png", mask if index else np.stack([mask] * 3, -1))
    write_text(root / "ImageSets/2016/val.txt", "cows\n")
    lines = [f"/JPEGImages/1080p/cows/{index:05d}.jpg /Annotations/1080p/cows/{index:05d}.png" for index in range(3)]
    write_text(root / "ImageSets/1080p/train.txt", "\n".join(lines))
    for split, size in (("val", "480p"), ("val", "Full-Resolution"), ("train", "1080p")):
        (clip,) = clips_of("davis2016", root, split, f"data.size={size}")
        for index in range(3):
            np.testing.assert_array_equal(clip["masks"][index], ids("cows", index, [0, 255]) // 255)
        data = reader_of("davis2016", root, f"data.size={size}")(split=split)
        np.testing.assert_array_equal(np.stack([data.mask(index) for index in range(3)]), clip["masks"])
        assert data.names == [f"cows/{index:05d}" for index in range(3)]


def test_davis_frames_form_a_foreground_dataset(davis):
    reader = reader_of("davis2017", davis, "data.ignore_index=9")
    data = reader(split="train")
    assert len(data) == 12 and data.names[7:9] == ["dogs/00000", "dogs/00001"] and data.classes == tuple(CLASSES)
    for index, sample in enumerate(data):
        name, number = data.names[index].split("/")
        numbers = ids(name, int(number), [0, 1] if name == "bear" else [0, 1, 2, 255]).astype(int)
        np.testing.assert_array_equal(sample["mask"], np.where(numbers == 255, 9, numbers > 0))
    assert reader(split="test").names == ["t/00000"]
    three = partial(foreground, Davis(str(davis)), "val", classes=["a", "b", "c"])
    assert_refused(three, "data.classes has 3 names: give two")


def test_a_share_of_the_sequences_is_held_out_whole(davis):
    keys = ("data.reader.partition.by=fraction", "data.reader.partition.val_fraction=0.5")
    cfg = config("davis2017", davis, *keys)
    sides = {}
    for split in SIDES:
        data = instantiate(cfg.reader)(split=split)
        clips = instantiate(cfg.clips)(split=split)
        sides[split] = {name.split("/")[0] for name in data.names}
        assert sides[split] == {video.name for video in clips.videos}
    assert sorted(map(len, sides.values())) == [1, 1] and sides["train"] | sides["val"] == {"bear", "dogs"}
    folds = [clips_of("davis2017", davis, "val", f"data.fold={fold}", "data.folds=3") for fold in range(3)]
    assert sorted(video.name for fold in folds for video in fold.videos) == ["bear", "dogs", "tennis"]
    by_lists = partial(select_split, Davis(str(davis)), "val", Partition(by="lists"))
    assert_refused(by_lists, "partition.by=lists: video datasets have their own lists")


def test_the_unsupervised_test_sets_may_have_no_masks(davis):
    """They are of the year 2019."""
    write_text(davis / "ImageSets/2019/test-dev.txt", "t\nbear\n")
    unsupervised = Davis(str(davis), year=2019, annotations="Annotations_unsupervised")
    for _ in range(2):  # without the folder of annotations, and with empty ones
        videos = unsupervised.videos("test-dev")
        found = [(video.name, len(video.frames), dict(video.masks)) for video in videos]
        assert found == [("t", 4, {}), ("bear", 7, {})]
        assert videos[0].frame_name(1) == "00001" and videos[0].image(1).shape == (6, 9, 3) and videos[0].fps == 24
        (davis / "Annotations_unsupervised/480p/t").mkdir(parents=True, exist_ok=True)
    supervised = Davis(str(davis), year=2019)
    assert [len(video.masks) for video in supervised.videos("test-dev")] == [1, 7]
    for path in (davis / "JPEGImages/480p/t").iterdir():
        path.unlink()
    refused(unsupervised, "test-dev", "480p/t holds no frame. Unpack DAVIS again")


def test_incomplete_davis_is_refused(davis):
    layout = Davis(str(davis))
    words = ("No image set ", "2016/val.txt; ", " has ImageSets/2017/test-dev.txt, ", ". Check data.year, and")
    refused(Davis(str(davis), year=2016), "val", *words)
    words = ("No folder ", "Full-Resolution; its parent folder holds 480p. Check data.root")
    refused(Davis(str(davis), size="Full-Resolution"), "train", *words)
    assert_refused(lambda: Davis(str(davis), year=2018).videos("train"), "data.year=2018")
    (davis / "ImageSets/2017/trainval.txt").write_text("bear\nlost\n")
    refused(layout, "trainval", "1 sequence of split trainval not in ", ": lost")
    (davis / "ImageSets/2017/none.txt").write_text("\n \n")
    refused(layout, "none", "none.txt is empty")
    for line in ("..", "../../other", "/etc", "a/b", "/JPEGImages/480p/../00000.jpg", "x/../../00000.jpg", "a\0b"):
        (davis / "ImageSets/2017/odd.txt").write_text(f"bear\n{line}\n")
        refused(layout, "odd", "odd.txt holds '", "', which names no sequence. Correct the line")
    (davis / "Annotations/480p/bear/00003.png").unlink()
    refused(layout, "train", "Video bear has 1 frame without mask: 00003")
    save(davis / "Annotations/480p/bear/00003.png", np.zeros((6, 9)))
    extra = save(davis / "Annotations/480p/bear/00009.png", np.zeros((6, 9)))
    refused(layout, "train", "1 mask without frame in ", "bear: 00009")
    extra.unlink()
    save(davis / "JPEGImages/480p/bear/00003.png", np.zeros((6, 9, 3)))
    refused(layout, "train", "00003.jpg and ", "00003.png are one frame")


@pytest.fixture
def youtube(tmp_path):
    """Write YouTube-VOS: in `b` object 4 appears late, and outside of train its first masks alone are there."""
    root = tmp_path / "yt"
    videos = {"a": (range(0, 20, 5), {1: [0, 5, 10, 15]}), "b": (range(10, 41, 5), {2: [10, 15], 4: [25, 30, 35]})}
    for split in ("train", "valid", "test"):
        meta = {}
        for video, (stems, objects) in videos.items():
            for stem in stems:
                save(root / split / f"JPEGImages/{video}/{stem:05d}.jpg", pixels(video, stem))
                if split == "train" or any(frames[0] == stem for frames in objects.values()):
                    present = [number for number, frames in objects.items() if frames[0] <= stem]
                    save_palette(root / split / f"Annotations/{video}/{stem:05d}.png", ids(video, stem, [0, *present]))
            for stem in range(stems[0], stems[-1] + 1):
                save(root / f"{split}_all_frames/JPEGImages/{video}/{stem:05d}.jpg", pixels(video, stem))
            meta[video] = {"objects": {n: {"frames": [f"{frame:05d}" for frame in objects[n]]} for n in objects}}
        (root / split / "meta.json").write_text(json.dumps({"videos": meta}))
    return root


def test_youtube_vos_is_read_back_equal(youtube):
    clips = clips_of("youtube_vos", youtube, "train")
    a, b = clips
    assert a["frame_names"] == ["00000", "00005", "00010", "00015"] and a["annotated"].all() and b["annotated"].all()
    for number, stem in enumerate(range(10, 41, 5)):
        np.testing.assert_array_equal(b["masks"][number], ids("b", stem, [0, 2, 4] if stem >= 25 else [0, 2]))
    assert clips.videos[0].fps == 6 and appears(b) == {2: 0, 4: 3}
    reader = reader_of("youtube_vos", youtube)
    assert len(reader(split="train")) == 4 + 7
    assert reader(split="val").names == ["a/00000", "b/00010"], "a later mask need not show the earlier objects"


def test_youtube_vos_objects_that_appear_late(youtube):
    clips = clips_of("youtube_vos", youtube, "val")
    assert clips[1]["annotated"].tolist() == [True, False, False, True, False, False, False]
    assert (clips[1]["masks"][[1, 2, 4, 5, 6]] == 255).all() and 4 in clips[1]["masks"][3]
    assert appears(clips[1]) == {2: 0, 4: 3}
    cut = ("data.clips.eval_cut.length=3", "data.clips.eval_cut.step=2")
    late = clips_of("youtube_vos", youtube, "val", *cut)
    assert [(clip["name"], clip["start"]) for clip in late] == [("a", 0), ("b", 0), ("b", 2), ("b", 4)]
    assert [appears(late[0]), appears(late[1]), appears(late[3])] == [{1: 0}, {2: 0}, {}] and appears(late[2])[4] == 1
    (youtube / "valid/meta.json").unlink()
    assert appears(clips_of("youtube_vos", youtube, "val")[1]) == {2: 0, 4: 3}


def test_youtube_vos_can_use_all_frames(youtube):
    clips = clips_of("youtube_vos", youtube, "train", "data.all_frames=true", "data.clips.cut.length=6")
    assert clips.videos[0].fps == 30 and len(clips.videos[1].frames) == 31
    assert [span.start for span in clips.spans] == [0, 6, 0, 6, 12, 18, 24]
    assert clips[0]["annotated"].tolist() == [True, False, False, False, False, True]
    whole = clips_of("youtube_vos", youtube, "train", "data.all_frames=true")
    assert appears(whole[1]) == {2: 0, 4: 15}
    assert clips_of("youtube_vos", youtube, "test", "data.all_frames=true").videos[1].masks.keys() == {0, 15}


def test_incomplete_youtube_vos_is_refused(youtube):
    layout = YoutubeVos(str(youtube))
    meta = youtube / "train/meta.json"
    refused(layout, "trial", "No folder ", "trial", " for split trial; ", " holds ", "train")
    known = json.loads(meta.read_text())["videos"]
    for content, *words in (
        ([], "videos is []; it must be an object"),
        ({"a": known["a"]}, "1 video of ", " not in ", "meta.json: b"),
        (known | {"b": {}}, "lacks the frames of the objects of video b"),
        (known | {"b": {"objects": {"1": {"frames": ["00099"]}}}}, "frames of video b which do not exist: 00099"),
    ):
        meta.write_text(json.dumps({"videos": content}))
        refused(layout, "train", *words)
    meta.write_text(json.dumps({"videos": known}))
    for path in (youtube / "train/Annotations/a").iterdir():
        path.unlink()
    refused(layout, "train", "Video a has no mask in")
    (youtube / "valid/Annotations/b/00025.png").unlink()
    refused(layout, "val", "appear in frames of video b without mask: 00025")


@pytest.fixture
def movi(tmp_path):
    root = tmp_path / "movi"
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        for video in range(count):
            place = root / split / f"{video:05d}"
            ending = "png" if video else "jpg"
            for index in range(8):
                save(place / f"frames/{index:03d}.{ending}", pixels(split, index))
                save(place / f"segmentations/{index:03d}.png", ids(split, index, [0, 1, 2, 10, 23]))
    return root


def test_movi_is_read_back_equal(movi):
    clips = clips_of("movi", movi, "val")
    assert len(clips) == 2 and clips.videos[0].fps == 12
    for index in range(8):
        np.testing.assert_array_equal(clips[1]["frames"][index].permute(1, 2, 0), pixels("validation", index))
        np.testing.assert_array_equal(clips[1]["masks"][index], ids("validation", index, [0, 1, 2, 10, 23]))
    assert appears(clips[0]) == dict.fromkeys((1, 2, 10, 23), 0)
    assert len(clips_of("movi", movi, "train", "data.clips.cut.length=2")) == 12
    assert len(reader_of("movi", movi)(split="test")) == 8


def test_movi_videos_are_numbered_within_each_split(movi):
    reader = reader_of("movi", movi)
    records = {split: [SimpleNamespace(name=name, image="") for name in reader(split=split).names] for split in SIDES}
    splits = [describe_split(split, reader(split=split), records[split]) for split in SIDES]
    assert splits[1].records[0] == splits[0].records[0]  # 00000 is in both, as two videos
    assert not list(check_groups(splits, "^[^/]+"))
    by_share = "data.reader.partition.by=fraction"
    for words, videos in (((by_share,), 3), (("data.fold=0", "data.folds=2"), 5)):
        reader = reader_of("movi", movi, *words)
        parts = {split: reader(split=split) for split in SIDES}
        assert not any(part.split_local_names for part in parts.values())
        found = {split: {name.partition("/")[0] for name in part.names} for split, part in parts.items()}
        assert not found["train"] & found["val"] and len(found["train"] | found["val"]) == videos
    assert found["train"] | found["val"] == {f"0000{n}-train" for n in range(3)} | {f"0000{n}-val" for n in range(2)}
    folds = clips_of("movi", movi, "val", "data.fold=0", "data.folds=2")
    assert {clip["name"] for clip in folds} == found["val"]


def test_movi_s_other_layout_is_the_same(movi):
    (movi / "train/00000").rename(movi / "train/rgb")  # a video may have any name
    other_root = movi.parent / "movi_c"
    for place in [*movi.glob("train/*"), *movi.glob("validation/*")]:
        for was, now in (("frames", "rgb"), ("segmentations", "seg")):
            shutil.copytree(place / was, other_root / place.parent.name / now / place.name)
    for split, names in (("train", ["00001", "00002", "rgb"]), ("val", ["00000", "00001"])):
        one, other = (clips_of("movi", root, split) for root in (movi, other_root))
        assert [clip["name"] for clip in other] == [clip["name"] for clip in one] == names
        for index in range(len(one)):
            assert torch.equal(one[index]["frames"], other[index]["frames"])
            assert torch.equal(one[index]["masks"], other[index]["masks"])
    shutil.rmtree(other_root / "validation/seg/00001")
    refused(Movi(str(other_root)), "val", "No folder ", "validation/seg/00001.")


def test_movi_may_call_its_validation_as_other_data_do(movi):
    names = names_of(Movi(str(movi)), "val")
    (movi / "validation").rename(movi / "val")
    assert names_of(Movi(str(movi)), "val") == names
    refused(Movi(str(movi), {"val": "validatoin"}), "val", "No folder ", "validatoin for split val")
    shutil.copytree(movi / "train", movi / "validation")
    assert names_of(Movi(str(movi)), "val") == names_of(Movi(str(movi)), "train")
    shutil.rmtree(movi / "validation")
    (movi / "val").rename(movi / "valid")
    refused(Movi(str(movi)), "val", "validation for split val; its parent folder holds test, train, valid")
    (movi / "train/00001/segmentations/007.png").unlink()
    refused(Movi(str(movi)), "train", "Video 00001 has 1 frame without mask: 007")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mine"
    write_video(root / "x/one.avi", 30)
    write_video(root / "two.avi", 9)
    for index in range(12):
        save(root / f"x/frames/img{index:03d}.png", pixels("f", index, (32, 48)))
    (root / "x/notes.txt").write_text("no video")
    (root / ".hidden").mkdir()
    write_video(root / ".hidden/three.avi", 2)
    return root


def test_videos_and_folders_of_frames_are_read(folder):
    keys = ("data.clips.cut.length=4", "data.clips.cut.stride=2")
    clips = clips_of("videos", folder, "train", *keys)
    assert [video.name for video in clips.videos] == ["two", "x/frames", "x/one"]
    assert [(place.video, place.start) for place in clips.spans] == [(0, 0), (1, 0), (2, 0), (2, 8), (2, 16)]
    clip = clips[3]
    assert clip["name"] == "x/one" and clip["frame_names"] == [f"{index:09d}" for index in (8, 10, 12, 14)]
    for number, index in enumerate((8, 10, 12, 14)):
        shown = VideoFrame(folder / "x/one.avi", index).read()
        np.testing.assert_array_equal(clip["frames"][number].permute(1, 2, 0), shown)
    assert not clip["annotated"].any() and (clip["masks"] == 255).all() and clip["masks"].shape == (4, 32, 48)
    assert clips[1]["frame_names"] == ["img000", "img002", "img004", "img006"]
    reader = reader_of("videos", folder)
    assert_refused(lambda: reader(split="train"), "data=videos has no masks")


def test_clips_are_cut_at_the_configured_frame_rate(folder):
    read = partial(clips_of, "videos", folder, "train")
    keys = ("data.clips.cut.fps=20", "data.clips.cut.length=3", "data.clips.cut.step=5")
    assert_refused(lambda: read(*keys), "frame rate of video x/frames is unknown. Set data.folder_fps=NUMBER")
    places = [(place.video, place.start, place.stride) for place in read(*keys, "data.folder_fps=20.4").spans[:6]]
    assert places == [(0, 0, 3), (1, 0, 1), (1, 5, 1), (2, 0, 3), (2, 5, 3), (2, 10, 3)]
    words = ("fps=25: video two has 60 ", " every n-th frame gives 60, 30, 20")
    assert_refused(lambda: read("data.clips.cut.fps=25"), *words)


def test_unreadable_and_missing_videos_are_refused(folder, tmp_path, caplog):
    (folder / "bad.mp4").write_text("no video")
    words = ("1 video of 4 cannot be read:\n- Cannot read ", "bad.mp4", "on_error=skip")
    assert_refused(lambda: clips_of("videos", folder, "train"), *words)
    clips = clips_of("videos", folder, "train", "data.on_error=skip")
    assert [video.name for video in clips.videos] == ["two", "x/frames", "x/one"]
    assert "1 of 4 videos are left out" in caplog.text and "bad.mp4" in caplog.text
    refused(VideoFolder(str(tmp_path), "gone"), "val", "No folder ", "gone for split val")
    (tmp_path / "empty/val").mkdir(parents=True)
    refused(VideoFolder(str(tmp_path / "empty"), "{split}"), "val", "empty/val holds no video")
    write_video(folder / "x/frames.avi", 2)
    layout = VideoFolder(str(folder), cache_dir=str(tmp_path / "cache"))
    refused(layout, "train", "have the same name (x/frames)")


class Still:
    """A layout of generated videos: name to number of frames."""

    def __init__(self, folder, **lengths):
        self.folder, self.lengths = folder, lengths

    def videos(self, split):
        found = []
        for name, count in self.lengths.items():
            frames = [save(self.folder / f"{name}/{n}.png", pixels(name, n)) for n in range(count)]
            masks = {n: save(self.folder / f"{name}_masks/{n}.png", ids(name, n, [0, 1])) for n in range(count)}
            found.append(Video(name, frames, masks=masks))
        return found


def test_a_frame_of_another_size_than_its_mask_file_is_refused(tmp_path):
    frame = save(tmp_path / "frame.png", np.zeros((9, 6, 3)))
    video = Video("v", [frame], masks={0: save(tmp_path / "mask.png", np.zeros((6, 9)))}, square=4)
    assert_refused(lambda: video.image(0), "frame.png is 6 x 9 ", " its mask ", "mask.png is 9 x 6")


NUMBERED = ("frame1", "frame2", "frame10", "frame11", "frame100")


def test_numbered_names_are_sorted_numerically(tmp_path):
    counted = ["", *"01 1 2b 10 a a/x a1 a1-2 a01b a1b a2/b10 a10/b2 a10/b10 b9 b10c".split()]
    assert sorted(reversed(counted), key=natural_order) == counted
    layout = Still(tmp_path, **{f"v{number}": 1 for number in range(1, 13)})
    names = [video.name for video in select_split(layout, "train", Partition(by="fraction", val_fraction=0.1))]
    assert len(names) == 11 and names == sorted(names, key=lambda name: int(name[1:]))


def test_unpadded_names_of_videos_and_frames(tmp_path):
    for video in ("v2", "v10"):
        for index, frame in enumerate(NUMBERED):
            save(tmp_path / f"youtube_vos/train/JPEGImages/{video}/{frame}.jpg", pixels(video, index))
            save(tmp_path / f"youtube_vos/train/Annotations/{video}/{frame}.png", ids(video, index, [0, 1]))
            save(tmp_path / f"videos/{video}/{frame}.png", pixels(video, index))
    entries = {"objects": {"1": {"frames": ["frame10", "frame2"]}}}
    (tmp_path / "youtube_vos/train/meta.json").write_text(json.dumps({"videos": {"v2": entries, "v10": entries}}))
    write_video(tmp_path / "videos/v9.avi", 3)
    for name, between in (("youtube_vos", []), ("videos", ["v9"])):
        clips = clips_of(name, tmp_path / name, "train", "data.clips.cut.length=null")
        assert [clip["name"] for clip in clips] == ["v2", *between, "v10"]
        assert clips[0]["frame_names"] == clips[-1]["frame_names"] == list(NUMBERED)
    masks = clips_of("youtube_vos", tmp_path / "youtube_vos", "train")[1]["masks"]
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, ids("v10", index, [0, 1]))


def test_hidden_folders_are_no_videos(movi, youtube):
    (movi / "train/.ipynb_checkpoints").mkdir()
    (youtube / "train/JPEGImages/.ipynb_checkpoints").mkdir()
    (youtube / "train/JPEGImages/.DS_Store").write_text("")
    assert names_of(Movi(str(movi)), "train") == ["00000", "00001", "00002"]
    assert names_of(YoutubeVos(str(youtube)), "train") == ["a", "b"]


def test_link_cycles_are_skipped_and_linked_videos_read(folder, tmp_path):
    (folder / "x/round").symlink_to(folder)
    (folder / "x/frames/again").symlink_to(folder / "x")
    save(tmp_path / "elsewhere/0.png", np.zeros((4, 4, 3)))
    (folder / "far").symlink_to(tmp_path / "elsewhere")
    layout = VideoFolder(str(folder), cache_dir=str(tmp_path / "cache"))
    assert names_of(layout, "train") == ["far", "two", "x/frames", "x/one"]


def test_same_image_set_for_train_and_val_is_refused(davis):
    (davis / "ImageSets/2017/train.txt").unlink()
    (davis / "ImageSets/2017/test-dev.txt").unlink()
    (davis / "ImageSets/2017/val.txt").write_text("bear\ndogs\ntennis")
    read = partial(clips_of, "davis2017", davis)
    message = assert_refused(lambda: read("train"), "data.sets.train=val data.reader.partition.by=fraction")
    remedy = [word.rstrip(".") for word in message.split() if word.startswith("data.")]
    reader = reader_of("davis2017", davis, *remedy)
    train, val = ({*reader(split=split).names} for split in SIDES)
    assert train and val and not train & val
    assert_refused(lambda: read("test"), "Set the image set of test, such as data.sets.test=val.")


@pytest.mark.parametrize(
    ("cut", "starts"),
    [
        (Cut(), [0]),
        (Cut(stride=3), [0]),
        (Cut(length=4), [0, 4]),
        (Cut(length=4, stride=3), [0]),
        (Cut(length=3, stride=2, step=1), [0, 1, 2, 3, 4, 5]),
        (Cut(length=1, step=4), [0, 4, 8]),
        (Cut(length=2, per_video=1), [4]),
        (Cut(length=2, per_video=3), [0, 4, 8]),
        (Cut(length=9, per_video=5), [0, 1]),
        (Cut(per_video=7), [0]),
    ],
)
def test_cuts_select_the_expected_frames(tmp_path, cut, starts):
    clips = open_clips(Still(tmp_path, v=10), "train", cut=cut)
    assert [span.start for span in clips.spans] == starts
    for clip in clips:
        length = cut.length or len(range(0, 10, cut.stride))
        indices = [clip["start"] + number * cut.stride for number in range(length)]
        assert clip["frame_names"] == [str(index) for index in indices]
        for number, index in enumerate(indices):
            np.testing.assert_array_equal(clip["frames"][number].permute(1, 2, 0), pixels("v", index))
            np.testing.assert_array_equal(clip["masks"][number], ids("v", index, [0, 1]))


def test_val_and_test_have_a_cut_and_squares_of_their_own(tmp_path):
    layout = Still(tmp_path, v=10)
    options = {"cut": Cut(length=3), "eval_cut": Cut(length=5)}
    assert [len(open_clips(layout, split, **options)) for split in ("train", "val", "test")] == [3, 2, 2]
    assert len(open_clips(layout, "val", cut=Cut(length=3))) == 3
    whole, square = (open_clips(layout, "val", cut=Cut(length=2), eval_square=side)[1] for side in (None, 6))
    np.testing.assert_array_equal(square["frames"], whole["frames"][..., 2:8])
    np.testing.assert_array_equal(square["masks"], whole["masks"][..., 2:8])
    assert open_clips(layout, "train", cut=Cut(length=2), eval_square=6)[0]["frames"].shape == (2, 3, 6, 9)


def test_short_videos_are_skipped_or_padded(tmp_path):
    layout = Still(tmp_path, short=5, long=9, tiny=1)
    words = ("Video short has 5 frames; 4 at stride 2 need 7. Set ", "short=pad or skip, or lower cut.length=4")
    assert_refused(lambda: open_clips(layout, "train", cut=Cut(length=4, stride=2)), *words)
    skipping = open_clips(layout, "train", cut=Cut(length=4, stride=2, short="skip"))
    assert [clip["name"] for clip in skipping] == ["long"] and skipping.skipped == ["short", "tiny"]
    assert_refused(lambda: open_clips(layout, "train", cut=Cut(length=40, short="skip")), "All 3 videos are too short")
    short, _, tiny = open_clips(layout, "train", cut=Cut(length=4, stride=2, short="pad"))
    assert short["frame_names"] == ["0", "2", "4", "4"] and short["annotated"].tolist() == [True, True, True, False]
    assert (short["masks"][3] == 255).all() and torch.equal(short["frames"][3], short["frames"][2])
    np.testing.assert_array_equal(short["masks"][2], ids("short", 4, [0, 1]))
    assert appears(tiny) == appears(short) == {1: 0}
    assert tiny["frame_names"] == ["0"] * 4 and tiny["annotated"].tolist() == [True, False, False, False]


def test_mismatched_files_are_refused(tmp_path):
    (video,) = Still(tmp_path, v=6).videos("train")
    clips = Clips([video], Cut(length=3))
    save(tmp_path / "v/1.png", pixels("v", 1, (6, 8)))
    words = ("video v differ in size: ", "0.png is 9 x 6 (width x height), ", "1.png is 8 x 6")
    assert_refused(lambda: clips[0], *words)
    for index, wrong, *words in (
        (3, np.zeros((5, 9)), "3.png is 9 x 6 ", " mask ", "3.png is 9 x 5"),
        (4, pixels("v", 4), "4.png is a colour image"),
    ):
        save(tmp_path / f"v_masks/{index}.png", wrong)
        assert_refused(lambda: clips[1], *words)
        save(tmp_path / f"v_masks/{index}.png", np.zeros((6, 9)))
    save(tmp_path / "v_masks/4.png", np.full((6, 9), 300), np.uint16)
    assert_refused(lambda: clips[1], "holds the object id 300")
    save(tmp_path / "v_masks/4.png", np.zeros((6, 9)))
    os.truncate(tmp_path / "v/5.png", 40)
    assert_refused(lambda: clips[1], "v/5.png")


def test_only_frames_of_the_requested_clip_are_read(tmp_path):
    clips = open_clips(Still(tmp_path, v=10), "train", cut=Cut(length=2))
    for index in (0, 1, 4, 5, 6, 7, 8, 9):
        (tmp_path / f"v/{index}.png").unlink()
    again = pickle.loads(pickle.dumps(clips))
    assert torch.equal(again[1]["frames"], clips[1]["frames"])
    clips = open_clips(Still(tmp_path, v=10), "train", cut=Cut(length=3, stride=2, step=1))
    shutil.rmtree(tmp_path / "v_masks")  # frames come without their masks
    frames, name = clips.frames(4)
    np.testing.assert_array_equal(frames, [pixels("v", index) for index in (4, 6, 8)])
    assert name == "v/4"


def test_frames_of_a_video_file_end(tmp_path):
    decoded = DecodedFrames(tmp_path / "a.avi", 5, None)
    assert len(decoded) == 5 and decoded[-1].index == 4 and [frame.index for frame in decoded] == [0, 1, 2, 3, 4]


@pytest.mark.data
def test_real_davis(compose):
    root = DATA / "davis2016"
    if not root.is_dir():
        pytest.skip(f"no real data in {root}: set DINOSEG_DATA")
    cut = ("data.clips.eval_cut.length=4", "data.clips.eval_cut.fps=12")
    cfg = compose("data=davis2016", f"data.root={root}", *cut).data
    clips = instantiate(cfg.clips)(split="val")
    data = instantiate(cfg.reader)(split="val")
    assert [len(video.frames) for video in clips.videos] == [50, 40, 104, 43] and len(data) == 237
    clip = clips[-1]
    assert clip["frames"].shape == (4, 3, 480, 854) and clip["stride"] == 2 and clip["annotated"].all()
    assert clip["masks"].unique().tolist() == [0, 1]
    index = data.names.index(f"{clip['name']}/{clip['frame_names'][2]}")
    assert torch.equal(data[index]["image"], clip["frames"][2]) and torch.equal(data[index]["mask"], clip["masks"][2])


def test_one_random_clip_per_video_and_epoch(tmp_path):
    layout = Still(tmp_path, v=14, w=9, x=3)
    clips = open_clips(layout, "train", cut=Cut(length=4, sample=True, short="skip"))
    assert len(clips) == 2 and clips.skipped == ["x"]
    batches = clip_batches(clips, ClipView((6, 9)), batch_size=2, seed=3)
    seen = [set(next(batches).names) for _ in range(60)]
    assert {names for batch in seen for names in batch} == {"v/0", "v/4", "v/8", "w/0", "w/4"}
    assert all({name[0] for name in batch} == {"v", "w"} for batch in seen)
    later = clip_batches(clips, ClipView((6, 9)), batch_size=2, seed=3, start=7)
    assert [set(next(later).names) for _ in range(5)] == seen[7:12]
    counts = [sum(f"v/{start}" in batch for batch in seen) for start in (0, 4, 8)]
    assert min(counts) > 8
    assert len(open_clips(layout, "val", cut=Cut(length=4, sample=True, short="skip"))) == 5


test_message_names_value_and_remedy = refusals(
    {
        "two rates": (lambda: Cut(fps=5, stride=2), "both set the frame rate"),
        "steps of whole videos": (lambda: Cut(step=4), "no effect with length=null"),
        "samples of whole videos": (lambda: Cut(sample=True), "sample=true has no effect with length=null"),
        "two numbers of clips": (lambda: Cut(length=2, per_video=2, step=1), "step=1 and per_video=2 both set"),
    }
)
