"""A trained backbone as a file: LoRA merged into whole weights, quantised ones too."""

import pytest
import torch
from command_line import SMALL, call, succeed, write_data
from safetensors.torch import load_file

LORA = [word for word in SMALL if word != "adapter=full"]
QUIET = ("mode=train", "mode.metrics_only=true", "mode.report=false", "logger=[]")
RUN = (*QUIET, "hydra.run.dir=run", "trainer.val_every=2", "optim.optimizer.lr=0.05")


def train(where, *words):
    write_data(where / "data")
    succeed(where, *RUN, *LORA, *words)


def export(where, *words):
    return call(where, "mode=export", "resume=run", "engine=cpu", "hydra.run.dir=out", *words)


def test_merged_weights_are_the_base_and_its_update(tmp_path):
    train(tmp_path, "adapter=lora", "adapter.rank=2", "adapter.alpha=3")
    done = export(tmp_path)
    assert done.status == 1 and "holds LoRA updates" in done.err and "export.merge=true" in done.err
    done = export(tmp_path, "export.merge=true")
    assert done.status == 0, done.err
    exported = load_file(tmp_path / "out/backbone.safetensors")
    held = load_file(tmp_path / "run/checkpoints/best.safetensors")
    layer = "model/backbone.model.model.layer.1.attention.q_proj"
    update = held[f"{layer}.lora_B.default.weight"] @ held[f"{layer}.lora_A.default.weight"]
    assert update.abs().max() > 1e-4
    expected = held[f"{layer}.base_layer.weight"] + 1.5 * update
    found = [value for name, value in exported.items() if name.endswith("layer.1.attention.q_proj.weight")]
    torch.testing.assert_close(found[0], expected)
    assert not any("lora" in name for name in exported)


@pytest.mark.heavy
def test_export_without_final_norm_prints_the_keys_to_load_it(tmp_path):
    train(tmp_path, "backbone.final_norm=false")
    done = export(tmp_path)
    assert done.status == 0, done.err
    words = done.out.split("Use: ")[1].split()
    assert words[1:] == ["backbone.final_norm=false"]
    again = [*SMALL, *words, "mode.metrics_only=true", "hydra.run.dir=again"]
    succeed(tmp_path, "mode=train", *again)
    done = call(tmp_path, "mode=train", *SMALL, words[0], "init=run", "mode.metrics_only=true")
    assert done.status == 1 and "missing" in done.err
    done = call(tmp_path, "mode=train", *LORA, "init=run", "mode.metrics_only=true")
    assert done.status == 1 and "backbone.final_norm" in done.err


@pytest.mark.parametrize(
    "adapter", ["qlora", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("lora_8bit", "frozen"))]
)
def test_quantised_backbones_are_exported_whole(tmp_path, adapter):
    words = ["adapter.bits=4"] if adapter == "frozen" else ["adapter.rank=2"]
    train(tmp_path, f"adapter={adapter}", *words)
    done = export(tmp_path, "export.merge=true") if adapter != "frozen" else export(tmp_path)
    assert done.status == 0, done.err
    exported = load_file(tmp_path / "out/backbone.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.float32}
    assert not any("absmax" in name or "SCB" in name for name in exported)
    succeed(tmp_path, *QUIET, *SMALL, "backbone.weights=out/backbone.safetensors", "trainer.steps=1")
