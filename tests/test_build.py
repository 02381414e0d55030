"""Segmenters that are built without values: on the meta device, or for a file of all their values."""

from typing import Any

import pytest
import timm
import torch
from command_line import SMALL, succeed, write_data
from omegaconf import OmegaConf
from safetensors.torch import save_file
from test_matrix import SMALL_HEADS
from tiny_parts import BACKBONES, load, tiny_node

from dinoseg.experiment.builder import Builder
from dinoseg.models.model import non_persistent_buffers
from dinoseg.models.no_init import allocate

CELLS = [*((name, "linear") for name in BACKBONES), ("dinov3", "eomt"), ("dinov3", "mask2former"), ("convnext", "dpt")]


def config(backbone, head):
    parts = {"backbone": tiny_node(backbone), "head": {**load(f"head={head}")["head"], **SMALL_HEADS.get(head, {})}}
    return OmegaConf.create({**load(), "adapter": load("adapter=frozen")["adapter"], **parts})


def test_building_without_initialisation_uses_no_random_numbers():
    cfg = config("timm_vit", "linear")
    Builder(cfg).model(initialised=False)
    state = torch.get_rng_state()
    torch.manual_seed(cfg.seed)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("backbone", "head"), CELLS)
def test_a_model_without_values_becomes_that_of_a_file(backbone, head):
    cfg = config(backbone, head)
    whole = Builder(cfg).model().eval()
    own = non_persistent_buffers(whole)
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    expected = whole(images).logits()

    uninitialised = Builder(cfg).model(initialised=False).eval()  # of parameters alone
    buffers = dict(uninitialised.named_buffers())
    assert not [name for name, value in whole.named_buffers() if not torch.equal(buffers[name], value)]
    outline = Builder(cfg).outline().eval()  # on the meta device, where no buffer has a value
    assert allocate(outline)
    for name, value in own.items():
        non_persistent_buffers(outline)[name].copy_(value)

    trained = {name: part.requires_grad for name, part in whole.named_parameters()}
    for bare in (uninitialised, outline):
        assert {name: part.requires_grad for name, part in bare.named_parameters()} == trained
        assert non_persistent_buffers(bare).keys() == own.keys()
        bare.load_state_dict(whole.state_dict())
        assert not any(part.is_meta for part in (*bare.parameters(), *bare.buffers()))
        with torch.no_grad():
            assert torch.equal(bare(images).logits(), expected)


def test_shared_tensors_of_an_outline_stay_shared():
    bare = Builder(config("timm_vit", "linear")).outline()
    bare.head.again = bare.backbone
    bare.head.twin = torch.nn.Linear(2, 2, device="meta")
    bare.head.twin.bias = bare.backbone.model.blocks[0].norm1.bias
    assert allocate(bare)
    assert bare.head.twin.bias is bare.backbone.model.blocks[0].norm1.bias and not bare.head.twin.bias.is_meta


@pytest.mark.parametrize("odd", ["tensor", "listed", "parameter", "own"])
def test_outline_with_unregistered_tensors_is_not_allocated(odd):
    class Own(torch.nn.Module):
        pass

    bare = Builder(config("timm_vit", "linear")).outline()
    head: Any = bare.head
    if odd == "own":
        Own.__module__ = "of_a_user.parts"
        head.own = Own()
    else:
        first = next(bare.parameters())
        held = {"listed": {"x": [(first.data,)]}, "parameter": [first], "tensor": torch.empty(2, device="meta")}
        head.held = held[odd]
    assert not allocate(bare)
    assert all(part.is_meta for part in bare.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_an_outline_has_the_unused_parameters_of_the_model(name):
    cfg = config("timm_vit", "linear")
    cfg.backbone.name, cfg.backbone.patch_size = name, None
    assert Builder(cfg).outline().backbone.unused == Builder(cfg).model().backbone.unused


@pytest.mark.heavy
def test_resnet_with_weights_from_a_file_can_be_resumed(tmp_path):
    write_data(tmp_path / "data")
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    words = [word for word in SMALL if not word.startswith(("backbone", "adapter"))]
    words += ["backbone=timm", "backbone.name=test_resnet", "backbone.weights=weights.safetensors", "adapter=full"]
    train = ("mode=train", *words, "hydra.run.dir=run")
    for command in (train, ("mode=eval", "resume=run", "engine=cpu"), ("mode=train", "resume=run", "trainer.steps=3")):
        succeed(tmp_path, *command, "mode.metrics_only=true", "mode.report=false")
