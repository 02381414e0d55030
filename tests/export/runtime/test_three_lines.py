"""The README's three lines, from the built wheel where nothing knows of a checkout; what loading a file imports."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_line import call
from installed_wheel import install, run
from portable_parts import TINY, export_file, write_untrained

import dinoseg
from dinoseg.utils.images import read_ids

pytestmark = pytest.mark.heavy
THREE = """
import dinoseg
model = dinoseg.load("model.safetensors")
out = model.predict("picture.png")
"""


def test_three_lines_predict_in_an_empty_environment(trained, tmp_path_factory):
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
    light = "import sys, dinoseg; from dinoseg.export.runtime.inputs import pictures; print('torch' in sys.modules)"
    assert run(python, light, where) == "False\n"


ONNX = """
import sys
import numpy as np
import dinoseg
model = dinoseg.load("model.onnx")
out = model.predict("clip/00003.png")
assert not {"torch", "hydra", "omegaconf", "cv2", "scipy", "matplotlib"} & set(sys.modules)
assert out.probabilities.shape == (2, *out.mask.shape) and (out.probabilities.argmax(axis=0) == out.mask).all()
assert sum(out.areas.values()) == out.mask.size
assert (out.overlay(0.0) == out.image).all() and out.overlay().shape == out.image.shape
for each in model.predict("clip"):
    each.save(each.source.name)
for needs in (lambda: dinoseg.load("model.safetensors"), lambda: model.push_to_hub("me/mine")):
    try:
        needs()
    except dinoseg.utils.errors.UserError as error:
        print(error)
try:
    import torch
except ModuleNotFoundError:
    print("no torch")
"""


def test_onnx_file_needs_only_numpy_pillow_and_onnxruntime(trained, tmp_path_factory):
    where, folder = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(trained / "clip", where / "clip")
    words = ("resume=segmenter", "engine=cpu")
    proof = ("data.root=data", "export.count=2")
    assert call(trained, "mode=export", "export=onnx", *words, *proof, "hydra.run.dir=graph").status == 0
    shutil.copyfile(trained / "graph/model.onnx", where / "model.onnx")
    (where / "model.safetensors").touch()
    python = install(folder, only=("numpy", "pil", "pillow", "onnxruntime"))
    said = run(python, ONNX, where).splitlines()
    assert "give the ONNX file that mode=export export=onnx writes of the model." in said[0] and said[2] == "no torch"
    assert said[1] == "me/mine: a hub needs huggingface_hub, which is not installed: pip install huggingface_hub"
    agreeing = [
        (read_ids(where / out.source.name) == out.mask).mean()
        for out in dinoseg.load(trained / "segmenter", device="cpu", precision="fp32").predict(trained / "clip")
    ]
    assert len(agreeing) == 7 and np.mean(agreeing) > 0.999


HEAVY = (
    *("timm", "transformers", "peft", "accelerate", "bitsandbytes", "torchvision", "scipy", "sklearn", "matplotlib"),
    *("onnx", "onnxruntime", "pandas", "tensorboard", "torch._dynamo", "torch.distributed.tensor", "av"),
)
KINDS = {
    "timm": (("backbone=timm", "backbone.name=test_vit", "backbone.weights=random"), "import timm"),
    "transformers": (
        TINY,
        "from transformers import AutoModel; "
        "from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel",
    ),
}
CODE = """
import json, os, sys, torch
heavy, works, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
for work in works:
    reader, writer = os.pipe()
    if not os.fork():
        exec(work)
        os.write(writer, json.dumps([name for name in heavy if name in sys.modules]).encode())
        os._exit(0)
    os.close(writer)
    found.append(json.loads(os.read(reader, 65536)))
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process that has imported torch")
def test_loading_imports_only_dependencies_of_the_model(compose, tmp_path):
    works = []
    for kind, (words, imports) in KINDS.items():
        path = write_untrained(compose, tmp_path / kind, *words, "head=linear")
        file = export_file(path, tmp_path / kind / "out")
        works += [imports, f"import dinoseg; dinoseg.load({str(file)!r}, device='cpu')"]
    words = [sys.executable, "-c", CODE, json.dumps(HEAVY), json.dumps(works)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    needed_by_timm, timm, needed_by_transformers, transformers = map(set, json.loads(done.stdout))
    assert timm == needed_by_timm and not timm & {"transformers", "peft", "accelerate", "bitsandbytes", "scipy"}
    assert transformers == needed_by_transformers and not transformers & {"timm", "peft", "bitsandbytes"}
