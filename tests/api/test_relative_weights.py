"""Models whose backbone is in a file that was named by a relative path are loaded from any folder."""

import pytest
import torch
from command_line import call, write_data

import dinoseg

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a folder with weights/backbone.safetensors, which is the current one, and another folder."""
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "weights").mkdir(parents=True)
    model = dinoseg.create_model("tiny_surgical", num_classes=2)
    torch.save(model.backbone.export_state(), folder / "weights/backbone.pth")
    monkeypatch.chdir(folder)
    return folder, elsewhere


def test_a_delta_finds_its_backbone_from_another_folder(project, monkeypatch):
    folder, elsewhere = project
    model = dinoseg.create_model("tiny_surgical", num_classes=2, adapter="lora", weights="weights/backbone.pth").eval()
    model.save("out/delta.safetensors", delta=True, gated=True)
    monkeypatch.chdir(elsewhere)
    model.save("later.safetensors", delta=True, gated=True)
    for file in (folder / "out/delta.safetensors", elsewhere / "later.safetensors"):
        assert str(folder).encode() not in file.read_bytes()
        loaded = dinoseg.load(file, device="cpu")
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        loaded.save("again/delta.safetensors", delta=True, gated=True)
        assert torch.equal(dinoseg.load("again/delta.safetensors", device="cpu")(IMAGES), model(IMAGES))
    (folder / "weights").rename(elsewhere / "moved")
    with pytest.raises(dinoseg.UserError, match="weights/backbone.pth.*backbone=PATH"):
        dinoseg.load(folder / "out/delta.safetensors")
    moved = dinoseg.load(folder / "out/delta.safetensors", device="cpu", backbone="moved/backbone.pth")
    assert torch.equal(moved(IMAGES), model(IMAGES))


def test_a_run_finds_its_backbone_from_another_folder(project, monkeypatch):
    folder, elsewhere = project
    write_data(folder / "data")
    words = ("mode=train", "backbone=tiny_surgical", "backbone.weights=weights/backbone.pth", "data.root=data")
    words += ("data.classes=[dark,bright]", "data.batch_size=2", "resolution.crop=[32,48]", "trainer.steps=2")
    words += ("engine=cpu", "engine.workers=0", "mode.report=false", "mode.metrics_only=true")
    done = call(folder, *words, "hydra.run.dir=run")
    assert done.status == 0, done.err
    expected = dinoseg.load("run", device="cpu")(IMAGES)
    monkeypatch.chdir(elsewhere)
    assert torch.equal(dinoseg.load(folder / "run", device="cpu")(IMAGES), expected)
    again = call(folder, *words, "resume=auto", "hydra.run.dir=run")
    assert again.status == 0, again.err
    assert not (folder / "run_2").exists()
