"""What of a training applies to all later uses of its model: an explicit float32, and statistics of its weights."""

import shlex
from functools import cache

import pytest
import torch
from command_line import SMALL, TINY_KEYS, call, write_data
from finished_runs import train_run
from mistakes import assert_refused
from portable_parts import TINY, export_file, write_untrained

import dinoseg
from dinoseg.api.results import read_json
from dinoseg.checkpoints.resume import compose_resumed, standalone_config
from dinoseg.checkpoints.source import ModelSource
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.export.backbone import _settings
from dinoseg.models.backbones.normalisation import SATELLITE
from dinoseg.segmenter.write import export_model, source_of
from dinoseg.training import checkpoint

QUICK = ("mode.metrics_only=true", "mode.report=false")


@pytest.fixture(scope="module")
def untrained(compose, tmp_path_factory):
    """Return a function that writes the checkpoint of a model with a precision, once."""

    @cache
    def write(precision):
        folder = tmp_path_factory.mktemp(precision)
        return write_untrained(compose, folder, *TINY, "head=linear", f"engine.precision={precision}")

    return write


@pytest.mark.parametrize(
    ("mode", "stored", "typed", "expected"),
    [
        ("eval", "fp32", [], "fp32"),
        ("train", "fp32", [], "fp32"),
        ("eval", "fp32", ["engine.precision=bf16"], "bf16"),
        ("train", "fp32", ["engine.precision=auto"], "auto"),
        ("eval", "fp32", ["~engine.precision"], "fp32"),  # a machine's engine may lack it
        ("train", "auto", [], "auto"),
        ("eval", "auto", ["engine.precision=bf16"], "bf16"),
    ],
)
def test_typed_precision_counts_before_the_stored_one(compose, untrained, mode, stored, typed, expected):
    path = untrained(stored)
    info = checkpoint.describe(path)
    assert info.get("precision") == (stored if stored == "fp32" else None)
    words = [f"mode={mode}", "data=folder", "data.root=x", "data.classes=[dark,bright]", *typed]
    assert compose_resumed(compose(*words), words, path, info).engine.precision == expected


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_loaded_or_exported_model_has_the_precision_of_training(untrained, tmp_path, precision):
    path = untrained(precision)
    expected = "fp32" if precision == "fp32" else "auto"
    whole = export_file(path, tmp_path / "out")
    dinoseg.load(whole, device="cpu").save(tmp_path / "again.safetensors")
    for file in (path, whole, tmp_path / "again.safetensors"):
        assert dinoseg.load(file, device="cpu")._precision == expected
    assert dinoseg.load(path, device="cpu", precision="bf16")._precision == "bf16"


def test_a_typed_precision_of_an_export_counts(untrained, tmp_path):
    path = untrained("fp32")
    for number, (typed, stored) in enumerate({"bf16": None, "auto": None, "fp32": "fp32"}.items()):
        cfg = standalone_config(path, checkpoint.describe(path), {"engine.device": "cpu", "engine.precision": typed})
        export_model(ModelSource(cfg), out_dir=(folder := tmp_path / str(number)))
        assert checkpoint.describe(folder / "model.safetensors").get("precision") == stored


def test_another_stored_precision_is_refused(compose, tmp_path):
    path = write_untrained(compose, tmp_path, *TINY, "head=linear", precision="fp8")
    assert_refused(lambda: dinoseg.load(path), "precision is 'fp8'; it must be fp32")


def mean_of(model):
    return pytest.approx(model.backbone.mean.flatten().tolist())


@pytest.fixture
def satellite_weights(tmp_path):
    """Write a backbone to a file with a name of satellite weights."""
    model = dinoseg.create_model("tiny", num_classes=2, **TINY_KEYS)
    torch.save(model.backbone.export_state(), tmp_path / "tiny_sat493m.pth")
    return tmp_path / "tiny_sat493m.pth"


def test_a_saved_model_has_the_statistics_of_its_weights(satellite_weights, tmp_path):
    model = dinoseg.create_model("tiny", num_classes=2, weights=satellite_weights, **TINY_KEYS)
    model.save(tmp_path / "model.safetensors")
    satellite_weights.unlink()
    for each in (model, dinoseg.load(tmp_path / "model.safetensors", device="cpu")):
        assert mean_of(each) == list(SATELLITE[0])


@pytest.mark.heavy
def test_renamed_file_of_weights_changes_no_statistics(satellite_weights, tmp_path, monkeypatch, compose):
    """Statistics of satellite weights follow a model into its checkpoints and files."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    words = ["mode=train", *SMALL, "adapter=frozen", f"backbone.weights={satellite_weights}", *QUICK]
    trained = train_run(tmp_path, "run", *words)[1]
    assert "satellite images" in trained.err + trained.out
    exported = call(tmp_path, "mode=export", "resume=run", "hydra.run.dir=again")
    use = shlex.split(exported.out.split("Use: ")[1].splitlines()[0])
    assert "backbone.mean=[0.43,0.411,0.296]" in use and "backbone.std=[0.213,0.156,0.143]" in use
    assert mean_of(Builder(compose(*SMALL, *use)).model()) == list(SATELLITE[0])
    moved = str(satellite_weights.rename(tmp_path / "renamed.pth"))
    assert call(tmp_path, "mode=eval", "resume=run", f"backbone.weights={moved}", "hydra.run.dir=scores").status == 0
    first, second = (read_json(tmp_path / name / "scores.json") for name in ("run/evaluation", "scores"))
    assert second["miou"] == pytest.approx(first["miou"], abs=1e-9)
    model = dinoseg.load("run", backbone=moved)
    model.save("model.safetensors")
    for each in (model, dinoseg.load("model.safetensors")):
        assert mean_of(each) == list(SATELLITE[0])
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 32, 48))).all()


def test_overrides_for_resampled_patches_are_printed():
    arch = {"image_size": 518}
    words = _settings({"patch_size": 16, "weights_patch_size": 14, "arch": arch, "mean": None, "final_norm": False})
    assert " ".join(words) == (
        "backbone.final_norm=false backbone.patch_size=16 backbone.weights_patch_size=null backbone.arch.image_size=592"
    )
    assert list(_settings({"patch_size": 14, "weights_patch_size": None, "arch": arch})) == []


@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("surgenet_dinov3_vitb16", "DINOv3_ViTb16_size336_SurgeNetXL.pth"),
        ("dino_vits16", "DINOv1_ViTs16_size224_SurgeNetXL.pth"),
    ],
)
def test_surgenet_weights_have_their_licence(option, file):
    config = {"backbone": {"weights": f"/weights/{file}", "family": "dinov3_vit"}, "choices": {"backbone": option}}
    found = source_of(config, "0" * 64)
    assert found["licence"] == "CC BY-NC-SA 4.0" and found["gated"]
