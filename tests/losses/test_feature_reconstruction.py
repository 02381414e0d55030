import itertools
from dataclasses import replace

import pytest
import torch

from dinoseg.config.nodes import instantiate
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction, SlotOutputs
from dinoseg.losses.feature_reconstruction import FeatureReconstruction
from dinoseg.utils.errors import UserError


def outputs_of(steps, clips=2, length=5, channels=3, grid=(2, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    frames = length - max(steps)
    features = torch.randn(clips, length, channels, *grid, generator=generator, dtype=torch.float64)
    told = [torch.randn(clips, frames, channels, *grid, generator=generator, dtype=torch.float64) for _ in steps]
    masks = torch.full((clips, frames, 3, *grid), 1 / 3)
    return SlotOutputs(
        features=features.to(dtype).requires_grad_(),
        reconstructions=[one.to(dtype).requires_grad_() for one in told],
        alphas=[masks] * len(steps),
        attention=masks,
        slots=torch.zeros(clips, frames, 3, 7),
        steps=list(steps),
    )


def run(outputs, loss=None):
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 8, 8), 255, dtype=torch.uint8), ["a", "b"])
    return (loss or FeatureReconstruction())(Prediction(outputs, (8, 8), (1.0, 1.0), upsample), batch)


def reference(outputs):
    """Average squared differences one by one, an offset after the other."""
    errors = {}
    for step, told in zip(outputs.steps, outputs.reconstructions, strict=True):
        total, count = 0.0, 0
        for b, t, c, y, x in itertools.product(*(range(length) for length in told.shape)):
            total += (told[b, t, c, y, x].item() - outputs.features[b, t + step, c, y, x].item()) ** 2
            count += 1
        errors[step] = total / count
    return errors


@pytest.mark.parametrize("steps", [[0], [1], [2], [0, 1], [2, 0, 1]])
@pytest.mark.parametrize("grid", [(2, 4), (1, 1), (1, 5), (3, 1)])
def test_value_and_parts_against_plain_loops(steps, grid):
    outputs = outputs_of(steps, grid=grid)
    value, parts = run(outputs)
    expected = reference(outputs)
    assert value.item() == pytest.approx(sum(expected.values()) / len(steps), rel=1e-12)
    assert list(parts) == ["weight", *(f"step_{step}" for step in steps)]
    for step, error in expected.items():
        assert parts[f"step_{step}"].item() == pytest.approx(error, rel=1e-12)
        assert not parts[f"step_{step}"].requires_grad
    assert parts["weight"] == 2 * (5 - max(steps))


def test_images_are_clips_of_one_frame():
    outputs = outputs_of([0], clips=3, length=1)
    value, parts = run(outputs)
    assert value.item() == pytest.approx(reference(outputs)[0], rel=1e-12) and parts["weight"] == 3


def test_only_predicted_features_get_a_gradient():
    outputs = outputs_of([0, 2])
    run(outputs)[0].backward()
    assert outputs.features.grad is None
    for step, told in zip(outputs.steps, outputs.reconstructions, strict=True):
        seen = outputs.features[:, step : step + 3].detach()
        torch.testing.assert_close(told.grad, 2 * (told.detach() - seen) / told.numel() / 2, rtol=1e-12, atol=0)


def test_batches_of_unequal_size_add_up_to_one():
    whole = outputs_of([0, 1], clips=4)

    def part(clips):
        told = [one[clips] for one in whole.reconstructions]
        return replace(whole, features=whole.features[clips], reconstructions=told, slots=whole.slots[clips])

    total, weights = 0.0, 0.0
    for clips in (slice(0, 1), slice(1, 4)):
        value, parts = run(part(clips))
        total, weights = total + value * parts["weight"], weights + parts["weight"]
    torch.testing.assert_close(total / weights, run(whole)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(dtype):
    outputs = outputs_of([0, 1], clips=1, dtype=dtype)
    with torch.no_grad():
        outputs.reconstructions[0] *= 300  # squares beyond what float16 holds
    value, parts = run(outputs)
    value.backward()
    assert value.dtype == parts["step_1"].dtype == torch.float32
    expected = reference(outputs)
    assert expected[0] > 65504 and parts["step_0"].item() == pytest.approx(expected[0], rel=1e-5)
    assert parts["step_1"].item() == pytest.approx(expected[1], rel=1e-5)
    assert all(bool(told.grad.isfinite().all()) for told in outputs.reconstructions)


def test_other_heads_are_refused():
    assert FeatureReconstruction.needs_slots
    with pytest.raises(UserError, match=r"^feature_reconstruction, .* need the outputs of a slot head.* cross_entropy"):
        run(torch.zeros(2, 3, 4, 4))


def test_command_line_option_builds_the_loss(compose):
    cfg = compose("loss=feature_reconstruction", "data.root=.", "data.classes=[a,b]")
    assert cfg.loss.weights == "none" and cfg.loss.class_weights is None and cfg.loss.counts is None
    assert type(instantiate(cfg.loss.criterion)()) is FeatureReconstruction
