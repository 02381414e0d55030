import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dinoseg.config.nodes import instantiate
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction, SlotOutputs
from dinoseg.losses.feature_reconstruction import FeatureReconstruction
from dinoseg.losses.overlap import Dice
from dinoseg.losses.temporal_similarity import TemporalSimilarity, similarity_targets
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.utils.errors import UserError


def outputs_of(steps=(0,), clips=2, length=4, channels=3, grid=(2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    frames, cells = length - max(steps), grid[0] * grid[1]
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    masks = torch.full((clips, frames, 2, *grid), 0.5)
    return SlotOutputs(
        features=draw(clips, length, channels, *grid).to(dtype).requires_grad_(),
        reconstructions=[draw(clips, frames, channels, *grid).to(dtype).requires_grad_() for _ in steps],
        alphas=[masks] * len(steps),
        attention=masks,
        slots=torch.zeros(clips, frames, 2, 7),
        steps=list(steps),
        similarity=draw(clips, frames, cells, *grid).mul_(4).to(dtype).requires_grad_(),
    )


def run(outputs, loss=None):
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 8, 8), 255, dtype=torch.uint8), ["a", "b"])
    return (loss or TemporalSimilarity())(Prediction(outputs, (8, 8), (1.0, 1.0), upsample), batch)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def reference(outputs, temperature=0.075, threshold=0.0):
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


@pytest.mark.parametrize("steps", [[0], [0, 1], [1], [2], [0, 3]])
@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (1, 4), (3, 1)])
def test_value_and_weight_against_plain_loops(steps, grid):
    outputs = outputs_of(steps, grid=grid)
    value, parts = run(outputs)
    expected, weight = reference(outputs)
    assert value.item() == pytest.approx(expected, rel=1e-12) and parts == {"weight": weight}
    assert weight == 2 * {0: 3, 1: 3, 2: 2, 3: 1}[max(steps)]


@pytest.mark.parametrize("temperature, threshold", [(1.0, -1), (0.25, 0.5), (0.01, 0.0), (0.15, -0.3)])
def test_value_equals_the_reference_at_any_temperature(temperature, threshold):
    outputs = outputs_of()
    value, _ = run(outputs, TemporalSimilarity(temperature, threshold))
    assert value.item() == pytest.approx(reference(outputs, temperature, threshold)[0], rel=1e-11)


def test_gradient_equals_cross_entropy_and_skips_the_backbone():
    outputs = outputs_of([0])
    with torch.no_grad():
        outputs.features[:, 1].abs_()
        outputs.features[:, 0, :, 1, 2] = -1  # like no cell of the next frame
    run(outputs)[0].backward()
    assert outputs.features.grad is None
    gradient = outputs.similarity.grad
    assert bool((gradient[:, 3] == 0).all())  # the last frame has no next one to tell of
    features = F.normalize(outputs.features.detach().flatten(3), dim=2)
    alike = torch.einsum("btcn,btcm->btnm", features[:, :-1], features[:, 1:])
    lost = (alike < 0).all(-1)
    shares = torch.where(alike < 0, -torch.inf, alike / 0.075).softmax(-1)
    shares = torch.where(lost[..., None], torch.nan, shares)
    assert 0 < lost.sum() < lost.numel()
    expected = outputs.similarity.detach()[:, :3].flatten(3).softmax(2) - shares.transpose(2, 3)
    expected = expected.nan_to_num(0.0).view_as(gradient[:, :3]) / (2 * 3 * 6)
    torch.testing.assert_close(gradient[:, :3], expected, rtol=1e-9, atol=1e-15)


def test_targets_sum_to_one_and_the_next_frame_is_the_first_axis():
    here = torch.eye(3, dtype=torch.float64)[None]  # (1, C, N): cell n is the axis n
    following = torch.tensor([[[0.0, 5.0, 1.0], [0.0, 0.0, 1.0], [2.0, 0.0, -1.0]]], dtype=torch.float64)
    shares, found = similarity_targets(here, following, 0.075, 0.1)
    assert (
        shares[0, :, 0].argmax() == 1
        and shares[0, :, 1].tolist() == [0, 0, 1]
        and shares[0, :, 2].tolist() == [1, 0, 0]
    )
    assert found.tolist() == [[True, True, True]]
    torch.testing.assert_close(shares.sum(1), torch.ones(1, 3, dtype=torch.float64))


def test_a_cell_that_is_like_none_is_left_out():
    outputs = outputs_of(clips=1, length=2, grid=(1, 3))
    with torch.no_grad():
        outputs.features.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
        outputs.features[0, 0, :, 0, 1] *= -1  # opposite to all of the next frame
    value, parts = run(outputs)
    value.backward()
    assert parts["weight"] == 1
    assert value.item() == pytest.approx(reference(outputs)[0], rel=1e-12)
    gradient = outputs.similarity.grad[0, 0, :, 0]  # (cells of the next frame, cells)
    assert bool((gradient[:, 1] == 0).all()) and bool((gradient[:, [0, 2]] != 0).all())
    with torch.no_grad():
        outputs.features[0, 0] = -outputs.features[0, 1]
    value, parts = run(outputs)
    assert value == 0 and parts["weight"] == 1  # no cell at all: nothing, and no NaN


def test_zero_features_match_all_cells_and_nan_stays_nan():
    outputs = outputs_of(clips=1, length=2)
    with torch.no_grad():
        outputs.features[0, 0, :, 0, 0] = 0
    shares, _ = similarity_targets(*outputs.features.detach().flatten(3).unbind(1), 0.075, 0.0)
    torch.testing.assert_close(shares[0, :, 0], torch.full((6,), 1 / 6, dtype=torch.float64))
    assert run(outputs)[0].isfinite()
    with torch.no_grad():
        outputs.features[0, 0, :, 0, 0] = torch.nan
    assert run(outputs)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype):
    outputs = outputs_of(dtype=dtype, channels=40)
    value, parts = run(outputs)
    value.backward()
    assert value.dtype == parts["weight"].dtype == torch.float32
    assert value.item() == pytest.approx(reference(outputs)[0], rel=1e-5)
    assert outputs.similarity.grad.dtype == dtype and bool(outputs.similarity.grad.isfinite().all())


def test_batches_of_unequal_size_add_up_to_one():
    whole = outputs_of([0, 1], clips=4)
    total, weights = 0.0, 0.0
    for clips in (slice(0, 1), slice(1, 4)):
        value, parts = run(replace(whole, features=whole.features[clips], similarity=whole.similarity[clips]))
        total, weights = total + value * parts["weight"], weights + parts["weight"]
    torch.testing.assert_close(total / weights, run(whole)[0], rtol=1e-12, atol=0)


def test_a_frame_keeps_one_target_matrix_for_the_backward_pass():
    outputs = outputs_of(clips=2, length=5, grid=(5, 6), dtype=torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value, _ = run(outputs)
    logits, matrix = outputs.similarity.untyped_storage(), 4 * 2 * 30 * 30
    assert kept.pop(logits.data_ptr()) == logits.nbytes()
    assert sum(size >= matrix for size in kept.values()) == 4 and sum(kept.values()) < 4.5 * matrix
    value.backward()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"similarity": None}, r"does not predict the similarity .* Give the head similarity=true"),
        (
            {"features": torch.zeros(2, 1, 3, 2, 3), "similarity": None},
            r"clips have 1 frame. Give clips of 2 frames or more",
        ),
    ],
)
def test_outputs_without_a_next_frame_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        run(replace(outputs_of(), **change))


def test_other_heads_are_refused():
    assert TemporalSimilarity.needs_slots
    with pytest.raises(UserError, match="slot_contrast train slots and need the outputs of a slot head"):
        run(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"temperature": 0}, "^temperature=0 is out of range. Give a number above 0"),
        ({"temperature": math.nan}, "^temperature=nan"),
        ({"temperature": math.inf}, "^temperature=inf"),
        ({"threshold": 1.0}, "^threshold=1.0 is out of range. Give a cosine similarity"),
        ({"threshold": -1.1}, "^threshold=-1.1"),
        ({"threshold": math.nan}, "^threshold=nan"),
    ],
)
def test_bad_keys_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        TemporalSimilarity(**keys)


def test_command_line_sum_builds_the_loss(compose):
    cfg = compose("loss=video_similarity", "data.root=.", "data.classes=[a,b]")
    assert cfg.loss.weights == "none" and cfg.loss.class_weights is None and cfg.loss.counts is None
    criterion = instantiate(cfg.loss.criterion)()
    assert criterion.needs_slots and criterion.needs_similarity and not criterion.needs_masks
    outputs = outputs_of([0, 2])
    value, parts = run(outputs, criterion)
    reconstruction, similarity = run(outputs, FeatureReconstruction())[0], run(outputs)[0]
    torch.testing.assert_close(value, reconstruction + 0.1 * similarity, rtol=1e-12, atol=0)
    assert list(parts) == ["weight", "reconstruction", "reconstruction_step_0", "reconstruction_step_2", "similarity"]
    assert parts["weight"] == 4 and parts["similarity"] == similarity


def test_similarity_can_be_the_only_loss(compose):
    cfg = compose(
        "loss=video_similarity", "data.root=.", "data.classes=[a,b]", "loss.criterion.factors.reconstruction=0"
    )
    outputs = outputs_of([0])
    value, _ = run(outputs, instantiate(cfg.loss.criterion)())
    value.backward()
    torch.testing.assert_close(value, 0.1 * run(outputs)[0], rtol=1e-12, atol=0)
    assert bool((outputs.reconstructions[0].grad == 0).all()) and bool((outputs.similarity.grad != 0).any())


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "loss.criterion.terms.similarity.temperature=0",
            "loss.criterion.terms.similarity.temperature=0 is out of range. Give",
        ),
        ("+loss.criterion.terms.reconstruction.gamma=1", "does not take gamma"),
    ],
)
def test_a_wrong_key_of_the_sum_is_refused(compose, override, said):
    cfg = compose("loss=video_similarity", "data.root=.", "data.classes=[a,b]", override)
    with pytest.raises(UserError, match=said):
        instantiate(cfg.loss.criterion)()


def test_terms_get_class_weights_only_if_they_take_them():
    weights = torch.tensor([1.0, 2.0])
    terms = {"similarity": TemporalSimilarity, "dice": Dice}
    made = WeightedSum(terms, dict.fromkeys(terms, 1.0), weights)
    assert made.needs_slots and made.needs_similarity and torch.equal(made.losses[1].weight, weights)
    dice = WeightedSum({"dice": Dice}, {"dice": 1.0}, weights)
    assert not dice.needs_slots and not dice.needs_similarity
    with pytest.raises(UserError, match="^terms.dice weights classes, but this loss has none. Remove the"):
        WeightedSum(terms, dict.fromkeys(terms, 1.0))
