import numpy as np
import pytest
from making import save, write_video

from dinoseg.data.annotation.cvat import read_cvat
from dinoseg.data.formats.annotated import Shapes, annotated_dataset
from dinoseg.data.formats.annotation_files import AnnotationLayout
from dinoseg.data.splits import Partition
from dinoseg.data.video.access import VideoFrame
from dinoseg.utils.errors import UserError

SIZE = (32, 48)


def box(frame, left, right, keyframe=1, outside=0, more=""):
    return (
        f'<box frame="{frame}" keyframe="{keyframe}" outside="{outside}" occluded="0" xtl="{left}" ytl="4" '
        f'xbr="{right}" ybr="8" z_order="0" {more}/>'
    )


def task(start=0, stop=5, more="", size=SIZE, number=1):
    sides = f"<original_size><width>{size[1]}</width><height>{size[0]}</height></original_size>" if size else ""
    return (
        f"<task><id>{number}</id><mode>interpolation</mode><start_frame>{start}</start_frame>"
        f"<stop_frame>{stop}</stop_frame>{sides}{more}"
        "<labels><label><name>leaf</name></label><label><name>stem</name></label></labels></task>"
    )


def track(*shapes, label="leaf", more=""):
    return f'<track id="0" label="{label}" source="manual" {more}>{"".join(shapes)}</track>'


def write(path, *tracks, meta=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = task() if meta is None else meta
    path.write_text(f"<annotations><version>1.1</version><meta>{meta}</meta>{''.join(tracks)}</annotations>")
    return path.parent


def opened(root, split="train", images=None, partition=None, **shapes):
    return annotated_dataset(
        root, split, kind="cvat", classes=["background", "leaf", "stem"], layout=AnnotationLayout(images=images),
        shapes=Shapes(**shapes), cache_dir=root / "cache", partition=partition or Partition(),
    )  # fmt: skip


def frames(folder, count=6, name="frame_{:06d}.PNG", size=SIZE):
    for number in range(count):
        save(folder / name.format(number), np.full((*size, 3), number))


def lefts(data):
    """Return first column and width of what is seen on each frame; None: nothing."""
    seen = [np.flatnonzero(data.mask(index).any(axis=0)) for index in range(len(data))]
    return [(int(columns[0]), len(columns)) if columns.size else None for columns in seen]


def test_between_keyframes_a_box_moves_and_after_the_last_it_stays(tmp_path):
    frames(tmp_path / "images")
    root = write(tmp_path / "train.xml", track(box(1, 4, 8), box(3, 8, 16)))
    data = opened(root)
    assert data.names == [f"frame_{number:06d}" for number in range(6)] and data[2]["image"].unique().tolist() == [2]
    assert lefts(data) == [None, (4, 4), (6, 6), (8, 8), (8, 8), (8, 8)]
    assert len({pair.mask.digest() for pair in data.pairs}) == 4


def test_a_frame_that_is_missing_is_told(tmp_path):
    frames(tmp_path, 5)
    data = opened(write(tmp_path / "train.xml", track(box(1, 4, 8))))
    assert len(data) == 5 and "has frame 5, but" in data.lacking["frame_000005"]


def test_what_is_outside_is_not_seen_and_what_the_file_says_of_a_frame_stands(tmp_path):
    frames(tmp_path / "images")
    keys = box(5, 30, 40), box(0, 4, 8), box(1, 20, 22, keyframe=0), box(3, 8, 16, outside=1)  # in any order
    assert lefts(opened(write(tmp_path / "train.xml", track(*keys)))) == [(4, 4), (20, 2), (7, 6), None, None, (30, 10)]


def test_tracks_lie_above_each_other_by_their_depth(tmp_path):
    frames(tmp_path)
    above = box(0, 4, 8).replace('z_order="0"', 'z_order="1"')
    root = write(tmp_path / "train.xml", track(above, label="stem"), track(box(0, 4, 12)))
    assert np.unique(opened(root).mask(0)[5]).tolist() == [0, 1, 2]


def test_masks_are_seen_on_their_own_frame_alone(tmp_path):
    frames(tmp_path)
    mask = '<mask frame="{}" keyframe="1" outside="{}" rle="0, 4" left="3" top="2" width="2" height="2"/>'
    root = write(tmp_path / "train.xml", track(mask.format(1, 0), mask.format(2, 1)), track(mask.format(4, 0)))
    assert lefts(opened(root)) == [None, (3, 2), None, None, (3, 2), None]


def test_frames_of_a_video_by_the_name_that_the_task_gives(tmp_path):
    write_video(tmp_path / "clip.avi", 6)
    meta = task(start=1, stop=5, more="<frame_filter>step=2</frame_filter><source>clip.avi</source>")
    root = write(tmp_path / "train.xml", track(box(1, 4, 8), box(5, 8, 16)), meta=meta)
    data = opened(root)
    assert data.names == ["clip/frame_000001", "clip/frame_000003", "clip/frame_000005"]
    assert lefts(data) == [(4, 4), (6, 6), (8, 8)]
    for index, frame in enumerate((1, 3, 5)):
        np.testing.assert_array_equal(
            data[index]["image"].permute(1, 2, 0), VideoFrame(root / "clip.avi", frame).read()
        )
    (root / "clip.avi").rename(root / "other.avi")
    with pytest.raises(UserError, match=r"neither the video clip\.avi nor images frame_000001 and so on"):
        opened(root)
    assert opened(root, images="other.avi").names == data.names
    write(tmp_path / "train.xml", track(box(1, 4, 8)), meta=task(stop=6, more="<source>other.avi</source>"))
    with pytest.raises(UserError, match="other.avi has 6 frames, but the annotations belong to frames 0 to 6"):
        opened(root)


def test_pictures_of_a_task_of_images_are_counted(tmp_path):
    frames(tmp_path / "images", name="p{}.png")
    root = write(tmp_path / "train.xml", track(box(1, 4, 8), box(3, 8, 16)), meta=task(size=None))
    data = opened(root)
    assert data[3]["image"].unique().tolist() == [3] and data.mask(0).shape == SIZE
    meta = task(start=1, more="<frame_filter>step=2</frame_filter>", size=None)
    write(tmp_path / "train.xml", track(box(1, 4, 8)), meta=meta)
    assert [opened(root)[index]["image"].unique().item() for index in range(3)] == [1, 3, 5]
    write(tmp_path / "train.xml", track(box(1, 4, 8), box(3, 8, 16)), meta=task(size=None))
    frames(tmp_path / "images", 12, name="p{}.png")
    with pytest.raises(UserError, match=r"nor 6 images \(it has 12\)"):
        opened(root, images="images")
    write(tmp_path / "train.xml", track(box(1, 4, 8), box(3, 8, 16)), meta=task(stop=11, size=None))
    with pytest.raises(UserError, match="in ambiguous order"):
        opened(root, images="images")


def test_tasks_of_a_project_are_divided_by_their_subsets(tmp_path):
    metas = [
        task(stop=1, number=4, more="<subset>Train</subset><source>a.avi</source>"),
        task(stop=1, number=9, more="<subset>Validation</subset><source>b.avi</source>"),
    ]
    meta = f"<project><tasks>{''.join(metas)}</tasks></project>"
    own = [track(box(0, 4, 8), more='task_id="4"'), track(box(1, 20, 30), more='task_id="9"', label="stem")]
    root = write(tmp_path / "annotations.xml", *own, meta=meta)
    for subset in ("Train", "Validation"):
        frames(tmp_path / "images" / subset, 2)
    train, val = opened(root), opened(root, "val")
    assert train.names == ["Train/a/frame_000000", "Train/a/frame_000001"] and lefts(train) == [(4, 4), (4, 4)]
    assert val.names == ["Validation/b/frame_000000", "Validation/b/frame_000001"] and lefts(val) == [None, (20, 10)]
    with pytest.raises(UserError, match="No file of CVAT for split test"):
        opened(root, "test")


def test_images_of_a_project_are_divided_by_their_subsets(tmp_path):
    image = '<image id="0" name="{}" subset="{}" task_id="1" width="48" height="32">{}</image>'
    shape = '<box label="leaf" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    root = write(tmp_path / "annotations.xml", *(image.format("a.png", s, shape) for s in ("Train", "Val")), meta=" ")
    for number, subset in enumerate(("Train", "Val")):
        save(tmp_path / "images" / subset / "a.png", np.full((*SIZE, 3), number))
    assert [opened(root, split)[0]["image"].unique().item() for split in ("train", "val")] == [0, 1]
    both = opened(root, partition=Partition("fraction", val_fraction=0.5))
    assert both.names[0] in ("Train/a", "Val/a")
    assert opened(root, images=str(tmp_path / "images")).names == ["Train/a"]


@pytest.mark.parametrize(
    ("tracks", "meta", "wrong"),
    [
        ([track(box(0, 1, 2), box(0, 3, 4))], {}, "two shapes on frame 0"),
        ([track(box("x", 1, 2))], {}, "has the frame x, which is not a whole number"),
        ([track(box(0, 1, 2))], {"stop": 2**19}, "frames; the limit is 262,144"),
        ([track(box(0, 1, 2))], {"stop": "x"}, "stop_frame of a task is x"),
        ([track(box(0, 1, 2), box(110, 2, 3))], {"stop": 110}, "expand to more than 100 shapes"),
        ([track(box(0, 1, 2))], {"stop": 110}, "expand to more than 100 shapes"),
        ([track(box(0, 1, 2))], {"size": (10**5, 10**5)}, "not an image size:"),
        (
            ['<track label="leaf"><polyline frame="0" points="1,1;2,2"/></track>'], {},
            r"a track \(leaf\): polyline of frame 0: it covers no pixels",
        ),
        (
            [track(box(0, 1, 2), '<ellipse frame="4" cx="5" cy="5" rx="2" ry="2"/>')], {"stop": 4},
            "frames 0 and 4 have shapes of different kinds",
        ),
        ([track(box(0, 1, "nan"), box(3, 1, 2))], {}, "xbr is nan, which is not a number"),
        ([track(box(0, 1, 2), box(3, 1, "1e9"))], {}, "box of frame 3: its polygon has a point"),
        (['<track><box frame="0"/></track>'], {}, "the label of a track is None"),
        ([track(box(0, 1, 2))], {"more": "<subset>../..</subset>"}, "outside of the image folder"),
    ],
)  # fmt: skip
def test_tracks_that_are_refused(tmp_path, tracks, meta, wrong, monkeypatch):
    monkeypatch.setattr("dinoseg.data.annotation.cvat._MAX_BETWEEN", 100)
    path = tmp_path / "train.xml"
    write(path, *tracks, meta=task(**meta))
    try:
        entries = read_cvat(path.read_bytes(), path).entries
        frames(tmp_path, len(entries))
        with pytest.raises(UserError, match=wrong):
            data = opened(tmp_path)
            raise UserError(str(data.lacking))
    except ValueError as error:
        assert wrong in str(error)
