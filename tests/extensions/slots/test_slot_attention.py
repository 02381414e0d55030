"""Slot attention, its predictor and the class token's background, against their formulas in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from bicubic import cubic_matrix
from mistakes import refusals
from slot_formulas import gru, linear, norm, relu, softmax

from dinoseg.extensions.slots.head.attention import (
    SlotAttention,
    distant_tokens,
    make_time_decoders,
    resolve_steps,
    slot_weights,
)
from dinoseg.extensions.slots.head.background import background_mask
from dinoseg.extensions.slots.head.decoder import SlotDecoder
from dinoseg.extensions.slots.head.positions import Positions
from dinoseg.extensions.slots.head.predictor import SaviPredictor, make_predictor

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def make_module(kind, *args, **kwargs):
    """Return a module in float64 with every parameter moved away from its first value."""
    torch.manual_seed(3)
    module = kind(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def weights_of(module):
    return {name: part.detach().numpy() for name, part in module.state_dict().items()}


def attend_by_formula(module, tokens, slots, iterations, allowed):
    """Return slots (B, S, D) and weights (B, S, N) of slot attention; `allowed` (B, S, N)."""
    w = weights_of(module)
    tokens = norm(tokens, w, "norm_tokens")
    keys, values = linear(tokens, w, "key"), linear(tokens, w, "value")
    for _ in range(iterations):
        queries = linear(norm(slots, w, "norm_slots"), w, "query")
        logits = queries @ np.swapaxes(keys, -1, -2) / np.sqrt(slots.shape[-1])
        powers = np.where(allowed, np.exp(logits), 0)
        weights = powers / np.maximum(powers.sum(1, keepdims=True), 1e-300)  # all zero where no slot may see
        seen = weights / (weights.sum(-1, keepdims=True) + 1e-6) @ values
        slots = gru(seen, slots, w, "gru")
        slots = slots + linear(relu(linear(norm(slots, w, "norm_mlp"), w, "mlp.0")), w, "mlp.2")
    return slots, weights


def test_attention_without_tokens_leaves_finite_slots():
    module = make_module(SlotAttention, 5, 4, 7)
    tokens = torch.randn(1, 6, 5).double().requires_grad_()
    slots, weights = module(tokens, torch.randn(1, 3, 4).double(), 2, torch.zeros(1, 3, 6, dtype=torch.bool))
    assert weights.eq(0).all() and torch.isfinite(slots).all()
    slots.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    assert tokens.grad.eq(0).all()


@pytest.mark.parametrize(("as_std", "power"), [(False, 0.5), (True, 1.0)])
def test_first_slots_have_the_mean_and_the_spread_of_their_group(as_std, power):
    torch.manual_seed(0)
    module = SlotAttention(5, 2, 3, num_groups=2, variance_as_std=as_std)
    with torch.no_grad():
        module.mean.copy_(torch.tensor([1.0, -2.0])), module.log_variance.copy_(torch.tensor([1.0, 0.5]))
        module.group_mean.copy_(torch.tensor([[[5.0, 0.0], [0.0, 7.0]]]))
        module.group_log_variance.copy_(torch.tensor([[[0.0, 0.0], [-1.0, 1.0]]]))
    slots = module.initial_slots(torch.zeros(4000, 6, 5), (3, 2))
    assert slots.shape == (4000, 5, 2)
    for part, mean, log_variance in ((slots[:, :3], (6, -2), (1, 0.5)), (slots[:, 3:], (1, 5), (0, 1.5))):
        values = part.reshape(-1, 2)
        torch.testing.assert_close(values.mean(0), torch.tensor(mean).float(), atol=0.15, rtol=0)
        expected = torch.tensor([math.exp(power * x) for x in log_variance])
        torch.testing.assert_close(values.std(0), expected, atol=0, rtol=0.05)


def test_first_slots_are_random_in_training_and_fixed_in_eval():
    module = SlotAttention(5, 4, 3)
    tokens = torch.randn(2, 6, 5)
    torch.manual_seed(1)
    first, second = module.initial_slots(tokens, [3]), module.initial_slots(tokens, [3])
    torch.manual_seed(1)
    assert torch.equal(first, module.initial_slots(tokens, [3]))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    module.eval()
    before = torch.get_rng_state()
    fixed = module.initial_slots(tokens, [3])
    assert torch.equal(before, torch.get_rng_state())  # nothing is taken from the training's own numbers
    assert torch.equal(fixed[:1], module.initial_slots(tokens[:1], [3])) and torch.equal(fixed[0], fixed[1])
    assert not torch.equal(fixed[0, 0], fixed[0, 1])


def farthest(rows, count, allowed):
    """Each place is the farthest from all before it, the first the farthest from the mean of all."""
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    chosen = []
    for slot in range(count):
        before = [rows[place] for place in chosen] or [mean]
        gap = [min(math.dist(row, other) for other in before) if allowed[slot][i] else -1 for i, row in enumerate(rows)]
        chosen.append(gap.index(max(gap)))
    return chosen


@pytest.mark.parametrize("some", [False, True])
def test_distant_tokens_are_each_the_farthest_from_all_before(some):
    torch.manual_seed(4)
    tokens = torch.randn(3, 9, 4).double()
    tokens[1] = tokens[1, :1]  # all alike: any will do, and the first is taken
    allowed = torch.rand(3, 5, 9) > 0.5 if some else torch.ones(3, 5, 9, dtype=torch.bool)
    if some:
        allowed[2, 3] = False
    found = distant_tokens(tokens, 5, allowed if some else None)
    for clip in (0, 2):
        assert found[clip].tolist() == farthest(tokens[clip].tolist(), 5, allowed[clip].tolist())
    if some:
        assert all(allowed[clip, slot, found[clip, slot]] for clip in (0, 1) for slot in range(5))
        assert found[2, 3] == 0


def test_half_precision_chooses_as_float32_does():
    torch.manual_seed(2)
    tokens = torch.randn(2, 9, 4).half()
    assert distant_tokens(tokens, 5).equal(distant_tokens(tokens.float(), 5))


def test_unlike_slots_of_training_begin_anywhere():
    module = make_module(SlotAttention, 5, 4, 3, slot_init="clusters").train()
    tokens = torch.randn(1, 7, 5).double()
    module._noise = lambda batch, count: torch.zeros(batch, count, 4).double()  # so that they differ by their tokens
    firsts = {module.initial_slots(tokens, [1]).flatten().tolist()[0] for _ in range(100)}
    assert len(firsts) == 7
    assert module.eval().initial_slots(tokens, [1]).equal(module.initial_slots(tokens, [1]))


def test_cluster_slots_add_the_tokens_to_the_initial_slots():
    module = make_module(SlotAttention, 5, 4, 3, slot_init="clusters").eval()
    tokens = torch.randn(2, 7, 5).double()
    places = distant_tokens(module.norm_tokens(tokens), 3)
    found = module.initial_slots(tokens, [3])
    seed = module.cluster_init
    w = weights_of(module)
    module.cluster_init = None
    drawn = module.initial_slots(tokens, [3])
    chosen = tokens.gather(1, places[..., None].expand(-1, -1, 5)).numpy()
    added = linear(norm(chosen, w, "norm_tokens"), w, "cluster_init")
    torch.testing.assert_close(found, drawn + torch.from_numpy(added), **EXACT)
    module.cluster_init = seed
    allowed = torch.zeros(2, 3, 7, dtype=torch.bool)
    allowed[:, :, 4] = True
    at_one = module.initial_slots(tokens, [3], allowed) - drawn
    torch.testing.assert_close(at_one, at_one[:, :1].expand(-1, 3, -1), **EXACT)


def test_queries_and_keys_begin_with_a_variance_of_one():
    torch.manual_seed(0)
    module = SlotAttention(160, 64, 3)
    for projection, width in ((module.query, 64), (module.key, 160)):
        values = projection(torch.randn(4000, width))
        assert 0.85 < values.var().item() < 1.15


def test_unlike_slots_begin_as_soft_k_means():
    torch.manual_seed(0)
    module = SlotAttention(24, 16, 3, slot_init="clusters").double().eval()
    tokens = torch.randn(1, 20, 24).double()
    slots = module.initial_slots(tokens, [4])
    assert not module.cluster_init.bias.any()
    # a slot becomes the mean, by the gate, of itself and of the tokens that it won
    keys = module.key(module.norm_tokens(tokens))
    share = slot_weights(1.5 * module.norm_slots(slots), keys)
    won = (share / (share.sum(2, keepdim=True) + 1e-6)) @ keys
    gate = (
        won @ module.gru.weight_ih[16:32].T
        + module.gru.bias_ih[16:32]
        + slots @ module.gru.weight_hh[16:32].T
        + module.gru.bias_hh[16:32]
    ).sigmoid()
    once, _ = module(tokens, slots, 1)
    torch.testing.assert_close(once, (1 - gate) * won.tanh() + gate * slots, **EXACT)
    spread = torch.stack([module.train()._sample(1, [4]) for _ in range(500)]).std()
    assert 0.12 < spread.item() < 0.14


def test_gaussian_starts_within_xaviers_bound():
    module = SlotAttention(5, 300, 3, num_groups=2)
    bound = math.sqrt(6 / (300 + 300))
    for parameter in (module.mean, module.log_variance, module.group_mean, module.group_log_variance):
        assert 0.97 * bound < parameter.abs().max() <= bound


def test_carry_and_none_are_no_predictors_of_slots():
    slots = torch.randn(1, 3, 6)
    assert torch.equal(make_predictor("carry", 6)(slots), slots)
    assert make_predictor("none", 6) is None


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_slot_attention_agrees_with_the_formula(iterations, masked):
    module = make_module(SlotAttention, 5, 4, 7)
    tokens = torch.randn(2, 9, 5).double() * 3
    slots = torch.randn(2, 3, 4).double()
    allowed = torch.rand(2, 3, 9) > 0.5
    allowed[0, :, 4] = False  # a token that no slot may see
    allowed[1, 1] = False  # a slot that may see no token
    found = module(tokens, slots, iterations, allowed if masked else None)
    expected = attend_by_formula(module, tokens.numpy(), slots.numpy(), iterations, allowed.numpy() | (not masked))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), **EXACT)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_predictor_agrees_with_the_formula(mode):
    predictor = make_module(SaviPredictor, 8)
    slots = torch.randn(2, 5, 8).double()
    w = weights_of(predictor)
    found = getattr(predictor, mode)()(slots).detach()
    projected = slots.numpy() @ w["attention.in_proj_weight"].T + w["attention.in_proj_bias"]
    query, key, value = (part.reshape(2, 5, 4, 2).swapaxes(1, 2) for part in np.split(projected, 3, -1))  # (B, h, S, C)
    seen = softmax(query @ key.swapaxes(-1, -2) / np.sqrt(2), -1) @ value
    seen = linear(seen.swapaxes(1, 2).reshape(2, 5, 8), w, "attention.out_proj")
    middle = norm(slots.numpy() + seen, w, "norm_attention")
    expected = norm(middle + relu(linear(middle, w, "mlp.0")), w, "norm_mlp")
    torch.testing.assert_close(found, torch.from_numpy(expected), **EXACT)


def test_background_agrees_with_the_formula():
    torch.manual_seed(0)
    attention = torch.rand(5, 6, 4, 7).double() ** 4
    attention[1, 2] *= 20  # a head that looks at nearly all, so that others look at nothing
    attention[2, :, :2] = 0
    found = background_mask(attention)
    assert found.dtype == torch.bool and found.shape == (5, 4, 7)
    for mask, maps in zip(found, attention.numpy(), strict=True):  # (heads, h, w)
        counts = np.maximum(1, (maps > maps.mean()).sum((1, 2)))
        seen = (np.log(counts.sum() / counts)[:, None, None] * maps).mean(0)
        assert np.array_equal(mask, seen < seen.mean())
    one = attention[:, :1]
    half = attention.bfloat16()
    assert torch.equal(background_mask(one), one[:, 0] < one[:, 0].mean((1, 2), keepdim=True))
    assert torch.equal(background_mask(half), background_mask(half.float()))


def decode_by_layers(module, slots, positions):
    """Return outputs (B, N, C) and alphas (B, N, S): each slot and cell through all layers, then the mean by alpha."""
    cells = [torch.cat([place.expand(*slots.shape[:2], -1), slots], -1) for place in positions.flatten(1).T]
    values = torch.stack(cells, 1)  # (B, N, S, 4 + D), positions first
    for layer in module.layers[:-1]:
        values = (values @ layer.weight.T + layer.bias).clamp(min=0)
    values = values @ module.layers[-1].weight.T + module.layers[-1].bias
    alphas = values[..., -1].exp() / values[..., -1].exp().sum(-1, keepdim=True)
    return (alphas[..., None] * values[..., :-1]).sum(2), alphas


@pytest.mark.parametrize("similarity", [False, True])
@pytest.mark.parametrize(
    ("kind", "grid"), [("learned", (3, 4)), ("sine", (1, 1)), ("sine", (5, 2)), ("linear", (5, 2))]
)
def test_decoder_and_its_gradients_agree_with_the_layers(kind, grid, similarity):
    torch.manual_seed(2)
    module = SlotDecoder(6, 5, 11, Positions(kind, (3, 4)), num_cells=12 * similarity).double()
    assert module.layers[-1].out_features == 5 + 12 * similarity + 1
    slots = torch.randn(2, 3, 6).double().requires_grad_()
    found = module(slots, grid, similarity=similarity)
    assert found.features.shape == (2, 5, *grid) and found.alpha.shape == (2, 3, *grid)
    parts = [found.features, found.similarity] if similarity else [found.features]
    ours = torch.cat(parts, 1).flatten(2).mT  # (B, N, C)
    expected, alphas = decode_by_layers(module, slots, module.positions(grid, slots))
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(found.alpha.flatten(2).mT, alphas, **EXACT)
    weights = torch.randn_like(ours)
    parameters = [slots, *module.parameters()]
    gradients = [torch.autograd.grad((values * weights).sum(), parameters) for values in (ours, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
    without = module(slots, grid)
    torch.testing.assert_close(without.features, found.features)
    assert without.similarity is None


def test_positions_follow_their_definitions():
    like = torch.zeros((), dtype=torch.float64)
    linear = Positions("linear", (9, 9))((3, 5), like)
    assert linear[0].tolist() == [[-1] * 5, [0] * 5, [1] * 5]  # channel 0 is the row
    assert linear[1].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
    sine = Positions("sine", (3, 5))((3, 5), like)
    for row in range(3):
        for column in range(5):
            expected = [math.sin(column), math.cos(column), math.sin(row), math.cos(row)]
            assert sine[:, row, column].tolist() == pytest.approx(expected, abs=1e-12)
    counts = [sum(p.numel() for p in Positions(kind, (3, 5)).parameters()) for kind in ("linear", "sine", "learned")]
    assert counts == [0, 0, 60]


@pytest.mark.parametrize("kind", ["learned", "sine"])
def test_stored_positions_are_resampled_bicubically(kind):
    positions = Positions(kind, (4, 6)).double()
    like = torch.zeros((), dtype=torch.float64)
    stored = positions((4, 6), like).detach()
    found = positions((7, 5), like)
    expected = cubic_matrix(4, 7 / 4, 7) @ stored @ cubic_matrix(6, 5 / 6, 5).T
    torch.testing.assert_close(found.detach(), expected, atol=1e-9, rtol=1e-9)
    if kind == "learned":
        assert torch.equal(stored, positions.table)
        found.sum().backward()
        assert positions.table.grad.abs().sum() > 0


def test_time_decoders_change_slots_each_in_its_own_way():
    slots = torch.randn(2, 3, 8)
    for module in make_time_decoders("none", 8, 2):
        assert torch.equal(module(slots), slots)
    first, second = make_time_decoders("linear", 8, 2)
    torch.testing.assert_close(first(slots), slots @ first.weight.T + first.bias)
    assert not torch.equal(first(slots), second(slots))
    (attention,) = make_time_decoders("attention", 8, 1)
    mixed = attention(slots)
    torch.testing.assert_close(mixed, attention.attention(slots, slots, slots)[0])
    turned = attention(slots[:, [2, 0, 1]])
    torch.testing.assert_close(turned, mixed[:, [2, 0, 1]])  # slots have no order


test_message_names_value_and_remedy = refusals(
    {f"steps={steps}": (partial(resolve_steps, steps), "steps=", "each once") for steps in (-1, [], [0, -2], [1, 1])}
    | {
        f"width {dim}": (
            partial(make_predictor, "savi", dim),
            f"slot_dim={dim} is not a multiple of 4",
            f"slot_dim={near}",
        )
        for dim, near in ((6, "4 or 8"), (3, "4 or 4"), (9, "8 or 12"))
    }
    | {"attention": (partial(make_time_decoders, "attention", 6, 1), "slot_dim=6 is not", "time_decoder=attention")}
)
