import zipfile
from pathlib import Path

import cv2
import numpy as np
from test_rendered_roots import SURGERY

from dinoseg.extensions.rendering.surgery.write import Scene, render_clip, render_dataset, render_objects


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames, capture.get(cv2.CAP_PROP_FPS)


def read_masks(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        return {name: cv2.imdecode(np.frombuffer(archive.read(name), np.uint8), cv2.IMREAD_UNCHANGED) for name in names}


def test_zips_have_the_download_form_and_the_masks_of_frames(tmp_path: Path) -> None:
    render_dataset(tmp_path, **{**SURGERY, "train_videos": 2, "size": (96, 160)})
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["test/video_41.zip", "train1/video_01.zip", "train1/video_02.zip"]
    with zipfile.ZipFile(tmp_path / "test/video_41.zip") as archive:
        names = ["segmentation/000000000.png", "segmentation/000000060.png"]
        ids = [name.replace("segmentation", "instances") for name in names]
        assert sorted(archive.namelist()) == [*ids, *names, "video_left.avi"]
        archive.extract("video_left.avi", tmp_path)
    frames, fps = read_video(tmp_path / "video_left.avi")
    assert (len(frames), fps) == (120, 60.0) and frames[0].shape == (96, 160, 3)
    masks = read_masks(tmp_path / "test/video_41.zip")
    clip = list(render_clip((0, 1, 41), 20, (96, 160)))
    for second, name in enumerate(names):
        rgb, mask = clip[10 * second]
        assert np.array_equal(masks[name], mask) and masks[name].dtype == np.uint8
        assert masks[ids[second]].dtype == np.uint16 and np.array_equal(masks[ids[second]] // 1000, mask)
        own = np.abs(frames[60 * second].astype(int) - rgb).mean()
        other = np.abs(frames[60 * second].astype(int) - clip[10 * second + 5][0]).mean()
        assert own < 8 and other > 1.5 * own


def test_ids_are_those_of_the_parts_of_each_instrument() -> None:
    seen = set()
    for seed in range(4):
        frames = list(render_objects((seed,), 21, (96, 160)))[::10]
        for _, mask, ids in frames:
            assert np.array_equal(ids // 1000, mask) and ((ids % 1000 > 0) == (mask > 0)).all()
            parts = set(np.unique(ids).tolist())
            assert len(parts) > len(np.unique(mask))  # two instruments have a shaft
            seen |= parts
        assert len(set(np.unique(frames[0][2])) & set(np.unique(frames[1][2]))) > 4  # ids do not change with time
    assert {1001, 2001, 2002, 3001, 3002, 4002, 5001, 6001, 7002, 9001} <= seen and 5002 not in seen
    assert len(seen & {8001, 8002, 8003}) > 1


def test_every_class_is_seen_often_and_nothing_stands_still() -> None:
    seen = np.zeros(10)
    moved = []
    for seed in range(3):
        masks = [mask for _, mask in render_clip((seed,), 21, (192, 320))][::10]
        seen += sum(np.bincount(mask.ravel(), minlength=10) > 20 for mask in masks)
        moved.append(np.mean(masks[0] != masks[1]))
    assert (seen / 9 > 0.5).all(), seen / 9
    assert min(moved) > 0.02


def test_a_mirrored_scene_mirrors_image_and_mask() -> None:
    scene = Scene(3, (48, 80))
    frames = {}
    for scene._mirror in (False, True):
        image, mask = scene.frame(0.5)
        frames[scene._mirror] = image.astype(float), mask
    (image, mask), (mirrored, mirrored_mask) = frames[False], frames[True]
    np.testing.assert_array_equal(mirrored_mask, mask[:, ::-1])
    turns = (image[:, ::-1], image, image[::-1], image[::-1, ::-1])  # the lens darkens the corners
    assert np.argmin([abs(mirrored - turned).mean() for turned in turns]) == 0


def test_no_class_is_one_flat_colour() -> None:
    colours: dict[int, list[np.ndarray]] = {label: [] for label in range(1, 10)}
    for seed in range(4):
        rgb, mask = next(render_clip((seed, 5), 1, (192, 320)))
        for label in colours:
            if (mask == label).sum() > 20:
                colours[label].append(rgb[mask == label].astype(float))
    for label, parts in colours.items():
        inside = np.mean([part.mean(axis=1).std() for part in parts])
        across = np.stack([part.mean(axis=0) for part in parts]).std(axis=0).max()
        assert inside > 12 and across > 6, (label, inside, across)


def test_the_thread_is_about_three_pixels_thick() -> None:
    widths = []
    for seed in range(3):
        _, mask = next(render_clip((seed, 9), 1, (192, 320)))
        thread = (mask == 5).astype(np.uint8)
        widths.append(2 * cv2.distanceTransform(thread, cv2.DIST_L2, 5)[thread > 0].max() - 1)
        assert np.mean(cv2.erode(thread, np.ones((5, 5)))[thread > 0]) < 0.05  # crossings may be wider
    assert 2 <= np.median(widths) <= 4.5


def test_finished_zips_are_reused_and_partial_ones_repeated(tmp_path: Path) -> None:
    render_dataset(tmp_path, **SURGERY)
    kept, lost = tmp_path / "train1/video_01.zip", tmp_path / "test/video_41.zip"
    before = kept.stat().st_mtime_ns
    expected = read_masks(lost)
    lost.unlink()
    render_dataset(tmp_path, **SURGERY)
    assert kept.stat().st_mtime_ns == before
    assert all(np.array_equal(mask, expected[name]) for name, mask in read_masks(lost).items())
