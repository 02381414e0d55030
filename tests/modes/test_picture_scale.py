"""From training to prediction: the checkpoint knows the sizes that it saw."""

import re

import numpy as np
import pytest
import torch
from command_line import SMALL, call, write_data

from dinoseg.training import checkpoint
from dinoseg.utils.images import read_ids, write_png
from dinoseg.utils.precision import bfloat16_is_faster


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    where = tmp_path_factory.mktemp("scale")
    write_data(where / "data")
    done = call(where, "mode=train", *SMALL, "mode.metrics_only=true", "hydra.run.dir=run")
    assert done.status == 0, done.err
    write_png(where / "small.png", np.zeros((64, 70, 3), np.uint8))
    write_png(where / "large.png", np.zeros((100, 160, 3), np.uint8))
    return where


def test_a_checkpoint_knows_the_sizes(run):
    info = checkpoint.describe(run / "run/checkpoints/best.safetensors")
    assert info["sizes"] == {"typical": 48, "largest": 72}  # 48 pixels, enlarged by up to 1.5
    precision = {"engine.precision": "bf16" if bfloat16_is_faster(torch.device("cpu")) else "fp32"}
    assert info["engine"] == {**precision, "engine.cache": "off", "features.dtype": None}


@pytest.mark.parametrize(
    ("source", "words", "warns"),
    [
        ("large.png", (), True),
        ("small.png", (), False),
        ("large.png", ("resolution.longest=null",), False),
        ("large.png", ("resolution.longest=64",), False),
    ],
)
def test_larger_images_are_reduced_unless_a_size_is_set(run, source, words, warns):
    out = "_".join(("out", source.partition(".")[0], *words)).replace(".", "_").replace("=", "_")
    done = call(run, "mode=predict", "resume=run", f"input={source}", "engine=cpu", f"hydra.run.dir={out}", *words)
    assert done.status == 0 and ("are larger than those of the training" in done.err) == warns
    mask = run / out / "masks" / source
    assert read_ids(mask).shape == ((100, 160) if source == "large.png" else (64, 70))


def test_typed_size_is_a_changed_setting_when_resuming(run):
    words = ("mode=predict", "resume=run", "input=large.png", "engine=cpu", "hydra.run.dir=resumes_with")
    said = "hydra.run.dir=.*: settings differ from that run: resolution.longest on the command line was "
    assert call(run, *words).status == 0
    typed = call(run, *words, "resolution.longest=null")
    assert typed.status == 1 and re.search(f"{said}not set and is true.", typed.err), typed.err
    again = call(run, *words)
    assert again.status == 0 and "1 image of an earlier run reused" in again.err
