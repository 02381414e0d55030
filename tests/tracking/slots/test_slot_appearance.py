import itertools
import math

import numpy as np
import pytest
import torch

from dinoseg.tracking.slots.appearance import Appearance

WHOLE = (1.0, 1.0)


def one_hot(winners, num_slots):
    """Masks (S, h, w) that are surest of the slots in `winners` (h, w)."""
    return torch.stack([torch.where(winners == slot, 0.6, 0.1) for slot in range(num_slots)])


def scene(generator, frames=6, slots=4, width=5, grid=(4, 6)):
    """Features (T, C, h, w) and masks (T, S, h, w) of any kind."""
    features = torch.randn(frames, width, *grid, generator=generator) * torch.tensor([1.0, 30.0, 0.01, 1.0, 5.0])[
        :width, None, None
    ] + 100 * torch.randn(width, 1, 1, generator=generator)
    return features, torch.rand(frames, slots, *grid, generator=generator)


def slots_of(features, masks, valid=WHOLE):
    """The slot of each frame (T, S) that each of the first frame's is."""
    known = Appearance.start(features[0], masks[0], valid)
    found = [torch.arange(masks.shape[1])]
    for frame, mask in zip(features[1:], masks[1:], strict=True):
        known, successors = known.step(frame, mask, valid, found[-1])
        found.append(successors)
    return known, torch.stack(found)


def by_hand(features, masks):
    """The same, cell by cell and permutation by permutation."""
    features, count = features.double().numpy(), masks.shape[1]
    own = [[] for _ in range(count)]  # all features that an identity has won
    every, found = [], []
    for time, frame in enumerate(features):
        won = [[] for _ in range(count)]
        for row, column in np.ndindex(frame.shape[1:]):
            won[int(np.argmax(masks[time, :, row, column].numpy()))].append(frame[:, row, column])
            every.append(frame[:, row, column])
        if time == 0:
            best = tuple(range(count))
        else:
            deviation = np.std(every, axis=0)
            known = [np.mean(one, axis=0) / deviation if one else None for one in own]
            now = [np.mean(one, axis=0) / deviation if one else None for one in won]
            pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations([k for k in known if k is not None], 2)]
            scale = np.mean(pairs) if pairs and np.mean(pairs) > 0 else 1.0
            costs = np.ones((count, count))
            for first, slot in np.ndindex(count, count):
                if known[first] is not None and now[slot] is not None:
                    costs[first, slot] = np.linalg.norm(known[first] - now[slot]) / scale
                sizes = (len(own[first]) / time + 1) / (len(won[slot]) + 1)
                costs[first, slot] += 0.2 * abs(math.log(sizes))
            ways = list(itertools.permutations(range(count)))
            best = ways[np.argmin([sum(costs[first, slot] for first, slot in enumerate(way)) for way in ways])]
        for first, slot in enumerate(best):
            own[first] += won[slot]
        found.append(best)
    return np.array(found)


class TestAssignment:
    @pytest.mark.parametrize("seed", range(12))
    def test_is_that_of_a_loop_over_cells_and_permutations(self, seed):
        features, masks = scene(torch.Generator().manual_seed(seed))
        if seed % 3 == 1:
            masks[:, 2] = -1  # a slot that never wins
        if seed % 3 == 2:
            masks[2:4, 1] = -1  # and one that is hidden for two frames
        assert np.array_equal(slots_of(features, masks)[1].numpy(), by_hand(features, masks))

    def test_a_slot_that_takes_another_s_object_is_given_back(self):
        winners = torch.tensor([[0, 0, 1], [0, 2, 2]])
        looks = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # of the objects
        features = looks[winners].movedim(-1, 0).expand(4, -1, -1, -1)
        orders = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 1, 2]])  # the slot that has each object
        masks = torch.stack([one_hot(order[winners], 3) for order in orders])
        assert torch.equal(slots_of(features, masks)[1], orders)

    def test_size_tells_where_looks_do_not(self):
        features = torch.ones(2, 1, 2, 4)
        many, few = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        masks = torch.stack([one_hot(many, 2), one_hot(few, 2)])
        assert slots_of(features, masks)[1].tolist() == [[0, 1], [1, 0]]

    def test_a_single_cell_tells_how_a_slot_looks(self):
        winners = torch.tensor([[0, 1, 2, 2, 2]])
        features = torch.tensor([5.0, -5.0, 0.0])[winners].expand(2, 1, -1, -1)
        masks = torch.stack([one_hot(winners, 3), one_hot(torch.tensor([1, 0, 2])[winners], 3)])
        assert slots_of(features, masks)[1].tolist() == [[0, 1, 2], [1, 0, 2]]

    def test_equals_stay_where_they_were(self):
        features = torch.zeros(3, 2, 2, 2)
        winners = torch.tensor([[0, 1], [2, 3]])
        masks = one_hot(winners, 4).expand(3, -1, -1, -1)
        known = Appearance.start(features[0], masks[0], WHOLE)
        last = torch.tensor([2, 0, 3, 1])
        assert torch.equal(known.step(features[1], masks[1], WHOLE, last)[1], last)

    def test_a_channel_counts_in_its_own_deviation(self):
        generator = torch.Generator().manual_seed(3)
        features, masks = scene(generator)
        expected = slots_of(features, masks)[1]
        units = torch.tensor([1e-3, 1.0, 1e4, 7.0, 1.0])[:, None, None]
        assert torch.equal(slots_of(features * units + 11.0, masks)[1], expected)
        constant = torch.cat([features, torch.full_like(features[:, :1], 0.1)], dim=1)
        assert torch.equal(slots_of(constant, masks)[1], expected)

    @pytest.mark.parametrize("grid", [(1, 1), (1, 3)])
    def test_one_slot_and_few_cells(self, grid):
        features, masks = scene(torch.Generator().manual_seed(0), slots=1, grid=grid)
        assert slots_of(features, masks)[1].tolist() == [[0]] * 6


class TestPadding:
    @pytest.mark.parametrize(
        ("valid", "rows", "columns"), [((0.75, 1.0), 3, 6), ((0.65, 0.7), 3, 4), ((0.01, 0.5), 1, 3)]
    )
    def test_does_not_count(self, valid, rows, columns):
        features, masks = scene(torch.Generator().manual_seed(5))
        known, found = slots_of(features, masks, valid)
        cut, expected = slots_of(features[..., :rows, :columns], masks[..., :rows, :columns])
        assert torch.equal(found, expected) and known.cells.sum() == 6 * rows * columns
        assert torch.equal(known.moments, cut.moments)


def test_half_precision_is_summed_in_double():
    features, masks = scene(torch.Generator().manual_seed(2))
    features = (features / 50).to(torch.bfloat16)
    known, found = slots_of(features, masks.to(torch.bfloat16))
    same, expected = slots_of(features.double(), masks.to(torch.bfloat16))
    assert torch.equal(found, expected) and torch.equal(known.sums, same.sums) and known.sums.dtype == torch.float64
