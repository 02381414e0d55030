"""A segmenter that is built for a file of all its parameters: nothing but these is left out."""

import pytest
import torch
from omegaconf import OmegaConf
from test_matrix import SMALL_HEADS
from tiny_parts import BACKBONES, load, tiny_node

from dinoseg.experiment import build
from dinoseg.models.model import constants

CELLS = [*((name, "linear") for name in BACKBONES), ("dinov3", "eomt"), ("dinov3", "mask2former"), ("convnext", "dpt")]


def config(backbone, head):
    parts = {"backbone": tiny_node(backbone), "head": {**load(f"head={head}")["head"], **SMALL_HEADS.get(head, {})}}
    return OmegaConf.create({**load(), "adapter": load("adapter=frozen")["adapter"], **parts})


def test_no_random_number_is_drawn_for_parameters():
    cfg = config("timm_vit", "linear")
    build.model(cfg, initialised=False)
    state = torch.get_rng_state()
    torch.manual_seed(cfg.seed)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("backbone", "head"), CELLS)
def test_parameters_alone_are_not_initialised(monkeypatch, backbone, head):
    cfg = config(backbone, head)
    whole = build.model(cfg).eval()
    bare = build.model(cfg, initialised=False).eval()
    buffers = dict(bare.named_buffers())
    for name, value in whole.named_buffers():
        assert torch.equal(buffers[name], value), name
    assert constants(bare).keys() == constants(whole).keys()
    bare.load_state_dict(whole.state_dict())
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(bare(images).logits(), whole(images).logits())
