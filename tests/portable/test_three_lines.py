"""The README's three lines, from the built wheel, where nothing knows of a checkout."""

import numpy as np
import pytest
from command_line import call
from installed_wheel import install, run

import dinoseg
from dinoseg.images import read_ids

pytestmark = pytest.mark.heavy
THREE = """
import dinoseg
model = dinoseg.load("model.safetensors")
out = model.predict("picture.png")
"""


def test_three_lines_in_an_empty_environment(trained, tmp_path_factory):
    where, folder = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("wheel")
    words = ("resume=segmenter", "engine=cpu")
    assert call(trained, "mode=export", "export=safetensors", *words, "hydra.run.dir=one").status == 0
    assert call(trained, "mode=predict", *words, "input=clip/00003.png", "hydra.run.dir=seen").status == 0
    (where / "model.safetensors").write_bytes((trained / "one/model.safetensors").read_bytes())
    (where / "picture.png").write_bytes((trained / "clip/00003.png").read_bytes())
    python = install(folder)
    said = run(python, f"{THREE}out.save('mask.png'); print(dinoseg.__file__, out.areas)", where)
    assert str(folder) in said and "'dark'" in said
    assert (read_ids(where / "mask.png") == read_ids(trained / "seen/masks/00003.png")).all()
    assert dinoseg.load(where / "model.safetensors").predict(np.zeros((9, 9, 3), np.uint8)).mask.shape == (9, 9)
    # what computes nothing may be had without torch
    light = "import sys, dinoseg; from dinoseg.portable.inputs import pictures; print('torch' in sys.modules)"
    assert run(python, light, where) == "False\n"
