"""Models whose weights were changed in memory are scored with these weights, not with those of their file."""

import pytest
import torch
from command_line import SMALL, call, write_data
from torch import nn

import dinoseg

QUICK = {"mode": {"metrics_only": True, "report": False}, "engine": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data")
    done = call(folder, "mode=train", *SMALL, "head=cnn", "head.channels=16", f"data.root={folder}/data")
    assert done.status == 0, done.err
    return dinoseg.Run(next(folder.glob("outputs/*/train_*")))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def noise_like(value):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def of_the_head(model):
    for value in model.head.parameters():
        value.copy_(noise_like(value))


@torch.no_grad()
def of_a_frozen_backbone(model):
    for value in model.backbone.requires_grad_(False).parameters():
        value.copy_(noise_like(value))


def of_batch_norm(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(noise_like(module.running_mean))


@pytest.mark.parametrize("change", [of_the_head, of_a_frozen_backbone, of_batch_norm])
def test_changed_weights_are_scored_as_their_saved_file(run, change, tmp_path):
    model, file = run.load_model(device="cpu"), tmp_path / "changed.safetensors"
    data = {"root": run.config["data"]["root"]}
    before = dinoseg.evaluate(model, **QUICK)
    change(model)
    model.save(file)
    of_model, of_file = (dinoseg.evaluate(each, data=data, **QUICK) for each in (model, file))
    assert before["miou"] == run.scores["miou"] != of_model["miou"]
    assert of_model.to_dict() == of_file.to_dict()
    assert not dinoseg.load(file, device="cpu").facts.scores
