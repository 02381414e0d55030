"""Losses of slots against loops over clips, frames and cells, written from their definitions."""

import itertools
import math

import pytest
import torch
from config_files import options, read_whole
from mistakes import assert_refused
from slot_outputs import compare, outputs_of, reconstruct, run
from tiny_parts import load_option

from dinoseg.config.nodes import instantiate
from dinoseg.extensions.slots.losses.slot_contrast import SlotContrast
from dinoseg.extensions.slots.losses.temporal_similarity import TemporalSimilarity, similarity_targets
from dinoseg.extensions.slots.testing import SlotLossCase
from dinoseg.losses.overlap import Dice
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.testing import check_loss


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def reconstruction_errors(outputs):
    """Average squared differences one by one, an offset after the other."""
    errors = {}
    for step, predicted in zip(outputs.steps, outputs.reconstructions, strict=True):
        total, count = 0.0, 0
        for b, t, c, y, x in itertools.product(*(range(length) for length in predicted.shape)):
            total += (predicted[b, t, c, y, x].item() - outputs.features[b, t + step, c, y, x].item()) ** 2
            count += 1
        errors[step] = total / count
    return errors


@pytest.mark.parametrize(
    ("steps", "grid"), [([0], (1, 5)), ([1], (3, 1)), ([2], (2, 4)), ([0, 1], (1, 1)), ([2, 0, 1], (2, 4))]
)
def test_reconstruction_equals_plain_loops(steps, grid):
    outputs = outputs_of(steps, grid=grid)
    value, parts = reconstruct(outputs)
    expected = reconstruction_errors(outputs)
    assert value.item() == pytest.approx(sum(expected.values()) / len(steps), rel=1e-12)
    assert list(parts) == ["weight", *(f"step_{step}" for step in steps)]
    for step, error in expected.items():
        assert parts[f"step_{step}"].item() == pytest.approx(error, rel=1e-12)
        assert not parts[f"step_{step}"].requires_grad
    assert parts["weight"] == 2 * (4 - max(steps))


def test_only_predicted_features_get_a_gradient():
    outputs = outputs_of([0, 2], length=5)
    reconstruct(outputs)[0].backward()
    assert outputs.features.grad is None
    assert all(predicted.grad.any() for predicted in outputs.reconstructions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype):
    outputs = outputs_of([0, 1], clips=1, channels=40, dtype=dtype)
    with torch.no_grad():
        outputs.reconstructions[0] *= 300  # squares beyond what float16 holds
    value, parts = reconstruct(outputs)
    value.backward()
    assert value.dtype == parts["step_1"].dtype == torch.float32
    expected = reconstruction_errors(outputs)
    assert expected[0] > 65504 and parts["step_0"].item() == pytest.approx(expected[0], rel=1e-5)
    assert parts["step_1"].item() == pytest.approx(expected[1], rel=1e-5)
    assert all(bool(predicted.grad.isfinite().all()) for predicted in outputs.reconstructions)
    value, parts = compare(outputs)
    value.backward()
    assert value.dtype == parts["weight"].dtype == torch.float32
    assert value.item() == pytest.approx(similarity_loss(outputs)[0], rel=1e-5)
    assert outputs.similarity.grad.dtype == dtype and bool(outputs.similarity.grad.isfinite().all())


def similarity_loss(outputs, temperature=0.075, threshold=0.0):
    """Return value and frames, a cell of a frame of a clip after the other."""
    _, length, _, height, width = outputs.features.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    frames = [t for t in range(outputs.similarity.shape[1]) if t + 1 < length]
    total, count = 0.0, 0
    for features, logits in zip(outputs.features.tolist(), outputs.similarity.tolist(), strict=True):
        for t in frames:

            def vector(time, y, x, features=features):
                return [channel[y][x] for channel in features[time]]

            for here in cells:
                count += 1
                alike = {n: cosine(vector(t, *here), vector(t + 1, *there)) for n, there in enumerate(cells)}
                shares = {n: math.exp(value / temperature) for n, value in alike.items() if value >= threshold}
                scores = [logits[t][n][here[0]][here[1]] for n in range(len(cells))]
                norm = math.log(sum(math.exp(score) for score in scores))
                total -= sum(share * (scores[n] - norm) for n, share in shares.items()) / (sum(shares.values()) or 1)
    return total / count, len(outputs.features) * len(frames)


@pytest.mark.parametrize(
    ("steps", "grid"), [([0], (2, 3)), ([0, 1], (1, 1)), ([1], (1, 4)), ([2], (3, 1)), ([0, 3], (2, 3))]
)
@pytest.mark.parametrize("options", [(0.075, 0.0), (1.0, -1), (0.25, 0.5), (0.01, 0.0), (0.15, -0.3)], ids=str)
def test_similarity_equals_plain_loops(steps, grid, options):
    outputs = outputs_of(steps, grid=grid)
    value, parts = run(outputs, TemporalSimilarity(*options))
    expected, weight = similarity_loss(outputs, *options)
    assert value.item() == pytest.approx(expected, rel=1e-12) and parts == {"weight": weight}
    assert weight == 2 * {0: 3, 1: 3, 2: 2, 3: 1}[max(steps)]


def test_cells_without_a_match_in_the_next_frame_cost_nothing():
    outputs = outputs_of()
    with torch.no_grad():
        outputs.features[:, 1].abs_()
        outputs.features[:, 0, :, 1, 2] = -1  # like no cell of the next frame
    value, _ = compare(outputs)
    value.backward()
    assert outputs.features.grad is None and value.item() == pytest.approx(similarity_loss(outputs)[0], rel=1e-12)
    gradient = outputs.similarity.grad
    assert gradient[:, 0].any() and not gradient[:, 0, :, 1, 2].any()
    assert not gradient[:, 3].any()  # the last frame has no next one


def test_zero_features_match_all_cells_and_nan_stays_nan():
    outputs = outputs_of(clips=1, length=2)
    with torch.no_grad():
        outputs.features[0, 0, :, 0, 0] = 0
    shares, _ = similarity_targets(*outputs.features.detach().flatten(3).unbind(1), 0.075, 0.0)
    torch.testing.assert_close(shares[0, :, 0], torch.full((6,), 1 / 6, dtype=torch.float64))
    assert compare(outputs)[0].isfinite()
    with torch.no_grad():
        outputs.features[0, 0, :, 0, 0] = torch.nan
    assert compare(outputs)[0].isnan()


def test_a_frame_keeps_one_target_matrix_for_the_backward_pass():
    outputs = outputs_of(clips=2, length=5, grid=(5, 6), dtype=torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value, _ = compare(outputs)
    logits = outputs.similarity.untyped_storage()
    matrix = 4 * 2 * 30 * 30
    assert kept.pop(logits.data_ptr()) == logits.nbytes()
    assert sum(size >= matrix for size in kept.values()) == 4 and sum(kept.values()) < 4.5 * matrix
    value.backward()


def contrast_loss(slots, temperature):
    """Average over pairs of frames, clips and slots, one after the other."""
    clips, frames, count, _ = slots.shape
    values = []
    for t in range(frames - 1):
        following = [slots[clip, t + 1, slot].tolist() for clip in range(clips) for slot in range(count)]
        for clip, slot in itertools.product(range(clips), range(count)):
            scores = [cosine(slots[clip, t, slot].tolist(), there) / temperature for there in following]
            values.append(math.log(sum(map(math.exp, scores))) - scores[clip * count + slot])
    return sum(values) / len(values)


def contrast(slots, carried=True, **options):
    return run(outputs_of(slots=slots, carried=carried), SlotContrast(**options))


@pytest.mark.parametrize(
    ("shape", "temperature"), [((2, 4, 3, 5), 0.1), ((1, 2, 4, 3), 2.0), ((3, 3, 1, 2), 0.1), ((1, 2, 1, 1), 0.1)]
)
def test_contrast_equals_plain_loops(shape, temperature):
    slots = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    value, parts = contrast(slots, temperature=temperature)
    assert value.item() == pytest.approx(contrast_loss(slots, temperature), rel=1e-12, abs=1e-14)
    assert parts["weight"] == shape[0] * (shape[1] - 1)


def test_gradients_reach_both_frames_and_zero_slots_are_safe():
    slots = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    slots[0, 1, 2] = 0
    slots.requires_grad_()
    contrast(slots)[0].backward()
    assert slots.grad.isfinite().all() and slots.grad[:, 0].any() and slots.grad[:, -1].any()


def test_independent_slots_are_not_compared():
    slots = (-torch.rand(2, 3, 4, 5)).requires_grad_()
    value, _ = contrast(slots, carried=False)
    value.backward()
    assert str(value.item()) == "0.0" and not slots.grad.any()
    assert_refused(lambda: contrast(slots[:, :1]), "only one frame of each clip has slots", "clips of 2 frames or more")


def test_command_line_builds_losses_of_slots_without_classes(compose):
    cfg = compose("loss=video_similarity", "data.root=.", "data.classes=[a,b]")
    assert cfg.loss.weights == "none" and cfg.loss.class_weights is None and cfg.loss.counts is None
    criterion = instantiate(cfg.loss.criterion)()
    assert criterion.needs == {"slots", "reconstruction", "similarity"}
    outputs = outputs_of([0, 2])
    value, parts = run(outputs, criterion)
    similarity = compare(outputs)[0]
    torch.testing.assert_close(value, reconstruct(outputs)[0] + 0.1 * similarity, rtol=1e-12, atol=0)
    assert list(parts) == ["weight", "reconstruction", "reconstruction_step_0", "reconstruction_step_2", "similarity"]
    assert parts["weight"] == 4 and parts["similarity"] == similarity


def test_terms_get_class_weights_only_if_they_take_them():
    weights = torch.tensor([1.0, 2.0])
    terms = {"similarity": TemporalSimilarity, "dice": Dice}
    made = WeightedSum(terms, dict.fromkeys(terms, 1.0), weights)
    assert made.needs == {"slots", "similarity"} and torch.equal(made.losses[1].weight, weights)
    dice = WeightedSum({"dice": Dice}, {"dice": 1.0}, weights)
    assert not dice.needs


@pytest.mark.parametrize("option", [option for option in options("loss") if not read_whole("loss", option)["counts"]])
def test_a_loss_on_slots_keeps_the_contract(option):
    check_loss(instantiate(load_option("loss", option)["criterion"]), case=SlotLossCase)
