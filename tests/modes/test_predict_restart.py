"""mode=predict given twice with one folder: it resumes alone, by the same settings; and at the trained sizes."""

import fcntl
import json
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from command_line import call, succeed

from dinoseg.modes import predict
from dinoseg.training import checkpoint
from dinoseg.utils.images import read_ids, read_image, write_png
from dinoseg.utils.precision import bfloat16_is_faster


def test_repeated_command_resumes_in_its_folder(trained_once, tmp_path):
    words = ("mode=predict", f"resume={trained_once}/segmenter", f"input={trained_once}/clip", "engine=cpu")
    words += ("hydra.run.dir=out",)
    succeed(tmp_path, *words)
    (tmp_path / "out/predicted/00003.json").unlink()
    again = call(tmp_path, *words)
    assert again.status == 0 and "6 images of an earlier run reused" in again.err + again.out, again.err
    assert "images: 1 image in" in again.err + again.out
    assert not (tmp_path / "out_2").exists()
    with open(tmp_path / "out/run.log", "a", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        busy = call(tmp_path, *words)
    assert busy.status == 1 and "Another process is writing to" in busy.err
    assert "Wait for it, or choose another run folder." in busy.err and not (tmp_path / "out_2").exists()


@pytest.mark.heavy
def test_groups_of_an_interrupted_run_are_those_of_its_command(trained_once, tmp_path):
    words = ("mode=predict", f"resume={trained_once}/segmenter", "engine=cpu", "hydra.run.dir=out")

    def groups():
        return json.loads((tmp_path / "out/masks/classes.json").read_text())["groups"]

    one, two = (f"input={trained_once}/clip/0000{number}.png" for number in (1, 2))
    assert call(tmp_path, *words, one, "data.group=^0").status == 0 and groups() == {"00001": "0"}
    with patch.object(predict, "_segment_videos", side_effect=KeyboardInterrupt):  # after the masks of images
        assert call(tmp_path, *words, two, "data.group=.$").status != 0
    assert (tmp_path / "out/masks/00002.png").is_file() and groups() == {"00001": "0", "00002": "2"}
    assert call(tmp_path, *words, one).status == 0 and groups() == {"00002": "2"}


def test_other_model_is_refused_in_one_sentence(trained_once, tmp_path):
    (tmp_path / "one").symlink_to(trained_once / "segmenter")
    shutil.copytree(trained_once / "segmenter/checkpoints", tmp_path / "two/checkpoints")
    words = ("mode=predict", f"input={trained_once}/clip/00000.png", "engine=cpu", "hydra.run.dir=out")
    succeed(tmp_path, *words, "resume=one/checkpoints/best.safetensors")
    same = call(tmp_path, *words, f"resume={trained_once}/segmenter/checkpoints/best.safetensors")
    assert same.status == 0 and "1 image of an earlier run reused" in same.err + same.out
    other = call(tmp_path, *words, "resume=two/checkpoints/best.safetensors")
    assert other.status == 1 and "out holds predictions of another model: " in other.err
    assert "replaced by two/checkpoints/best.safetensors" in other.err
    assert other.err.count("error: ") == 1


def test_typed_palette_colours_predictions_of_its_own_folder(trained_once, tmp_path):
    words = ("mode=predict", f"resume={trained_once}/segmenter", f"input={trained_once}/clip/00000.png", "engine=cpu")
    succeed(tmp_path, *words, "data.palette=[[9,8,7],[6,5,4]]", "hydra.run.dir=out")
    colours = np.unique(read_image(tmp_path / "out/00000_segmentation/segmentation_colored.png"))
    assert {*colours.tolist()} <= {*range(4, 10)}
    other = call(tmp_path, *words, "hydra.run.dir=out")
    assert other.status == 1 and "data.palette was [[9,8,7],[6,5,4]]" in other.err


def test_checkpoint_knows_sizes_and_precision_of_its_training(trained_once):
    info = checkpoint.describe(trained_once / "segmenter/checkpoints/best.safetensors")
    assert info["sizes"] == {"typical": 48, "largest": 72}  # 48 pixels, enlarged by up to 1.5
    precision = {"engine.precision": "bf16" if bfloat16_is_faster(torch.device("cpu")) else "fp32"}
    assert info["engine"] == {**precision, "engine.cache": "off", "features.dtype": None}


@pytest.mark.parametrize(
    ("size", "words", "warns"),
    [
        ((100, 160), (), True),
        ((64, 70), (), False),
        ((100, 160), ("resolution.longest=null",), False),
        pytest.param((100, 160), ("resolution.longest=64",), False, marks=pytest.mark.heavy),
    ],
)
def test_larger_images_are_reduced_unless_a_size_is_set(trained_once, tmp_path, size, words, warns):
    write_png(tmp_path / "a.png", np.zeros((*size, 3), np.uint8))
    start = ("mode=predict", f"resume={trained_once}/segmenter", "input=a.png", "engine=cpu", "hydra.run.dir=out")
    done = call(tmp_path, *start, *words)
    assert done.status == 0 and ("are larger than those of the training" in done.err) == warns
    assert read_ids(tmp_path / "out/masks/a.png").shape == size
    if warns:
        typed = call(tmp_path, *start, "resolution.longest=null")
        said = "settings differ from that run: resolution.longest on the command line was not set and is true."
        assert typed.status == 1 and said in typed.err
        again = call(tmp_path, *start)
        assert again.status == 0 and "1 image of an earlier run reused" in again.err
