"""Slot attention, its predictor and the class token's background, against loops over single numbers."""

import math

import pytest
import torch

from dinoseg.models.heads.slots.attention import SlotAttention, distant_tokens, slot_weights
from dinoseg.models.heads.slots.background import background_mask
from dinoseg.models.heads.slots.predictor import SaviPredictor, make_predictor
from dinoseg.utils.errors import UserError

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def make_module(kind, *args, **kwargs):
    """Return a module in float64 with every parameter moved away from its first value."""
    torch.manual_seed(3)
    module = kind(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def norm_row(row, norm):
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    parts = zip(row, norm.weight.tolist(), norm.bias.tolist(), strict=True)
    return [(x - mean) / math.sqrt(variance + 1e-5) * scale + shift for x, scale, shift in parts]


def times(weight, row, bias=None):
    rows = weight.tolist()
    shifts = bias.tolist() if bias is not None else [0.0] * len(rows)
    return [
        sum(w * x for w, x in zip(line, row, strict=True)) + shift for line, shift in zip(rows, shifts, strict=True)
    ]


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [power / sum(powers) for power in powers]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gru(cell, seen, before):
    """Reset and update gates, and the candidate, of Cho et al. (2014) in PyTorch's order of rows."""
    given, kept = times(cell.weight_ih, seen, cell.bias_ih), times(cell.weight_hh, before, cell.bias_hh)
    dim, after = len(before), []
    for i in range(dim):
        reset, update = sigmoid(given[i] + kept[i]), sigmoid(given[dim + i] + kept[dim + i])
        candidate = math.tanh(given[2 * dim + i] + reset * kept[2 * dim + i])
        after.append((1 - update) * candidate + update * before[i])
    return after


def attend_by_loops(module, tokens, slots, iterations, allowed=None):
    """Slot attention of one clip: tokens and slots are lists of rows."""
    tokens = [norm_row(token, module.norm_tokens) for token in tokens]
    keys = [times(module.key.weight, token) for token in tokens]
    values = [times(module.value.weight, token) for token in tokens]
    dim = len(slots[0])
    for _ in range(iterations):
        queries = [times(module.query.weight, norm_row(slot, module.norm_slots)) for slot in slots]
        weights = [[0.0] * len(tokens) for _ in slots]
        for n, key in enumerate(keys):
            open_to = [s for s in range(len(slots)) if allowed is None or allowed[s][n]]
            logits = [sum(q * k for q, k in zip(queries[s], key, strict=True)) / math.sqrt(dim) for s in open_to]
            for s, weight in zip(open_to, softmax(logits), strict=True):
                weights[s][n] = weight
        after = []
        for slot, row in zip(slots, weights, strict=True):
            total = sum(row) + 1e-6
            seen = [sum(w / total * value[i] for w, value in zip(row, values, strict=True)) for i in range(dim)]
            updated = gru(module.gru, seen, slot)
            first, _, second = module.mlp
            inner = [max(0.0, x) for x in times(first.weight, norm_row(updated, module.norm_mlp), first.bias)]
            after.append([x + y for x, y in zip(updated, times(second.weight, inner, second.bias), strict=True)])
        slots = after
    return slots, weights


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_loops(iterations, masked):
    module = make_module(SlotAttention, 5, 4, 7)
    tokens, slots = torch.randn(2, 9, 5).double() * 3, torch.randn(2, 3, 4).double()
    allowed = torch.rand(2, 3, 9) > 0.5 if masked else None
    if masked:
        allowed[0, :, 4] = False  # a token that no slot may see
        allowed[1, 1] = False  # a slot that may see no token
    found, weights = module(tokens, slots, iterations, allowed)
    for clip in range(2):
        own = allowed[clip].tolist() if masked else None
        expected = attend_by_loops(module, tokens[clip].tolist(), slots[clip].tolist(), iterations, own)
        torch.testing.assert_close(found[clip], torch.tensor(expected[0], dtype=torch.float64), **EXACT)
        torch.testing.assert_close(weights[clip], torch.tensor(expected[1], dtype=torch.float64), **EXACT)


def test_weights_sum_to_one_over_the_slots_where_any_may_see():
    queries, keys = torch.randn(2, 4, 8) * 30, torch.randn(2, 6, 8) * 30  # most weights are 0 or 1
    torch.testing.assert_close(slot_weights(queries, keys).sum(1), torch.ones(2, 6))
    allowed = torch.rand(2, 4, 6) > 0.4
    allowed[:, :, 2] = False
    weights = slot_weights(queries, keys, allowed)
    torch.testing.assert_close(weights.sum(1), allowed.any(1).float())
    assert weights[~allowed].eq(0).all()


def test_a_token_that_no_slot_may_see_changes_nothing():
    module = make_module(SlotAttention, 5, 4, 7)
    tokens, slots = torch.randn(1, 6, 5).double(), torch.randn(1, 3, 4).double()
    allowed = torch.ones(1, 3, 6, dtype=torch.bool)
    allowed[:, :, 5] = False
    found, weights = module(tokens, slots, 2, allowed)
    without, _ = module(tokens[:, :5], slots, 2)
    torch.testing.assert_close(found, without, **EXACT)
    assert weights[..., 5].eq(0).all()


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


def test_distant_tokens_of_training_begin_anywhere():
    tokens = torch.randn(1, 9, 4).expand(400, -1, -1)
    torch.manual_seed(1)
    found = distant_tokens(tokens, 3, random_first=True)
    assert len(found[:, 0].unique()) == 9
    assert all(len(set(row)) == 3 for row in found.tolist())


def test_half_precision_chooses_as_float32_does():
    torch.manual_seed(2)
    tokens = torch.randn(2, 9, 4).half()
    assert distant_tokens(tokens, 5).equal(distant_tokens(tokens.float(), 5))


def test_unlike_slots_of_training_begin_anywhere():
    module, tokens = make_module(SlotAttention, 5, 4, 3, slot_init="clusters").train(), torch.randn(1, 7, 5).double()
    module._noise = lambda batch, count: torch.zeros(batch, count, 4).double()  # so that they differ by their tokens
    firsts = {module.initial_slots(tokens, [1]).flatten().tolist()[0] for _ in range(100)}
    assert len(firsts) == 7
    assert module.eval().initial_slots(tokens, [1]).equal(module.initial_slots(tokens, [1]))


def test_cluster_slots_add_the_tokens_to_the_initial_slots():
    module = make_module(SlotAttention, 5, 4, 3, slot_init="clusters").eval()
    tokens = torch.randn(2, 7, 5).double()
    places = distant_tokens(module.norm_tokens(tokens), 3)
    found, seed = module.initial_slots(tokens, [3]), module.cluster_init
    module.cluster_init = None
    drawn = module.initial_slots(tokens, [3])
    for clip in range(2):
        for slot in range(3):
            row = norm_row(tokens[clip, places[clip, slot]].tolist(), module.norm_tokens)
            told = torch.tensor(times(seed.weight, row, seed.bias), dtype=torch.float64)
            torch.testing.assert_close(found[clip, slot], drawn[clip, slot] + told, **EXACT)
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
    kinds = torch.randn(4, 24).double()
    kind = torch.arange(20) % 4
    tokens = (kinds[kind] + 0.05 * torch.randn(1, 20, 24)).double()
    slots = module.initial_slots(tokens, [4])
    assert not module.cluster_init.bias.any()
    found, weights = module(tokens, slots, 2)
    assert [len(set(weights[0].argmax(0)[kind == one].tolist())) for one in range(4)] == [1] * 4
    assert len(set(weights[0].argmax(0).tolist())) == 4 and (weights[0].amax(0) > 0.8).all()
    # one step: a slot is the mean, by the gate, of itself and of the tokens that it won
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


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_predictor_agrees_with_loops(mode):
    predictor = make_module(SaviPredictor, 8)
    slots = torch.randn(2, 5, 8).double()
    found = getattr(predictor, mode)()(slots).detach()
    attention = predictor.attention
    for clip in range(2):
        rows = slots[clip].tolist()
        projected = [times(attention.in_proj_weight, row, attention.in_proj_bias) for row in rows]
        for number, row in enumerate(rows):
            joined = []
            for head in range(4):
                own = slice(2 * head, 2 * head + 2)
                query = projected[number][:8][own]
                keys, values = [p[8:16][own] for p in projected], [p[16:][own] for p in projected]
                logits = [sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(2) for key in keys]
                shares = softmax(logits)
                joined += [sum(w * value[i] for w, value in zip(shares, values, strict=True)) for i in range(2)]
            seen = times(attention.out_proj.weight, joined, attention.out_proj.bias)
            middle = norm_row([x + y for x, y in zip(row, seen, strict=True)], predictor.norm_attention)
            inner = [max(0.0, x) for x in times(predictor.mlp[0].weight, middle, predictor.mlp[0].bias)]
            expected = norm_row([x + y for x, y in zip(middle, inner, strict=True)], predictor.norm_mlp)
            torch.testing.assert_close(found[clip, number], torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_carry_and_none_predictors_and_bad_dimensions():
    slots = torch.randn(1, 3, 6)
    assert torch.equal(make_predictor("carry", 6)(slots), slots)
    assert make_predictor("none", 6) is None
    for dim, near in ((6, "4 or 8"), (3, "4 or 4"), (9, "8 or 12")):
        with pytest.raises(UserError, match=rf"slot_dim={dim} is not a multiple of 4.*slot_dim={near}"):
            make_predictor("savi", dim)


def looped_background(maps):
    """Background of one image by loops: maps[head][row][column]."""
    flat = [[x for row in one for x in row] for one in maps]
    mean = sum(map(sum, flat)) / sum(map(len, flat))
    counts = [max(1, sum(x > mean for x in one)) for one in flat]
    weights = [math.log(sum(counts) / count) for count in counts]
    seen = [sum(w * one[n] for w, one in zip(weights, flat, strict=True)) / len(flat) for n in range(len(flat[0]))]
    return [x < sum(seen) / len(seen) for x in seen]


def test_background_agrees_with_loops():
    torch.manual_seed(0)
    attention = torch.rand(5, 6, 4, 7).double() ** 4
    attention[1, 2] *= 20  # a head that looks at nearly all, so that others look at nothing
    attention[2, :, :2] = 0
    found = background_mask(attention)
    assert found.dtype == torch.bool and found.shape == (5, 4, 7)
    for image in range(5):
        assert found[image].flatten().tolist() == looped_background(attention[image].tolist())


def test_background_is_where_the_class_token_does_not_look():
    attention = torch.full((1, 3, 6, 6), 0.01)
    attention[0, :2, 2:4, 2:4] = 0.2  # two heads look at an object
    attention[0, 2] = 0.03  # one looks everywhere
    expected = torch.ones(6, 6, dtype=torch.bool)
    expected[2:4, 2:4] = False
    assert torch.equal(background_mask(attention)[0], expected)
    assert torch.equal(background_mask(attention[:, :1])[0], expected)  # one head alone
    assert torch.equal(background_mask(attention.bfloat16())[0], expected)
    assert not background_mask(torch.full((1, 3, 6, 6), 1 / 64)).any()  # nothing stands back
