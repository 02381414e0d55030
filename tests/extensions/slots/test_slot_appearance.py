import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinoseg.extensions.slots.tracker.appearance import Appearance

WHOLE = (1.0, 1.0)


def one_hot(winners, num_slots):
    """Masks (S, h, w) that are surest of the slots in `winners` (h, w)."""
    return torch.stack([torch.where(winners == slot, 0.6, 0.1) for slot in range(num_slots)])


def scene(generator, slots=4, grid=(4, 6)):
    """Features (T, C, h, w) and masks (T, S, h, w) of any kind."""
    scale = torch.tensor([1.0, 30.0, 0.01, 1.0, 5.0])[:, None, None]
    features = torch.randn(6, 5, *grid, generator=generator) * scale + 100 * torch.randn(5, 1, 1, generator=generator)
    return features, torch.rand(6, slots, *grid, generator=generator)


def run_appearance(features, masks, valid=WHOLE, weight=2.0, known=None):
    """What is known in the end; the slots (T, S) that each of the first frame's is; and the masks (T, S, h, w)."""
    known = Appearance.empty(masks.shape[1], features.shape[1]) if known is None else known
    last = torch.arange(masks.shape[1])
    found = []
    settled = []
    for frame, mask in zip(features, masks, strict=True):
        known, last, one = known.step(frame, mask, valid, last, weight)
        found.append(last)
        settled.append(one)
    return known, torch.stack(found), torch.stack(settled)


def far(token, looked, deviation):
    """How far a token is from the mean of others, squared; from none beyond all measure."""
    return np.mean(((token - np.mean(looked, axis=0)) / deviation) ** 2) if looked else math.inf


def by_hand(features, masks, weight, passes=1):
    """The same, cell by cell and permutation by permutation."""
    features = features.double().numpy()
    masks = masks.double().numpy()
    count = masks.shape[1]
    cells = list(np.ndindex(features.shape[2:]))
    own, every = [[] for _ in range(count)], []  # all features that an identity has won, and of all cells
    for look in range(passes):
        last = tuple(range(count))
        found = []
        scores = []
        for frame, mask in zip(features, masks, strict=True):
            token = {cell: frame[(slice(None), *cell)] for cell in cells}
            won = {cell: int(np.argmax(mask[(slice(None), *cell)])) for cell in cells}
            every += token.values() if look == 0 else ()
            deviation = np.std(every, axis=0)

            if any(own):
                near = {cell: int(np.argmin([far(token[cell], one, deviation) for one in own])) for cell in cells}
                overlap = np.zeros((count, count))
                for first, slot in np.ndindex(count, count):
                    one, other = (
                        {cell for cell in cells if of[cell] == of_} for of, of_ in ((near, first), (won, slot))
                    )
                    overlap[first, slot] = len(one & other) / max(1, len(one | other)) + 1e-6 * (last[first] == slot)
                ways = list(itertools.permutations(range(count)))
                last = ways[np.argmax([sum(overlap[first, slot] for first, slot in enumerate(way)) for way in ways])]
            looked = [list(one) for one in own]
            if look == 0:
                for cell in cells:
                    looked[last.index(won[cell])].append(token[cell])
            score = np.zeros((count, *mask.shape[1:]))
            for first, slot in enumerate(last):
                for cell in cells:
                    apart = weight and weight * far(token[cell], looked[first], deviation)
                    score[(first, *cell)] = np.log(mask[(slot, *cell)] + 1e-4) - apart
            if look == 0:
                for cell in cells:
                    own[int(np.argmax(score[(slice(None), *cell)]))].append(token[cell])
            found.append(last)
            scores.append(score)
    scores = np.array(scores) / max(1.0, weight / 2)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return np.array(found), shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("seed", "weight", "looks"),
    [(seed, (0.0, 0.5, 16.0)[seed // 2], looks) for seed in range(6) for looks in (1, 2)]
    + [(seed, 16.0, 1) for seed in range(3)],
)
def test_slots_and_masks_equal_explicit_loops(seed, weight, looks):
    features, masks = scene(torch.Generator().manual_seed(seed))
    if seed % 3 == 1:
        masks[:, 2] = 0.0  # a slot that never wins
    if seed % 3 == 2:
        masks[2:4, 1] = 0.0  # and one that is hidden for two frames
    known, found, settled = run_appearance(features, masks, weight=weight)
    if looks == 2:
        again, found, settled = run_appearance(features, masks, weight=weight, known=replace(known, whole=True))
        assert again.sums is known.sums and again.cells is known.cells and again.moments is known.moments
    expected, by_cell = by_hand(features, masks, weight, looks)
    assert np.array_equal(found.numpy(), expected) and settled.dtype == torch.float32
    np.testing.assert_allclose(settled.numpy(), by_cell, rtol=1e-4, atol=1e-6)


class TestSettling:
    def test_slots_can_be_fixed_despite_their_appearance(self):
        winners = torch.tensor([[0, 0, 1, 1]])
        features = torch.tensor([-1.0, 1.0])[winners].expand(1, 1, -1)
        known = run_appearance(features[None], one_hot(winners, 2)[None])[0]
        swapped = one_hot(1 - winners, 2)
        last = torch.arange(2)
        assert known.step(features, swapped, WHOLE, last, 2.0).successors.tolist() == [1, 0]
        assert known.step(features, swapped, WHOLE, last, 2.0, same=True).successors.tolist() == [0, 1]

    @pytest.mark.parametrize("constant", [-3.6, 0.1, 1e6, 1e-30, 0.0])
    @pytest.mark.parametrize("offset", [0.0, 1e4])
    def test_constant_channel_has_no_influence(self, constant, offset):
        features, masks = scene(torch.Generator().manual_seed(9), grid=(13, 17))  # cdist multiplies so many
        features = features.double() + offset
        _, found, settled = run_appearance(features, masks, weight=16.0)
        padded = torch.cat([features, torch.full_like(features[:, :1], constant)], dim=1)
        # means over six channels instead of five
        _, same, by_cell = run_appearance(padded, masks, weight=16.0 * 6 / 5)
        assert torch.equal(same, found)
        scale = (16 / 2) / (16 * 6 / 5 / 2)
        apart = by_cell.double().log().diff(dim=1)
        expected = scale * settled.double().log().diff(dim=1)
        assert torch.allclose(apart, expected, rtol=1e-3, atol=1e-3)


class TestAssignment:
    def test_single_cell_suffices_for_the_appearance_of_a_slot(self):
        winners = torch.tensor([[0, 1, 2, 2, 2]])
        features = torch.tensor([5.0, -5.0, 0.0])[winners].expand(2, 1, -1, -1)
        masks = torch.stack([one_hot(winners, 3), one_hot(torch.tensor([1, 0, 2])[winners], 3)])
        assert run_appearance(features, masks)[1].tolist() == [[0, 1, 2], [1, 0, 2]]

    def test_equals_stay_where_they_were(self):
        features = torch.zeros(3, 2, 2, 2)
        winners = torch.tensor([[0, 1], [2, 3]])
        masks = one_hot(winners, 4).expand(3, -1, -1, -1)
        known = run_appearance(features[:1], masks[:1])[0]
        last = torch.tensor([2, 0, 3, 1])
        assert torch.equal(known.step(features[1], masks[1], WHOLE, last, 2.0).successors, last)

    @pytest.mark.parametrize("grid", [(1, 1), (1, 3)])
    def test_one_slot_and_few_cells(self, grid):
        features, masks = scene(torch.Generator().manual_seed(0), slots=1, grid=grid)
        assert run_appearance(features, masks)[1].tolist() == [[0]] * 6


@pytest.mark.parametrize(("valid", "rows", "columns"), [((0.75, 1.0), 3, 6), ((0.65, 0.7), 3, 4), ((0.01, 0.5), 1, 3)])
def test_padding_does_not_count(valid, rows, columns):
    features, masks = scene(torch.Generator().manual_seed(5))
    known, found, settled = run_appearance(features, masks, valid)
    cut, expected, by_cell = run_appearance(features[..., :rows, :columns], masks[..., :rows, :columns])
    assert torch.equal(found, expected) and known.cells.sum() == 6 * rows * columns
    assert torch.equal(known.moments, cut.moments) and settled.isfinite().all()
    assert torch.allclose(settled[..., :rows, :columns], by_cell)


def test_half_precision_is_summed_in_double():
    features, masks = scene(torch.Generator().manual_seed(2))
    features = (features / 50).to(torch.bfloat16)
    known, found, _ = run_appearance(features, masks.to(torch.bfloat16))
    same, expected, _ = run_appearance(features.double(), masks.to(torch.bfloat16))
    assert torch.equal(found, expected) and torch.equal(known.sums, same.sums) and known.sums.dtype == torch.float64
