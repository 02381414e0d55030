"""New models that start from the weights of a saved one."""

import logging

import pytest
import torch

import dinoseg
from dinoseg.utils.errors import UserError

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
KINDS = {
    "frozen": {"adapter": "frozen", "head": "linear"},
    "lora": {"adapter": "lora", "head": "mlp"},
    "full": {"adapter": "full", "head": "linear"},
}


def create(kind, **options):
    return dinoseg.create_model("tiny_surgical", **KINDS[kind], **options).eval()


PARAMS = [pytest.param(kind, marks=() if kind == "lora" else pytest.mark.heavy) for kind in KINDS]


@pytest.fixture(params=PARAMS)
def saved_model(request, tmp_path):
    """Return the name of a kind of model, a model whose trained weights are noise, and its file."""
    model = create(request.param, num_classes=3)
    file = tmp_path / "model.safetensors"
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    model.save(file)
    return request.param, model, file


def test_a_model_starts_from_one_of_any_number_of_classes(saved_model, caplog, tmp_path):
    kind, model, file = saved_model
    new = create(kind, num_classes=3, init=file)
    assert torch.equal(new(IMAGES), model(IMAGES)) and not torch.equal(create(kind, num_classes=3)(IMAGES), new(IMAGES))
    new.train()(IMAGES).sum().backward()
    assert len(new.trainable_parameters()) and new.facts.scores is None
    with caplog.at_level(logging.WARNING):
        new = create(kind, num_classes=5, init=str(file))
    state = new.state_dict()
    theirs = model.state_dict()
    anew = [name for name, value in state.items() if value.shape != theirs[name].shape]
    assert anew and all(name.startswith("model.head.") for name in anew)  # the class layer
    assert all(torch.equal(state[name], theirs[name]) for name in state if name not in anew)
    assert "loaded" in caplog.text and sorted(anew)[0].removeprefix("model.") in caplog.text
    new.save(tmp_path / "new.safetensors")
    assert torch.equal(dinoseg.load(tmp_path / "new.safetensors", device="cpu")(IMAGES), new(IMAGES))


def test_other_names_of_classes_are_logged(caplog, tmp_path):
    create("frozen", num_classes=2).save(tmp_path / "model.safetensors")
    create("frozen", num_classes=2, init=tmp_path / "model.safetensors")
    assert "its classes are" not in caplog.text
    create("frozen", classes=["soil", "leaf"], init=tmp_path / "model.safetensors")
    assert "its classes are class_0, class_1" in caplog.text


def test_arguments_with_effect_are_accepted():
    options = {"seed": 3, "hparam": "base", "resolution": {"scale": 0.5}, "inference": "whole", "head.lr": 0.1}
    options |= {"optim": {"optimizer": {"lr": 0.5, "layer_decay": 0.9}}, "data": {"ignore_index": 9}}
    model = dinoseg.create_model("tiny_surgical", adapter="full", num_classes=2, **options)
    assert model.ignore_index == 9 and max(group["lr"] for group in model.trainable_parameters()) == 0.5


@pytest.mark.parametrize("changed", [{"alpha": 4}, pytest.param({"rslora": True}, marks=pytest.mark.heavy)])
def test_lora_updates_of_another_scale_are_refused(changed, tmp_path):
    file = tmp_path / "model.safetensors"

    def lora(changes, **options):
        adapter = {"name": "lora", "rank": 8, **changes}
        return dinoseg.create_model("tiny_surgical", adapter=adapter, num_classes=2, **options).eval()

    for saved, new in ((changed, {}), ({}, changed)):
        model = lora(saved)
        model.save(file)
        with pytest.raises(UserError, match="^init=.*LoRA updates.*(alpha|rslora)"):
            lora(new, init=file)
    assert torch.equal(lora({"alpha": 8}, init=file)(IMAGES), model(IMAGES))
