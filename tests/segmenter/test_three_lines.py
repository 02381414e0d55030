"""The README's three lines, from the built wheel where nothing knows of a checkout; what loading a file imports."""

import numpy as np
import pytest
from command_line import call
from heavy_imports import forks, heavy_imports
from installed_wheel import install, run
from portable_parts import TINY, export_file, write_untrained

import dinoseg
from dinoseg.utils.images import read_ids

pytestmark = pytest.mark.heavy


def test_three_lines_predict_in_an_empty_environment(trained, tmp_path_factory):
    where, folder = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("wheel")
    words = ("resume=segmenter", "engine=cpu")
    assert call(trained, "mode=export", "export=safetensors", *words, "hydra.run.dir=one").status == 0
    assert call(trained, "mode=predict", *words, "input=clip/00003.png", "hydra.run.dir=seen").status == 0
    (where / "model.safetensors").write_bytes((trained / "one/model.safetensors").read_bytes())
    (where / "picture.png").write_bytes((trained / "clip/00003.png").read_bytes())
    python = install(folder)
    three = 'import dinoseg\nmodel = dinoseg.load("model.safetensors")\nout = model.predict("picture.png")\n'
    said = run(python, f"{three}out.save('mask.png'); print(dinoseg.__file__, out.areas)", where)
    assert str(folder) in said and "'dark'" in said
    assert (read_ids(where / "mask.png") == read_ids(trained / "seen/masks/00003.png")).all()
    assert dinoseg.load(where / "model.safetensors").predict(np.zeros((9, 9, 3), np.uint8)).mask.shape == (9, 9)
    # what computes nothing may be had without torch
    light = "import sys, dinoseg; from dinoseg.segmenter.inputs import pictures; print('torch' in sys.modules)"
    assert run(python, light, where) == "False\n"


KINDS = {
    "timm": (("backbone=timm", "backbone.name=test_vit", "backbone.weights=random"), "import timm"),
    "transformers": (
        TINY,
        "from transformers import AutoModel; "
        "from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel",
    ),
}


@forks
def test_loading_imports_only_dependencies_of_the_model(compose, tmp_path):
    works = []
    for kind, (words, imports) in KINDS.items():
        path = write_untrained(compose, tmp_path / kind, *words, "head=linear")
        file = export_file(path, tmp_path / kind / "out")
        works += [imports, f"import dinoseg; dinoseg.load({str(file)!r}, device='cpu')"]
    needed_by_timm, timm, needed_by_transformers, transformers = (names for (names,) in heavy_imports(*works))
    assert timm == needed_by_timm and not timm & {"transformers", "peft", "accelerate", "bitsandbytes", "scipy"}
    assert transformers == needed_by_transformers and not transformers & {"timm", "peft", "bitsandbytes"}
