"""A quantised model is exported with the weights that it was trained with, and compared as it was trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import write_data
from portable_parts import TINY, export_file, untrained_config, write_untrained

import dinoseg
from dinoseg.checkpoints.source import ModelSource
from dinoseg.checkpoints.trained import load_trained
from dinoseg.core.channels import PixelFormat
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.export.export import REPORT, prepare_model, store_if_verified
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.models.model import quantised_names
from dinoseg.utils.errors import UserError


@torch.inference_mode()
def scores_of(model, path):
    return model(torch.from_numpy(PixelFormat(3, order=range(3)).read(path).copy()).permute(2, 0, 1)[None]).scores()


@pytest.mark.parametrize(
    ("key", "adapter"),
    [pytest.param("adapter.bits=4", "qlora", marks=pytest.mark.heavy), ("backbone.dtype=bfloat16", "lora")],
)
def test_file_and_gate_compare_with_the_trained_model(compose, tmp_path, key, adapter):
    write_data(tmp_path / "data")
    cfg = untrained_config(compose, tmp_path, f"adapter={adapter}", "adapter.rank=2", key)
    trained = load_trained(Builder(cfg)).model
    with prepare_model(ModelSource(cfg), tmp_path, GraphOptions()) as ready:
        picture = ready.pictures[0].path
        expected = scores_of(trained, picture)
        assert torch.equal(scores_of(ready.reference.segmenter, picture), expected)
        assert 0 < (scores_of(ready.model, picture) - expected).norm() < 5e-3 * expected.norm()
        assert not quantised_names(ready.model)
        assert {value.dtype for value in ready.model.parameters()} == {torch.float32}

        wrong = SimpleNamespace(  # of a file that has the other class everywhere
            ids=lambda images: 1 - ready.reference.ids(images), probabilities=ready.reference.probabilities
        )
        (tmp_path / "model.onnx").touch()
        with pytest.raises(UserError, match=f"The model computes in {key}, the file in float32.*min_agreement"):
            store_if_verified(ready, wrong, [tmp_path / "model.onnx"], tmp_path, GraphOptions())
    report = json.loads((tmp_path / REPORT).read_text(encoding="utf-8"))
    assert report["agreement"] == 0 and report["trained_with"] == key and not report["proven"]
    file = export_file(Path(cfg.resume), tmp_path / "out")
    model = dinoseg.load(file, precision="fp32").runtime.predictor.model
    image = tmp_path / "data/val/images/0.png"
    expected = scores_of(trained, image)
    assert (scores_of(model, image) - expected).norm() < 5e-3 * expected.norm()


@torch.no_grad()
def test_saving_quantised_weights_states_the_change(compose, tmp_path, caplog):
    """Only the whole file computes in float32; with `delta`, loading quantises again."""
    path = write_untrained(compose, tmp_path, *TINY, "head=linear", "adapter=frozen", "adapter.bits=8")
    model = dinoseg.load(path, device="cpu", precision="fp32")
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    model.save(tmp_path / "delta.safetensors", delta=True)
    assert not caplog.records
    again = dinoseg.load(tmp_path / "delta.safetensors", device="cpu", precision="fp32")
    assert torch.equal(again(images), expected)
    model.save(tmp_path / "whole.safetensors")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "adapter.bits=8: whole.safetensors" in line and "delta=True" in line
    whole = dinoseg.load(tmp_path / "whole.safetensors", device="cpu", precision="fp32")
    assert (whole.facts.dequantised, model.facts.dequantised) == (8, None)
    assert 0 < (whole(images) - expected).norm() < 5e-3 * expected.norm()
    caplog.clear()
    whole.save(tmp_path / "again.safetensors")
    assert not caplog.records and dinoseg.load(tmp_path / "again.safetensors").facts.dequantised == 8
