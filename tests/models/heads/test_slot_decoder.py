"""The decoder against loops over slots and cells, positions, and what slots become over time."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinoseg.models.heads.slots.attention import make_time_decoders, resolve_steps
from dinoseg.models.heads.slots.decoder import SlotDecoder
from dinoseg.models.heads.slots.positions import Positions
from dinoseg.utils.errors import UserError


def decoder(kind="learned", grid=(3, 4), **kwargs):
    torch.manual_seed(2)
    return SlotDecoder(6, 5, 11, Positions(kind, grid), **kwargs).double()


def decode_by_loops(module, slots, positions):
    """Each slot and cell through all four layers by itself, then the mean of the slots by their alpha."""
    features, alphas = [], []
    for place in positions.flatten(1).T:
        outputs = []
        for slot in slots:
            values = torch.cat([place, slot])  # positions first
            for number, layer in enumerate(module.layers):
                values = layer.weight @ values + layer.bias
                values = values.clamp(min=0) if number < 3 else values
            outputs.append(values)
        powers = [math.exp(values[-1]) for values in outputs]
        alphas.append([power / sum(powers) for power in powers])
        features.append(sum(share * values[:-1] for share, values in zip(alphas[-1], outputs, strict=True)))
    return torch.stack(features), torch.tensor(alphas, dtype=torch.float64)  # (N, C), (N, S)


@pytest.mark.parametrize("kind", ["learned", "sine", "linear"])
@pytest.mark.parametrize("grid", [(3, 4), (5, 2), (1, 1)])
def test_agrees_with_loops(kind, grid):
    module = decoder(kind)
    slots = torch.randn(2, 3, 6).double()
    with torch.no_grad():
        found = module(slots, grid)
        assert found.features.shape == (2, 5, *grid) and found.alpha.shape == (2, 3, *grid) and found.similarity is None
        for clip in range(2):
            features, alphas = decode_by_loops(module, slots[clip], module.positions(grid, slots))
            torch.testing.assert_close(found.features[clip].flatten(1).T, features, atol=1e-12, rtol=1e-10)
            torch.testing.assert_close(found.alpha[clip].flatten(1).T, alphas, atol=1e-12, rtol=1e-10)


def test_similarity_is_painted_like_features():
    module = decoder(num_cells=12)
    assert module.layers[-1].out_features == 5 + 12 + 1
    slots = torch.randn(1, 3, 6).double()
    with torch.no_grad():
        found, without = module(slots, (3, 4), similarity=True), module(slots, (3, 4))
        expected, _ = decode_by_loops(module, slots[0], module.positions((3, 4), slots))
    torch.testing.assert_close(found.features[0].flatten(1).T, expected[:, :5], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found.similarity[0].flatten(1).T, expected[:, 5:], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(without.features, found.features)
    assert without.similarity is None


def test_gradients_are_those_of_the_layers_one_after_the_other():
    module = decoder()
    slots = torch.randn(1, 3, 6).double().requires_grad_()
    target = torch.randn(12, 5).double()
    parameters = [slots, *module.parameters()]
    found = torch.autograd.grad(F.mse_loss(module(slots, (3, 4)).features[0].flatten(1).T, target), parameters)
    outputs = [torch.cat([place, slot]) for place in module.positions((3, 4), slots).flatten(1).T for slot in slots[0]]
    values = torch.stack(outputs)  # (N * S, 4 + D)
    for layer in module.layers[:-1]:
        values = layer(values).relu()
    values = module.layers[-1](values).unflatten(0, (12, 3))
    mean = (values[..., -1:].softmax(1) * values[..., :-1]).sum(1)
    expected = torch.autograd.grad(F.mse_loss(mean, target), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


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
    assert [sum(p.numel() for p in Positions(kind, (3, 5)).parameters()) for kind in ("linear", "sine", "learned")] == [
        0,
        0,
        60,
    ]


def cubic(distance):
    """Keys' cubic convolution with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resample_cubic(line, length):
    found = []
    for number in range(length):
        place = (number + 0.5) * len(line) / length - 0.5
        near = [math.floor(place) + offset for offset in (-1, 0, 1, 2)]
        found.append(sum(cubic(place - at) * line[min(max(at, 0), len(line) - 1)] for at in near))
    return found


@pytest.mark.parametrize("kind", ["learned", "sine"])
def test_stored_positions_are_resampled_bicubically(kind):
    positions = Positions(kind, (4, 6)).double()
    like = torch.zeros((), dtype=torch.float64)
    stored, found = positions((4, 6), like).detach(), positions((7, 5), like).detach()
    for channel in range(4):
        rows = [resample_cubic(row, 5) for row in stored[channel].tolist()]
        columns = [resample_cubic(column, 7) for column in zip(*rows, strict=True)]
        expected = torch.tensor(columns, dtype=torch.float64).T
        torch.testing.assert_close(found[channel], expected, atol=1e-9, rtol=1e-9)
    if kind == "learned":
        assert torch.equal(stored, positions.table)
        positions((7, 5), like).sum().backward()
        assert positions.table.grad.abs().sum() > 0


def test_steps_are_a_number_or_a_list():
    assert resolve_steps(0) == [0] and resolve_steps(3) == [0, 1, 2, 3]
    assert resolve_steps([1]) == [1] and resolve_steps([2, 0]) == [2, 0]
    for wrong in (-1, [], [0, -2], [1, 1]):
        with pytest.raises(UserError, match=r"steps=.*each once"):
            resolve_steps(wrong)


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
    with pytest.raises(UserError, match=r"slot_dim=6 is not a multiple of 4.*time_decoder=attention"):
        make_time_decoders("attention", 6, 1)
