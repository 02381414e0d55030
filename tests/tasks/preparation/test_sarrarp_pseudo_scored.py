"""Pseudo-labels are trained on, and nothing is scored against them."""

import binascii
import json

import numpy as np
from command_line import SMALL, call
from making import save

STEPS, SIZE = (0, 60), (32, 48)


def write_videos(root):
    """Write three prepared training videos whose pseudo-labels are of a class that no mask has."""
    rng = np.random.default_rng(0)
    for number in (1, 2, 3):
        video, sums = root / f"train1/video_{number}", {}
        for index in (0, 6, 12, 60):
            save(video / f"rgb/{index:09d}.png", rng.integers(0, 256, (*SIZE, 3)))
        for index in STEPS:
            path = save(video / f"segmentation/{index:09d}.png", rng.integers(0, 9, SIZE))
            sums[path.stem] = binascii.crc32(path.read_bytes())
        for index in (6, 12):
            save(video / f"pseudo/{index:09d}.png", np.full(SIZE, 9))
        noted = {"what": "", "made_by": {"masks": sums}, "kept": {}, "left_out": {}}
        (video / "pseudo/pseudo.json").write_text(json.dumps(noted))


def test_a_run_that_trained_on_them_is_scored_by_true_masks_alone(tmp_path):
    write_videos(tmp_path / "data")
    small = [word for word in SMALL if not word.startswith(("data=", "data.classes"))]
    words = ["data=sarrarp", *small, "data.reader.pseudo=true", "trainer.val_every=2", "hydra.run.dir=run"]
    trained = call(tmp_path, "mode=train", *words)
    assert trained.status == 0, trained.err
    split = json.loads((tmp_path / "run/split.json").read_text())
    videos = {name.split("/")[0] for name in split["train"]}
    assert len(videos) == 2 and len([name for name in split["train"] if "/pseudo/" in name]) == 4
    done = call(tmp_path, "mode=eval", "resume=run", "mode.split=train", "engine=cpu", "hydra.run.dir=eval")
    assert done.status == 0 and "official:" in done.out, done.err
    matrix = np.array(json.loads((tmp_path / "eval/scores.json").read_text())["matrix"])
    assert matrix.sum() == len(videos) * len(STEPS) * SIZE[0] * SIZE[1]
    assert not matrix[9].sum()  # no pixel is said to be of the pseudo-labels' class
    official = json.loads((tmp_path / "eval/official_scores.json").read_text())
    assert official["n"] == 2 and not list((tmp_path / "eval").rglob("*pseudo*"))
