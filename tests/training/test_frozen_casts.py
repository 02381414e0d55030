"""Frozen layers under autocast: their weights are cast once, and nothing else changes."""

import copy

import pytest
import torch
from small_trainings import segmenter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoseg.models.adapters import Frozen, Lora, merge
from dinoseg.training.checkpoint import frozen_fingerprint
from dinoseg.training.engine import Engine


class Casts(TorchDispatchMode):
    """Counts casts of a model's frozen parameters to half precision."""

    def __init__(self, model):
        super().__init__()
        self.frozen = {part.data_ptr() for part in model.parameters() if not part.requires_grad}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() in self.frozen
        return func(*args, **(kwargs or {}))


def half_trained(adapter):
    """Return a segmenter in training whose low-rank updates are not zero."""
    model = segmenter(adapter=lambda: adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.train()


def step(model):
    """Return outputs and gradients of a pass."""
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(images).scores()
    scores.float().square().mean().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return {"scores": scores.detach(), **gradients}


@pytest.mark.parametrize("adapter", [Frozen(), Lora(2, 4, targets="all_linear")])
def test_frozen_weights_are_cast_once_and_nothing_else_changes(adapter):
    model = half_trained(adapter)
    engine = Engine("cpu", "bf16")
    plain = copy.deepcopy(model)
    expected = step(plain)
    before = frozen_fingerprint(model)
    state = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model = engine.prepare(model)
    with Casts(plain) as casts:
        step(plain)
    assert casts.count > 20
    with Casts(model) as casts:
        first = step(model)
        once, casts.count = casts.count, 0
        again = step(model)
    assert 20 < once and casts.count == 0
    for found in (first, again):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert frozen_fingerprint(model) == before
    torch.testing.assert_close(dict(model.backbone.state_dict()), state, rtol=0, atol=0)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)  # outside autocast the float32 weights are read
    assert torch.equal(model.backbone(images.float())[0], plain.backbone(images.float())[0])


def test_changed_weights_or_dtype_are_cast_again():
    layer = nn.Linear(3, 2).requires_grad_(False)
    engine = Engine("cpu", "bf16")
    inputs = torch.randn(4, 3)
    model = engine.prepare(nn.Sequential(layer))
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(inputs)
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = layer(inputs)
            assert found.dtype == dtype and found.equal(nn.functional.linear(inputs, layer.weight, layer.bias))
    torch.testing.assert_close(found.float(), 2 * first.float(), rtol=0.02, atol=0.02)
    other = copy.deepcopy(model)[0]
    with torch.no_grad():
        other.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert other(inputs).equal(other.bias.bfloat16().expand(4, 2)) and not layer(inputs).equal(other(inputs))
    for value in (1.0, 2.0):  # also where its data is assigned
        layer.weight.data = torch.full((2, 3), value)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).equal(nn.functional.linear(inputs, layer.weight, layer.bias))
    layer.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_merged_lora_updates_are_cast_again():
    model = Engine("cpu", "bf16").prepare(half_trained(Lora(2, 4)))
    step(model)
    merge(model.backbone)
    plain = copy.deepcopy(model)
    for part in plain.modules():
        vars(part).pop("kept", None)
    assert step(model)["scores"].equal(step(plain)["scores"])


def test_training_follows_a_first_pass_in_inference_mode():
    model = Engine("cpu", "bf16").prepare(half_trained(Lora(2, 4)))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert len(step(model)) > 1


def test_trained_layers_and_float32_runs_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    Engine("cpu", "fp32").prepare(model)
    assert [type(part) for part in model] == [nn.Linear, nn.Linear]
    model = Engine("cpu", "bf16").prepare(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is not nn.Linear and isinstance(model[1], nn.Linear)
