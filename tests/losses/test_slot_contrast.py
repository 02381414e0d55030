import math

import pytest
import torch

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction, SlotOutputs
from dinoseg.losses.slot_contrast import SlotContrast
from dinoseg.utils.errors import UserError


def outputs_of(slots, **more):
    masks = torch.full((*slots.shape[:3], 1, 2), 1 / slots.shape[2])
    features = torch.zeros(*slots.shape[:2], 3, 1, 2)
    return SlotOutputs(features, [features], [masks], masks, slots, steps=[0], **more)


def run(outputs, **options):
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 8, 8), 255, dtype=torch.uint8), ["a", "b"])
    return SlotContrast(**options)(Prediction(outputs, (8, 8), (1.0, 1.0), upsample), batch)


def reference(slots, temperature):
    """Average over pairs of frames, clips and slots, one after the other."""
    clips, frames, count, _ = slots.shape
    values = []
    for t in range(frames - 1):
        following = [slots[clip, t + 1, slot].tolist() for clip in range(clips) for slot in range(count)]
        for clip in range(clips):
            for slot in range(count):
                here = slots[clip, t, slot].tolist()
                scores = [cosine(here, there) / temperature for there in following]
                values.append(math.log(sum(map(math.exp, scores))) - scores[clip * count + slot])
    return sum(values) / len(values)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 2, 4, 3), (3, 3, 1, 2), (1, 2, 1, 1)])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_value_against_plain_loops(shape, temperature):
    slots = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    value, parts = run(outputs_of(slots), temperature=temperature)
    assert value.item() == pytest.approx(reference(slots, temperature), rel=1e-12, abs=1e-14)
    assert parts["weight"] == shape[0] * (shape[1] - 1)


def test_constant_slots_cost_least_and_swapped_slots_most():
    same = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4).clone()
    exchanged = same.clone()
    exchanged[0, 1] = same[0, 1, [1, 0, 3, 2]]
    assert run(outputs_of(same))[0] == pytest.approx(math.log(1 + 3 * math.exp(-10)))
    assert run(outputs_of(exchanged))[0] == pytest.approx(10 + math.log(1 + 3 * math.exp(-10)))


def test_gradients_reach_both_frames_and_zero_slots_are_safe():
    slots = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    slots[0, 1, 2] = 0
    slots.requires_grad_()
    run(outputs_of(slots))[0].backward()
    assert slots.grad.isfinite().all() and slots.grad[:, 0].any() and slots.grad[:, -1].any()


def test_independent_slots_are_not_compared():
    slots = (-torch.rand(2, 3, 4, 5)).requires_grad_()
    value, _ = run(outputs_of(slots, carried=False))
    value.backward()
    assert str(value.item()) == "0.0" and not slots.grad.any()


def test_single_frames_are_refused():
    with pytest.raises(UserError, match="only one frame of each clip has slots. Give clips of 2 frames or more"):
        run(outputs_of(torch.zeros(1, 1, 2, 3)))
