"""mode=eval scores as the benchmark does: what it writes, scored again as files, gives the same."""

import json

import numpy as np
import pytest
from command_line import SMALL, call

from dinoseg.images import write_png


def write_sarrarp(root):
    rng = np.random.default_rng(0)
    for folder, videos in (("train1", (1, 2, 3)), ("test", (41, 42))):
        for video in videos:
            for frame in (0, 60):
                place = root / folder / f"video_{video}"
                write_png(place / f"rgb/{frame:09d}.png", rng.integers(0, 255, (32, 48, 3)).astype(np.uint8))
                ids = np.repeat(rng.integers(0, 10, (4, 6)).astype(np.uint8), 8, axis=0).repeat(8, axis=1)
                write_png(place / f"segmentation/{frame:09d}.png", ids)


def write_idd_lite(root):
    rng = np.random.default_rng(0)
    for split, drives in (("train", "123"), ("val", "45")):
        for drive in drives:
            for frame in "ab":
                image = rng.integers(0, 255, (32, 48, 3)).astype(np.uint8)
                write_png(root / f"leftImg8bit/{split}/{drive}/{frame}_image.png", image)
                ids = rng.choice([0, 1, 2, 3, 4, 5, 6, 255], (32, 48)).astype(np.uint8)
                write_png(root / f"gtFine/{split}/{drive}/{frame}_label.png", ids)


def write_ade20k(root):
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for name in ("ADE_1", "ADE_2"):
            write_png(root / f"images/{split}/{name}.png", rng.integers(0, 255, (32, 48, 3)).astype(np.uint8))
            write_png(root / f"annotations/{split}/{name}.png", rng.integers(0, 151, (32, 48)).astype(np.uint8))


@pytest.mark.parametrize(
    ("data", "write", "split", "reference", "unit"),
    [
        ("sarrarp", write_sarrarp, "test", "test", 2),
        ("idd_lite", write_idd_lite, "val", "gtFine/val", 2),
        ("ade20k", write_ade20k, "val", "annotations/validation", 2),
    ],
)
def test_the_official_scores_of_an_evaluation(tmp_path, data, write, split, reference, unit):
    write(tmp_path / "data")
    small = [word for word in SMALL if not word.startswith(("data=", "data.classes"))]
    trained = call(tmp_path, "mode=train", f"data={data}", *small, "trainer.val_every=2", "hydra.run.dir=run")
    assert trained.status == 0, trained.err
    done = call(tmp_path, "mode=eval", "resume=run", f"mode.split={split}", "engine=cpu", "hydra.run.dir=eval")
    assert done.status == 0 and "official:" in done.out, done.err
    official = json.loads((tmp_path / "eval/official_scores.json").read_text())
    words = ["protocol=sar_rarp50" if data == "sarrarp" else f"protocol={data}", "hydra.run.dir=again"]
    again = call(tmp_path, "mode=score", *words, f"reference=data/{reference}", "prediction=eval/official")
    assert again.status == 0, again.err
    scored = json.loads((tmp_path / "again/scores.json").read_text())
    assert official["scores"] == scored["scores"] and official["ci95"] == scored["ci95"]
    assert official["protocol"] == scored["protocol"] and official["n"] == scored["n"] == unit
    assert all(value is None or 0 <= value <= 1 for value in official["scores"].values())
    without = call(tmp_path, "mode=eval", "resume=run", "mode.official=false", "engine=cpu", "hydra.run.dir=plain")
    assert without.status == 0 and not (tmp_path / "plain/official").exists()


def test_left_out_images_are_listed_at_the_end(tmp_path):
    write_idd_lite(tmp_path / "data")
    (tmp_path / "data/leftImg8bit/train/1/a_image.png").write_bytes(b"no picture")
    small = [word for word in SMALL if not word.startswith(("data=", "data.classes"))]
    words = ["mode=train", "data=idd_lite", *small, "trainer.val_every=2"]
    stopped = call(tmp_path, *words, "hydra.run.dir=stopped")
    assert stopped.status == 1 and "1/a" in stopped.err and "data cannot be trained on" in stopped.err
    done = call(tmp_path, *words, "data.on_error=skip", "hydra.run.dir=run")
    assert done.status == 0 and "left out:     1 images" in done.out, done.err
    left_out = json.loads((tmp_path / "run/skipped.json").read_text())
    assert list(left_out["train"]) == ["1/a"] and not left_out["val"]
    assert "1/a" not in json.loads((tmp_path / "run/split.json").read_text())["train"]
