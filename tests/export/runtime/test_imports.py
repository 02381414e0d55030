"""`dinoseg.load` imports the libraries that the file's model is made of, and no other heavy one."""

import json
import os
import subprocess
import sys

import pytest
from portable_parts import TINY, export_file, write_untrained

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


@pytest.mark.heavy  # processes that import torch, timm and transformers
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
