"""Models whose weights were changed in memory are scored with these weights, not with those of their file."""

import shutil
from dataclasses import replace

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


@pytest.fixture
def model_file(tmp_path):
    """Return the file of a model with scores."""
    model = dinoseg.create_model("rgb", head="mlp", classes=["dark", "bright"])
    model.facts = replace(model.facts, scores={"split": "val", "values": {"miou": 0.5}, "per_class": {}})
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def overwrite(model, file):
    dinoseg.create_model("rgb", head="mlp", classes=["dark", "bright"], seed=1).save(file)


def delete(model, file):
    file.unlink()


@torch.no_grad()
def change_one_value(model, file):
    """Change a value that a sample of every 20th or so leaves out."""
    weights = max(model.head.parameters(), key=torch.Tensor.numel)
    assert weights.numel() > 2048
    weights.view(-1)[1] += 1


def change_colours(model, file):
    model.backbone.mean.add_(0.1)


@pytest.mark.parametrize("change", [overwrite, delete, change_one_value, change_colours])
def test_modes_read_a_copy_of_a_changed_model_or_file(model_file, change):
    model = dinoseg.load(model_file, device="cpu")
    with model.stored() as path:
        assert path == model_file
    change(model, model_file)
    with model.stored() as path:
        assert path != model_file
        again = dinoseg.load(path, device="cpu")
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("change", [change_one_value, change_colours])
def test_scores_of_other_weights_are_not_saved(model_file, change, tmp_path):
    model, file = dinoseg.load(model_file, device="cpu"), tmp_path / "new.safetensors"
    model.save(file)
    assert dinoseg.load(file, device="cpu").facts.scores is not None
    change(model, model_file)
    model.save(file)
    assert dinoseg.load(file, device="cpu").facts.scores is None


def test_loaded_model_is_unchanged_by_a_new_best_checkpoint(run, tmp_path):
    folder, file = shutil.copytree(run.folder, tmp_path / "run"), tmp_path / "new.safetensors"
    best, last = (folder / f"checkpoints/{name}.safetensors" for name in ("best", "last"))
    model, images = dinoseg.load(folder, device="cpu"), torch.ones(1, 3, 8, 8)
    model.save(file)
    assert dinoseg.load(file, device="cpu").facts.scores is not None
    best.rename(tmp_path / "best")
    of_last = dinoseg.load(folder, device="cpu")
    with of_last.stored() as path:
        assert path == folder
    shutil.copy(tmp_path / "best", best)
    for each in (model, of_last):
        with each.stored() as path:
            assert path != folder and torch.equal(dinoseg.load(path, device="cpu")(images), each(images))
    shutil.copy(last, best)
    model.save(file)
    assert dinoseg.load(file, device="cpu").facts.scores is None
