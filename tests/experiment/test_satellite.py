"""The statistics of satellite weights follow a model into its checkpoints and files, whatever the weights' file is."""

import json
import shlex

import pytest
import torch
from command_line import SMALL, call, write_data

import dinoseg
from dinoseg.export.backbone import _settings
from dinoseg.export.runtime.write import source_of
from dinoseg.models.backbones.normalisation import SATELLITE

MEAN = list(SATELLITE[0])


def mean_of(model):
    return model.backbone.mean.flatten().tolist()


@pytest.mark.slow
def test_a_renamed_file_of_weights_changes_nothing(tmp_path):
    write_data(tmp_path / "data")
    assert call(tmp_path, "mode=train", *SMALL, "hydra.run.dir=first").status == 0
    exported = call(tmp_path, "mode=export", "resume=first", "hydra.run.dir=weights")
    assert exported.status == 0 and "mean" not in exported.out
    (tmp_path / "weights/backbone.safetensors").rename(tmp_path / "tiny_sat493m.safetensors")
    words = ["mode=train", *SMALL, "adapter=frozen", f"backbone.weights={tmp_path / 'tiny_sat493m.safetensors'}"]
    trained = call(tmp_path, *words, "hydra.run.dir=run")
    assert trained.status == 0 and "satellite images" in trained.err + trained.out
    exported = call(tmp_path, "mode=export", "resume=run", "hydra.run.dir=again")
    use = shlex.split(exported.out.split("Use: ")[1].splitlines()[0])
    assert "backbone.mean=[0.43,0.411,0.296]" in use and "backbone.std=[0.213,0.156,0.143]" in use
    other = call(tmp_path, "mode=train", *SMALL, *use, "adapter=frozen", "hydra.run.dir=other")
    assert other.status == 0, other.err
    assert mean_of(dinoseg.load(tmp_path / "other")) == pytest.approx(MEAN)
    (tmp_path / "tiny_sat493m.safetensors").rename(tmp_path / "renamed.safetensors")
    moved = f"backbone.weights={tmp_path / 'renamed.safetensors'}"
    assert call(tmp_path, "mode=eval", "resume=run", moved, "hydra.run.dir=scores").status == 0
    first, second = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("run/evaluation", "scores"))
    assert second["miou"] == pytest.approx(first["miou"], abs=1e-9)
    model = dinoseg.load(tmp_path / "run", backbone=str(tmp_path / "renamed.safetensors"))
    assert mean_of(model) == pytest.approx(MEAN)
    model.save(tmp_path / "model.safetensors")
    assert mean_of(dinoseg.load(tmp_path / "model.safetensors")) == pytest.approx(MEAN)
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 32, 48))).all()


def test_overrides_for_resampled_patches_are_printed():
    arch = {"image_size": 518}
    words = _settings({"patch_size": 16, "weights_patch_size": 14, "arch": arch, "mean": None, "final_norm": False})
    assert " ".join(words) == (
        "backbone.final_norm=false backbone.patch_size=16 backbone.weights_patch_size=null backbone.arch.image_size=592"
    )
    assert list(_settings({"patch_size": 14, "weights_patch_size": None, "arch": arch})) == []


@pytest.mark.parametrize(
    ("option", "weights"),
    [
        ("surgenet_dinov3_vitb16", "/weights/DINOv3_ViTb16_size336_SurgeNetXL.pth"),
        ("dino_vits16", "/weights/DINOv1_ViTs16_size224_SurgeNetXL.pth"),
    ],
)
def test_surgenet_weights_have_their_licence(option, weights):
    config = {"backbone": {"weights": weights, "family": "dinov3_vit"}, "choices": {"backbone": option}}
    found = source_of(config, "0" * 64)
    assert found["licence"] == "CC BY-NC-SA 4.0" and found["gated"]
