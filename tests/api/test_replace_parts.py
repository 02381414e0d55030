"""Parts of a model that is in use: an assignment replaces the part that computes, or is refused."""

import copy
from functools import partial

import pytest
import torch
from mistakes import assert_refused
from torch import nn

import dinoseg
from dinoseg.core.contracts import Backbone
from dinoseg.utils.errors import UserError

IMAGES = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)


@pytest.fixture
def model():
    return dinoseg.create_model("tiny_surgical", head="mlp", num_classes=2).eval()


def test_assigning_a_part_of_a_model_is_refused(model, tmp_path):
    before = model(IMAGES)
    names = list(model.state_dict())
    for name in ("backbone", "head"):
        part = copy.deepcopy(getattr(model, name))
        assert_refused(partial(setattr, model, name, part), name, "create_model")
        with pytest.raises(AttributeError):
            setattr(model, name, None)
        setattr(model, name, getattr(model, name))
    for unread in ("norm", "blocks"):
        with pytest.raises(UserError, match=unread):
            setattr(model.backbone, unread, nn.ModuleList())
    assert list(model.state_dict()) == names
    model.save(tmp_path / "model.safetensors")
    for each in (model, dinoseg.load(tmp_path / "model.safetensors", device="cpu")):
        assert torch.equal(each(IMAGES), before)


def test_class_layer_is_replaced_by_one_of_the_same_size():
    model = dinoseg.create_model("rgb", head="linear", num_classes=3).eval()
    before = model(IMAGES)
    model.head.classify = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(model.head.classify.weight)  # drawn weights may equal those of the model
    assert not torch.equal(model(IMAGES), before)
    for outputs in (2, 7):
        model.head.classify = nn.Conv2d(3, outputs, 1)
        for use in (lambda: model(IMAGES), lambda: model.predict(IMAGES[0].permute(1, 2, 0).numpy())):
            assert_refused(use, f"LinearHead scores {outputs} classes, and the model has 3")


def test_a_backbone_of_ones_own_may_name_its_blocks():
    backbone = Backbone()
    for blocks in (nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList()):
        backbone.blocks = blocks
        assert backbone.blocks is blocks and backbone._modules["blocks"] is blocks


@pytest.mark.parametrize("added", [nn.Linear(2, 2), nn.Parameter(torch.zeros(2)), nn.BatchNorm2d(2).running_mean])
def test_tensors_added_to_a_model_are_refused(model, added, tmp_path):
    if isinstance(added, nn.Module | nn.Parameter):
        model.extra = added
    else:
        model.register_buffer("extra", added)
    for refused in (lambda: model.save(tmp_path / "model.safetensors"), model.trainable_parameters):
        assert assert_refused(refused, "was added").startswith("extra")
    del model.extra
    model.save(tmp_path / "model.safetensors")


def test_another_activation_is_neither_saved_nor_scored(model, tmp_path):
    file = tmp_path / "model.safetensors"
    model.save(file)
    loaded = dinoseg.load(file, device="cpu")
    for each in (model, loaded):
        each.head.layers[1] = nn.Tanh()
    assert_refused(lambda: model.save(file), "ReLU or Tanh, at head.layers.1")
    assert_refused(lambda: dinoseg.evaluate(loaded, data={"root": str(tmp_path)}, out_dir=tmp_path), "head.layers.1")
