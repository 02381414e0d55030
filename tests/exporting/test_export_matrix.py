"""Each head and each backbone family as an ONNX file: what PyTorch gives, at any size where it is open."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_matrix import SMALL_HEADS
from tiny_parts import BACKBONES, load, tiny_node

from dinoseg import build
from dinoseg.errors import UserError
from dinoseg.exporting import onnx_file
from dinoseg.exporting.graph import record_of, trace
from dinoseg.exporting.options import GraphOptions
from dinoseg.exporting.proof import Reference
from dinoseg.portable.onnx_model import load_onnx

pytestmark = pytest.mark.heavy

HEADS = ("mlp", "cnn", "multiscale", "dpt", "upernet", "eomt")
CELLS = [
    *((backbone, "linear", GraphOptions()) for backbone in BACKBONES),
    *(("dinov3", head, GraphOptions()) for head in HEADS),
    ("dinov2", "cnn", GraphOptions()),
    ("convnext", "dpt", GraphOptions()),
    ("timm_pyramid", "upernet", GraphOptions()),
    ("dinov3", "mask2former", GraphOptions()),
    ("dinov2_registers", "eomt", GraphOptions(pixels=True)),
    ("dino", "dpt", GraphOptions(size=(48, 64))),
]
ONE_SIZE = ("upernet", "mask2former")
SIZES = ((37, 50), (64, 33), (20, 90))


def tiny(backbone, head):
    torch.manual_seed(0)
    node = {**load(f"head={head}")["head"], **SMALL_HEADS.get(head, {})}
    parts = {"backbone": tiny_node(backbone), "adapter": load("adapter=frozen")["adapter"], "head": node}
    return build.model(OmegaConf.create({**load(), **parts})).eval()


def answering(folder, model, wish, precision="float32"):
    """Return the trained model's answers and those of its ONNX file."""
    record, reason = record_of(model, None, wish, SIZES[0], opset=18, precision=precision)
    made = onnx_file.to_onnx(trace(model, record), record)
    about = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]], "ignore_index": 255}
    onnx_file.finish(made, record, about)
    file = onnx_file.write(made, folder / "model.onnx")[-1]
    return Reference(model, record), load_onnx(file, device="cpu").runtime, reason


@pytest.mark.parametrize(("backbone", "head", "wish"), CELLS)
def test_a_file_answers_as_the_model_does(tmp_path, backbone, head, wish):
    reference, runtime, reason = answering(tmp_path, tiny(backbone, head), wish)
    fixed = head in ONE_SIZE or wish != GraphOptions()
    assert (reason is not None) == fixed == (reference.record.size is not None)
    draw = np.random.default_rng(0)
    for size in SIZES:
        images = list(draw.integers(0, 256, (2, *size, 3)).astype(np.uint8))
        wanted = reference.probabilities(images)
        # masks that became pixels of the graph before they come to another size are not those of that size
        near = 0.02 if wish.pixels and size != SIZES[0] else 1e-4
        np.testing.assert_allclose(runtime.probabilities(images), wanted, atol=near)
        assert (runtime.ids(images) == reference.ids(images)).mean() >= (0.999 if near < 0.02 else 0.98)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_shorter_weights_give_smaller_files_and_nearly_the_same(tmp_path, precision):
    (tmp_path / "whole").mkdir()
    model = tiny("dinov3", "linear")
    answering(tmp_path / "whole", model, GraphOptions())
    reference, runtime, _ = answering(tmp_path, model, GraphOptions(), precision)
    share = (tmp_path / "model.onnx").stat().st_size / (tmp_path / "whole/model.onnx").stat().st_size
    assert share < {"float16": 0.75, "int8": 0.65}[precision]
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    np.testing.assert_allclose(runtime.probabilities([image]), reference.probabilities([image]), atol=0.05)


@pytest.mark.parametrize("head", ONE_SIZE)
def test_heads_of_one_size_say_why(head):
    with pytest.raises(UserError, match="depend on the size.*Set export.dynamic=null"):
        record_of(tiny("dinov3", head), None, GraphOptions(dynamic=True), (32, 32), opset=18, precision="float32")
