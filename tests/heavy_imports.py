"""Which heavy modules a piece of code imports, in a process of its own that has imported torch."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = (
    *("timm", "transformers", "peft", "accelerate", "bitsandbytes", "torchvision", "scipy", "sklearn", "matplotlib"),
    *("onnx", "onnxruntime", "pandas", "tensorboard", "torch._dynamo", "torch.distributed.tensor", "av"),
    *("scipy.optimize", "scipy.stats", "matplotlib.pyplot", "networkx", "torch._inductor.lowering", "jinja2"),
)
# each work runs in a fork, so that torch is imported once
_CODE = """
import json, os, sys, torch
heavy, works, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
seen = lambda: [name for name in heavy if name in sys.modules]
for work in works:
    reader, writer = os.pipe()
    if not os.fork():
        found = []
        exec(work)
        os.write(writer, json.dumps([*found, seen()]).encode())
        os._exit(0)
    os.close(writer)
    found.append(json.loads(os.read(reader, 65536)))
print(json.dumps(found))
"""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process that has imported torch")


def heavy_imports(*works, where=None):
    """Return for each code the sets of `HEAVY` modules that are imported: what it appends to `found`, and at its end.

    It may call `seen()` for the names of those that are imported so far.
    """
    words = [sys.executable, "-c", _CODE, json.dumps(HEAVY), json.dumps(works)]
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[set(names) for names in found] for found in json.loads(done.stdout.splitlines()[-1])]
