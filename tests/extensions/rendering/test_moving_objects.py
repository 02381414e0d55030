import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from held_locks import start_behind_lock
from mistakes import assert_refused
from test_rendered_roots import MOVING, contents

from dinoseg.extensions.clips.cut import Cut, open_clips
from dinoseg.extensions.clips.movi import Movi
from dinoseg.extensions.protocols.clustering import adjusted_rand_index, contingency
from dinoseg.extensions.rendering.moving import write as moving_objects
from dinoseg.extensions.rendering.moving.write import OUTLINES, draw_video, render_moving_objects

SEEDS = [(0, 0, number) for number in range(1, 13)]


def test_rendered_videos_are_read_back_exactly(tmp_path: Path) -> None:
    render_moving_objects(tmp_path, **{**MOVING, "test_videos": 1, "seconds": 2, "seed": 5})
    for number, (split, folder) in enumerate((("train", "train"), ("val", "validation"), ("test", "test"))):
        clips = open_clips(Movi(str(tmp_path)), split, cut=Cut(length=24))
        assert [clip["name"] for clip in clips] == [f"{folder}_000{k + 1}" for k in range(2 if split == "train" else 1)]
        for index, clip in enumerate(clips):
            drawn = list(draw_video((5, number, index + 1), 24, (32, 40)))
            np.testing.assert_array_equal(clip["frames"].permute(0, 2, 3, 1), np.stack([rgb for rgb, _ in drawn]))
            np.testing.assert_array_equal(clip["masks"], np.stack([mask for _, mask in drawn]))
            count = int(clip["masks"].max())
            assert clip["annotated"].all() and (clip["appears"][1 : count + 1] == 0).all()
    said = json.loads((tmp_path / "validation/validation_0001/rendering.json").read_text())
    place = {"seed": 5, "folder": "validation", "number": 1}
    assert said == {"dinoseg": "moving objects", **place, "seconds": 2, "size": [32, 40]}


def test_every_object_is_visible_first_and_preserves_its_id() -> None:
    counts = set()
    shares = []
    for seed in SEEDS:
        masks = np.stack([mask for _, mask in draw_video(seed, 24, (96, 128))])
        count = int(masks[0].max())
        counts.add(count)
        assert set(np.unique(masks)) == set(range(count + 1))
        sizes = np.stack([np.bincount(mask.ravel(), minlength=count + 1)[1:] for mask in masks])  # (T, n)
        assert (sizes[0] > 15).all() and sizes.max() <= np.pi * (moving_objects.SIZES[1] * 96 / 2 + 1) ** 2
        shares.append((masks > 0).mean())
        for label in range(1, count + 1):
            middles = [np.argwhere(mask == label).mean(axis=0) for mask in masks if (mask == label).any()]
            steps = np.linalg.norm(np.diff(middles, axis=0), axis=1)
            assert np.median(steps) < 0.15 * 96  # an id does not jump to another object
    assert counts == {3, 4, 5} and 0.1 < np.mean(shares) < 0.4


def test_no_object_begins_hidden() -> None:
    for seed in range(30):
        masks = np.stack([mask for _, mask in draw_video((1, seed), 12, (48, 48))])
        sizes = np.stack([np.bincount(mask.ravel(), minlength=7)[1:] for mask in masks])  # (T, 6)
        assert (sizes[0] >= 0.3 * sizes.max(axis=0)).all()


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_a_mask_is_where_its_object_is_seen(seed: tuple[int, ...]) -> None:
    def scene_with(label: int, white: bool) -> moving_objects._Scene:
        scene = moving_objects._Scene(seed, (96, 96))
        scene._light, scene._shadows = None, False
        rgba = scene._movers[label - 1].body.rgba
        rgba[..., :3] = rgba[..., 3:] if white else 0
        return scene

    for label in range(1, len(moving_objects._Scene(seed, (96, 96))._movers) + 1):
        black, white = (scene_with(label, is_white) for is_white in (False, True))
        for seconds in (0, 0.5, 1.75):
            (dark, mask), (light, same) = black.frame(seconds), white.frame(seconds)
            cover = (light.astype(float) - dark).mean(axis=-1) / 255
            assert np.array_equal(mask, same) and np.array_equal(np.unique(mask), np.unique(same))
            assert (mask == label)[cover > 0.55].all() and (cover[mask == label] > 0.2).all()


@pytest.mark.parametrize("outline", OUTLINES)
def test_mask_holds_pixels_whose_centres_are_inside(outline, monkeypatch: pytest.MonkeyPatch) -> None:
    points = outline(np.random.default_rng(3))
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    monkeypatch.setattr(moving_objects, "OUTLINES", (lambda rng: points,))
    scene = moving_objects._Scene(2, (96, 128))
    mover = scene._movers[-1]  # in front of all others
    for seconds in (0, 0.4, 1.3):
        x, y, angle = mover.place(seconds, (96, 128))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        placed = (mover.radius * points @ turn.T + (x, y)).astype(np.float32)[:, None]
        _, mask = scene.frame(seconds)
        depth = np.array([[cv2.pointPolygonTest(placed, (j, i), True) for j in range(128)] for i in range(96)])
        sure = np.abs(depth) > 0.3  # pixels; the tips of rays are blurred
        wrong = (mask == mover.body.label) != (depth > 0)
        assert wrong[sure].sum() <= 2 and wrong.sum() < 0.1 * (depth > 0).sum()


def test_objects_fly_straight_and_are_thrown_back() -> None:
    scene = moving_objects._Scene(11, (64, 100))
    for mover in scene._movers:
        low, high = 0.8 * mover.radius, np.array([100, 64]) - 0.8 * mover.radius
        where = mover.start.astype(float)
        speed = mover.speed.copy()
        step = 1e-3
        for index in range(1, 6001):
            where = where + step * speed
            over = (where < low) | (where > high)
            speed[over] *= -1
            where = np.where(where < low, 2 * low - where, np.where(where > high, 2 * high - where, where))
            if index % 500 == 0:
                x, y, angle = mover.place(index * step, (64, 100))
                np.testing.assert_allclose((x, y), where, atol=1e-6)
                assert angle == pytest.approx(mover.turn[0] + mover.turn[1] * index * step)


def test_rendered_objects_are_textured_and_share_colours() -> None:
    inside, scores = [], []
    for seed in SEEDS:
        rgb, mask = next(draw_video(seed, 1, (128, 128)))
        inside += [rgb[mask == label].astype(float).std(axis=0).max() for label in range(mask.max() + 1)]
        cv2.setRNGSeed(0)
        pixels = rgb.reshape(-1, 3).astype(np.float32)[::4]
        stop = (cv2.TERM_CRITERIA_COUNT, 10, 0.0)
        found = cv2.kmeans(pixels, mask.max() + 1, None, stop, 1, cv2.KMEANS_PP_CENTERS)[1]
        scores.append(adjusted_rand_index(contingency(mask.ravel()[::4], found[:, 0]).counts))
    assert min(inside) > 3 and np.median(inside) > 15
    assert np.mean(scores) < 0.8


def test_some_scenes_have_moving_ground_new_light_or_shadows() -> None:
    scenes = [moving_objects._Scene(seed, (32, 32)) for seed in range(24)]
    still = [np.array_equal(scene._seen_ground(0), scene._seen_ground(1)) for scene in scenes]
    for some in (still, [scene._shadows for scene in scenes], [scene._light is None for scene in scenes]):
        assert 4 <= sum(some) <= 20
    shaded = next(scene for scene in scenes if scene._shadows and scene._light is None)
    dark, mask = shaded.frame(0)
    shaded._shadows = False
    bright, same = shaded.frame(0)
    assert np.array_equal(mask, same) and (dark <= bright).all() and (dark < bright)[mask == 0].any()


def test_finished_videos_are_reused_and_partial_ones_repeated(tmp_path: Path, monkeypatch, caplog) -> None:
    render_moving_objects(tmp_path / "whole", **MOVING)
    write = moving_objects.write_png
    written = []

    def until_full(path: Path, pixels: np.ndarray) -> None:
        written.append(path)
        if len(written) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, pixels)

    monkeypatch.setattr(moving_objects, "write_png", until_full)
    words = ("No space left on device", "running again renders the missing videos")
    assert_refused(lambda: render_moving_objects(tmp_path / "cut", **MOVING), *words)
    assert [path.name for path in (tmp_path / "cut/train").iterdir()] == ["train_0001"]
    monkeypatch.setattr(moving_objects, "write_png", write)
    kept = (tmp_path / "cut/train/train_0001/frames/00000.png").stat().st_mtime_ns
    render_moving_objects(tmp_path / "cut", **MOVING)
    assert (tmp_path / "cut/train/train_0001/frames/00000.png").stat().st_mtime_ns == kept
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    (tmp_path / "cut/train/train_0002/segmentations/00003.png").unlink()  # as two renderings at once left it
    render_moving_objects(tmp_path / "cut", **MOVING)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert "train_0002 lacks images: rendering it again" in caplog.text


def test_two_renderings_of_one_root_work_one_after_the_other(tmp_path: Path, caplog) -> None:
    with start_behind_lock(tmp_path / ".render.lock", caplog, render_moving_objects, tmp_path, **MOVING):
        assert not list(tmp_path.rglob("rendering.json"))
    assert len(list(tmp_path.rglob("rendering.json"))) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "validation"]
