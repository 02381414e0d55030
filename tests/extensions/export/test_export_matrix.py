"""Each head and each backbone family as an ONNX file: what PyTorch gives, at any size where it is open."""

import copy
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_matrix import HEADS, SMALL_HEADS
from tiny_parts import BACKBONES, load, tiny_node

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.export import onnx_file
from dinoseg.extensions.export.graph import record_of, trace
from dinoseg.extensions.export.onnx_model import load_onnx
from dinoseg.extensions.export.onnx_record import PRECISIONS
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.proof import Reference
from dinoseg.extensions.query_heads.mask2former import pixel_decoder, predictor
from dinoseg.utils.errors import UserError

CELLS = [  # each head and each family of backbones
    ("dinov3", "linear", GraphOptions()),
    ("timm_vit", "mlp", GraphOptions()),
    ("timm_pyramid", "cnn", GraphOptions()),
    ("dinov2_registers", "multiscale", GraphOptions()),
    ("dino", "dpt", GraphOptions(size=(48, 64))),
    ("convnext", "dpt", GraphOptions()),
    # patches of 14 px fill cells of 4 px where their number is even, and else do not
    ("dinov2", "detail", GraphOptions()),
    ("timm_pyramid", "upernet", GraphOptions()),
    ("dinov3", "eomt", GraphOptions()),
    ("dinov2_registers", "eomt", GraphOptions(pixels=True)),
    ("timm_vit", "eomt", GraphOptions()),
    ("dinov3", "pmt", GraphOptions()),
    ("timm_vit", "pmt", GraphOptions()),
    ("dinov3", "mask2former", GraphOptions()),
]
ONE_SIZE = ("upernet", "mask2former")
# the other heads read two blocks, which are traced in half the time
FOUR_MAPS = ("dpt", "upernet", "mask2former")
SIZES = ((37, 50), (64, 33), (20, 80), (100, 9))  # odd and even numbers of patches; the last one patch wide


def tiny(backbone, head):
    torch.manual_seed(0)
    cfg = OmegaConf.create(load(f"head={head}", "adapter=frozen"))
    cfg.backbone, cfg.head = tiny_node(backbone), {**cfg.head, **SMALL_HEADS.get(head, {})}
    # layers that repeat the operations of others cost seconds each: one block per stage, one layer per level
    if backbone == "timm_pyramid":
        cfg.backbone.name = "test_convnext2"
    if head == "detail":
        cfg.head.blocks = 1
    if head not in FOUR_MAPS and "num_hidden_layers" in cfg.backbone.get("arch", {}):
        cfg.backbone.arch.num_hidden_layers = 2
        cfg.head.layers = [-2, -1] if len(cfg.head.layers) > 1 else [-1]
    with patch.object(predictor, "LAYERS", predictor.LEVELS), patch.object(pixel_decoder, "LAYERS", 2):
        return Builder(cfg).model().eval()


@cache
def trace_tiny(backbone, head, options):
    """Return a tiny model, what ONNX makes of it, how it is asked, and why its size is fixed."""
    model = tiny(backbone, head)
    record, reason = record_of(model, None, options, SIZES[0], opset=18)
    return model, onnx_file.to_onnx(trace(model, record), record), record, reason


def runtime_of(folder, made, record):
    """Return what computes for a file of a traced model, which stays as it is."""
    about = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]], "ignore_index": 255}
    made = copy.deepcopy(made)
    onnx_file.finish(made, record, about)
    return load_onnx(onnx_file.write(made, folder / f"{record.precision}.onnx")[-1], device="cpu").runtime


@pytest.mark.heavy
@pytest.mark.parametrize(("backbone", "head", "options"), CELLS)
def test_exported_file_equals_the_model(tmp_path, backbone, head, options):
    model, made, record, reason = trace_tiny(backbone, head, options)
    reference = Reference(model, record)
    runtime = runtime_of(tmp_path, made, record)
    fixed = head in ONE_SIZE or options != GraphOptions()
    assert (reason is not None) == fixed == (record.size is not None)
    draw = np.random.default_rng(0)
    for size in SIZES:
        images = list(draw.integers(0, 256, (2, *size, 3)).astype(np.uint8))
        wanted = reference.probabilities(images)
        # masks that became pixels of the graph before they come to another size are not those of that size
        near = 0.02 if options.pixels and size != SIZES[0] else 1e-4
        np.testing.assert_allclose(runtime.probabilities(images), wanted, atol=near)
        assert (runtime.ids(images) == reference.ids(images)).mean() >= (0.999 if near < 0.02 else 0.98)


def test_each_head_and_each_backbone_is_exported():
    assert {head for _, head, _ in CELLS} == set(HEADS)
    assert {backbone for backbone, _, _ in CELLS} == set(BACKBONES)


@pytest.mark.heavy
def test_shorter_weights_give_smaller_files_and_nearly_the_same(tmp_path):
    model, made, record, _ = trace_tiny("dinov3", "linear", GraphOptions())
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    wanted = Reference(model, record).probabilities([image])
    sizes = {}
    for precision in PRECISIONS:
        runtime = runtime_of(tmp_path, made, replace(record, precision=precision))
        np.testing.assert_allclose(runtime.probabilities([image]), wanted, atol=0.05)
        sizes[precision] = (tmp_path / f"{precision}.onnx").stat().st_size
    assert sizes["int8"] < 0.65 * sizes["float32"] and sizes["float16"] < 0.75 * sizes["float32"]


@pytest.mark.parametrize("head", ONE_SIZE)
def test_heads_of_one_size_say_why(head):
    with pytest.raises(UserError, match="depend on the size.*Set export.dynamic=null"):
        record_of(tiny("dinov3", head), None, GraphOptions(dynamic=True), (32, 32))
