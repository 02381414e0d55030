"""Parts of a model that is in use: an assignment replaces the part that computes, or is refused."""

import copy

import pytest
import torch
from torch import nn

import dinoseg
from dinoseg.core.contracts import Backbone
from dinoseg.utils.errors import UserError

IMAGES = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)


@pytest.fixture
def model():
    return dinoseg.create_model("tiny_surgical", head="mlp", num_classes=2).eval()


@pytest.mark.parametrize("name", ["head", "backbone"])
def test_assigning_a_part_of_a_model_is_refused(model, name, tmp_path):
    part = copy.deepcopy(getattr(model, name))
    before, names = model(IMAGES), list(model.state_dict())
    with pytest.raises(UserError, match=f"{name}.*create_model"):
        setattr(model, name, part)
    assert list(model.state_dict()) == names and torch.equal(model(IMAGES), before)
    with pytest.raises(AttributeError):
        setattr(model, name, None)
    setattr(model, name, getattr(model, name))
    assert list(model.state_dict()) == names
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(dinoseg.load(tmp_path / "model.safetensors", device="cpu")(IMAGES), before)


def test_assigning_a_norm_that_is_not_read_is_refused(model):
    names = list(model.state_dict())
    for name in ("norm", "blocks"):
        with pytest.raises(UserError, match=name):
            setattr(model.backbone, name, nn.ModuleList())
    assert list(model.state_dict()) == names


def test_modules_inside_a_part_are_replaced():
    model = dinoseg.create_model("tiny_surgical", head="linear", num_classes=2).eval()
    before, classify = model(IMAGES), model.head.classify
    model.head.classify = nn.Conv2d(classify.in_channels, classify.out_channels, 1)
    assert not torch.equal(model(IMAGES), before)


def test_class_layer_of_another_size_is_refused_by_both_numbers():
    model = dinoseg.create_model("rgb", head="linear", num_classes=3).eval()
    for outputs in (2, 7):
        model.head.classify = nn.Conv2d(3, outputs, 1)
        for use in (model, lambda images: model.predict(images[0].permute(1, 2, 0).numpy())):
            with pytest.raises(UserError, match=f"LinearHead scores {outputs} classes, and the model has 3"):
                use(IMAGES)


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
        with pytest.raises(UserError, match="^extra.* was added"):
            refused()
    del model.extra
    model.save(tmp_path / "model.safetensors")


def test_another_activation_is_not_saved(model, tmp_path):
    model.head.layers[1] = nn.Tanh()
    with pytest.raises(UserError, match=r"ReLU or Tanh, at head\.layers\.1"):
        model.save(tmp_path / "model.safetensors")


def test_scores_of_another_activation_are_refused(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    loaded = dinoseg.load(tmp_path / "model.safetensors", device="cpu")
    loaded.head.layers[1] = nn.Tanh()
    with pytest.raises(UserError, match=r"head\.layers\.1"):
        dinoseg.evaluate(loaded, data={"root": str(tmp_path)}, out_dir=tmp_path / "run")
