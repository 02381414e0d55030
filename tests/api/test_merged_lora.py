"""Models whose LoRA updates were merged, scaled or switched off by peft: a file of them would give other logits."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import dinoseg
from dinoseg.utils.errors import UserError

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def layers(model):
    return [part for part in model.modules() if isinstance(part, BaseTunerLayer)]


CHANGES = {
    "merged": (lambda layer: layer.merge(), lambda layer: layer.unmerge()),
    "scaled": (lambda layer: layer.scale_layer(2), lambda layer: layer.unscale_layer()),
    "no adapter": (lambda layer: layer.set_adapter([]), lambda layer: layer.set_adapter("default")),
    "off": (lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("delta", [False, True])
def test_peft_layers_that_are_merged_or_off_are_not_saved(change, delta, tmp_path):
    model = dinoseg.create_model("tiny_surgical", adapter="lora", num_classes=2).eval()
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["default"].weight.normal_(std=0.1)
    apply, undo = CHANGES[change]
    file, before = tmp_path / "model.safetensors", model(IMAGES)
    for layer in layers(model):
        apply(layer)
    adapter = tmp_path / "adapter"
    for refused in (lambda: model.save(file, delta=delta), lambda: model.save_adapter(adapter), model.merge):
        with pytest.raises(UserError, match="peft.*unmerge.*enable_adapters"):
            refused()
    assert not file.exists() and not adapter.exists()
    for layer in layers(model):
        undo(layer)
    if (
        change != "merged" or not delta
    ):  # a merge and its reverse round, and a delta needs the very weights of its source
        model.save(file, delta=delta)
        assert torch.allclose(dinoseg.load(file, device="cpu")(IMAGES), before, atol=1e-4)
