"""Data sets drawn from the command line: which can be, with which settings, and what comes next."""

import numpy as np
from command_line import succeed
from PIL import Image

MOVI = ("mode=render", "data=movi", "data.root=data", "render.seconds=1", "render.size=[32,48]", "render.workers=1")
SARRARP = ("mode=render", "data=sarrarp", *MOVI[2:4], "render.size=[48,80]", "render.workers=1")


def test_operations_are_rendered_and_the_next_step_is_named(tmp_path):
    done = succeed(tmp_path, *SARRARP, "render.train_videos=1", "render.test_videos=2", "render.seed=3")
    assert "Wrote 1 training and 2 test videos of 1 s at 48 x 80 under data" in done.out
    assert "Next: python -m dinoseg mode=prepare data=sarrarp data.root=data" in done.out
    found = sorted(str(path.relative_to(tmp_path / "data")) for path in tmp_path.glob("data/**/*.zip"))
    assert found == ["test/video_41.zip", "test/video_42.zip", "train1/video_01.zip"]


def test_moving_objects_are_rendered_and_extended(tmp_path):
    first = succeed(tmp_path, *MOVI, "render.train_videos=1", "render.val_videos=1")
    assert "Wrote 1 training and 1 validation videos of 1 s at 32 x 48 under data" in first.out
    assert "Next: python -m dinoseg mode=train hparam=slots_rendered data.root=data" in first.out
    stamp = (tmp_path / "data/train/train_0001").stat().st_mtime_ns
    succeed(tmp_path, *MOVI, "render.train_videos=2", "render.val_videos=1", "render.test_videos=1")
    assert (tmp_path / "data/train/train_0001").stat().st_mtime_ns == stamp
    found = sorted(str(path.relative_to(tmp_path / "data")) for path in tmp_path.glob("data/*/*"))
    assert found == ["test/test_0001", "train/train_0001", "train/train_0002", "validation/validation_0001"]
    assert len(list(tmp_path.glob("data/test/test_0001/*/*.png"))) == 24
    assert np.asarray(Image.open(tmp_path / "data/test/test_0001/frames/00011.png")).shape == (32, 48, 3)


def test_settings_that_a_mode_leaves_out_are_the_data_set_s(compose):
    movi, sarrarp = (compose("mode=render", f"data={data}", "data.root=X").render for data in ("movi", "sarrarp"))
    assert (movi.root, list(movi.size), movi.seconds) == ("X", [128, 128], 2)
    assert (sarrarp.root, list(sarrarp.size), sarrarp.seconds) == ("X", [192, 320], 4)
    assert (sarrarp.train_videos, sarrarp.test_videos) == (64, 2)
    assert "render" not in compose("mode=render", "data=idd_lite", "data.root=X")
