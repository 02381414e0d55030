import itertools

import cv2
import numpy as np
import pytest
import torch

from dinoseg.tracking.slots import matching as slot_matching
from dinoseg.tracking.slots.matching import Correspondence, cosine, give, owners, soft_iou, winners
from dinoseg.utils.errors import UserError


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestSoftIou:
    @pytest.mark.parametrize(("first", "second", "grid"), [(3, 4, (5, 7)), (1, 1, (1, 1)), (6, 2, (9, 2))])
    def test_is_the_sum_of_minima_over_the_sum_of_maxima(self, first, second, grid):
        one, other = draw(first, *grid), draw(second, *grid, seed=1)
        a, b = one.double().numpy(), other.double().numpy()
        expected = [[np.minimum(x, y).sum() / np.maximum(x, y).sum() for y in b] for x in a]
        np.testing.assert_allclose(soft_iou(one, other).numpy(), expected, rtol=1e-5)

    def test_hard_masks_give_the_iou(self):
        one, other = draw(4, 8, 8) > 0.5, draw(5, 8, 8, seed=3) > 0.7
        expected = [[float((x & y).sum() / (x | y).sum()) for y in other] for x in one]
        np.testing.assert_allclose(soft_iou(one.float(), other.float()).numpy(), expected, rtol=1e-6)

    def test_empty_masks_give_zero(self):
        assert not soft_iou(torch.zeros(2, 3, 3), torch.cat([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])).any()


def test_cosine_knows_no_lengths_and_survives_zeros():
    one = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[0.1, 0.1], [-7.0, 0.0], [0.0, 2.0]]).bfloat16()
    torch.testing.assert_close(cosine(one, other), torch.tensor([[0.5**0.5, -1, 0], [0, 0, 0]]))


def dense_correspondence(similarities, temperature):
    """The product in plain numbers, and of all assignments the one of greatest sum, at each step."""
    size = len(similarities[0])
    path = [[float(i == j) for j in range(size)] for i in range(size)]
    for step in similarities:
        weights = [[np.exp(value / temperature) for value in row] for row in step.double().tolist()]
        edges = [[value / sum(row) for value in row] for row in weights]
        path = [[sum(path[i][k] * edges[k][j] for k in range(size)) for j in range(size)] for i in range(size)]
        sums = {p: sum(path[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(size))}
        yield path, max(sums, key=sums.get)


class TestCorrespondence:
    @pytest.mark.parametrize(("size", "temperature"), [(4, 0.05), (5, 0.3), (2, 1.0), (1, 0.05)])
    def test_equals_the_dense_one(self, size, temperature):
        similarities = [draw(size, size, seed=seed) for seed in range(4)]
        correspondence = Correspondence.start(size)
        for similarity, (matrix, places) in zip(
            similarities, dense_correspondence(similarities, temperature), strict=True
        ):
            correspondence = correspondence.step(similarity, temperature)
            np.testing.assert_allclose(correspondence.matrix.numpy(), matrix, rtol=1e-9)
            assert tuple(correspondence.successors.tolist()) == places

    def test_goes_through_swaps(self):
        correspondence, orders = Correspondence.start(3), [(1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)]
        expected = [0, 1, 2]
        for order in orders:
            correspondence = correspondence.step(torch.eye(3)[list(order)], 0.05)
            expected = [order[place] for place in expected]
            assert correspondence.successors.tolist() == expected
        assert expected != [0, 1, 2]

    def test_still_follows_when_the_product_has_forgotten_all(self):
        generator = torch.Generator().manual_seed(5)
        correspondence, expected = Correspondence.start(4), torch.arange(4)
        for _ in range(400):
            order = torch.randperm(4, generator=generator)
            correspondence = correspondence.step(0.2 + 0.1 * torch.eye(4)[order], 0.05)
            expected = order[expected]
            assert torch.equal(correspondence.successors, expected)
        assert (correspondence.matrix - correspondence.matrix.mean(0)).abs().max() < 1e-12

    def test_step_does_not_modify_the_original(self):
        start = Correspondence.start(2)
        start.step(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 0.05)
        assert torch.equal(start.matrix, torch.eye(2).double()) and start.successors.tolist() == [0, 1]


def boxes(*areas, grid=(6, 8)):
    """Masks of ones in row and column ranges."""
    masks = torch.zeros(len(areas), *grid)
    for mask, (top, bottom, left, right) in zip(masks, areas, strict=True):
        mask[top:bottom, left:right] = 1
    return masks


class TestOwners:
    shares = boxes((0, 6, 0, 8), (1, 4, 1, 4), (2, 5, 5, 7))
    shares[0] -= shares[1] + shares[2]

    def test_slots_serve_the_object_they_overlap_most(self):
        slots = boxes((0, 1, 0, 8), (1, 3, 1, 4), (3, 4, 1, 4), (2, 5, 4, 7), (5, 6, 0, 8))
        assert owners(slots, self.shares, [0, 7, 3]) == [0, 7, 7, 3, 0]

    def test_unserved_object_gets_the_best_background_slot(self):
        slots = boxes((0, 6, 0, 4), (0, 6, 4, 8), (0, 2, 0, 8), (4, 6, 0, 8))
        assert owners(slots, self.shares, [0, 1, 2])[:2] == [1, 2]

    def test_equals_a_plain_search(self):
        for seed in range(5):
            slots = draw(8, 6, 8, seed=seed).softmax(0) * 3
            a, b = slots.double().numpy(), self.shares.double().numpy()
            table = np.array([[np.minimum(x, y).sum() / np.maximum(x, y).sum() for y in b] for x in a])
            expected = table.argmax(1).tolist()
            while missing := [one for one in (1, 2) if one not in expected]:
                free = [slot for slot, one in enumerate(expected) if one == 0]
                slot, one = max(itertools.product(free, missing), key=lambda pair: table[pair])
                expected[slot] = one
            assert owners(slots, self.shares, [0, 1, 2]) == expected

    def test_too_few_slots_are_refused(self):
        with pytest.raises(UserError, match=r"2 slots cannot track 2 objects.*slots.lock_on=true.*head.num_slots"):
            owners(boxes((0, 3, 0, 8), (3, 6, 0, 8)), self.shares, [0, 1, 2])

    def test_no_objects(self):
        assert owners(boxes((0, 3, 0, 8), (3, 6, 0, 8)), torch.ones(1, 6, 8), [0]) == [0, 0]


class TestGive:
    def test_the_greatest_overlap_goes_first(self):
        own = [0, 0, 0, 5]
        give(own, {8: np.array([0.3, 0.2, 0.1, 0.9]), 9: np.array([0.4, 0.0, 0.1, 0.0])})
        assert own == [9, 8, 0, 5]

    def test_the_background_gives_even_where_an_object_overlaps_more(self):
        own = [0, 5, 5, 0]
        give(own, {9: np.array([0.1, 0.9, 0.2, 0.3])})
        assert own == [0, 5, 5, 9]

    def test_objects_give_only_where_the_background_cannot(self):
        own = [0, 5, 5, 6]
        give(own, {9: np.array([0.9, 0.1, 0.2, 0.9])})
        assert own == [0, 5, 9, 6]
        with pytest.raises(UserError, match="4 slots cannot track 4 objects"):
            give(own, {10: np.zeros(4)})

    def test_empty_assignment_changes_nothing(self):
        own = [0]
        give(own, {})
        assert own == [0]


class TestWinners:
    @pytest.mark.parametrize(
        ("size", "valid"), [((24, 40), (1.0, 1.0)), ((23, 37), (23 / 24, 37 / 40)), ((3, 5), (1, 1))]
    )
    @pytest.mark.parametrize("at_once", [1, 2**25])
    def test_is_where_a_class_has_the_greatest_of_its_slots(self, size, valid, at_once, monkeypatch):
        monkeypatch.setattr(slot_matching, "_AT_ONCE", at_once)
        masks, serves = draw(7, 3, 5), np.array([0, 2, 2, 1, 0, 1, 1])
        found = serves[winners(masks, size, valid).numpy()]
        full = (round(size[0] / valid[0]), round(size[1] / valid[1]))
        maps = [cv2.resize(mask.double().numpy(), full[::-1], interpolation=cv2.INTER_LINEAR) for mask in masks]
        if size == (3, 5):
            maps = masks.double().numpy()
        classes = np.stack(
            [np.max([m for m, one in zip(maps, serves, strict=True) if one == k], axis=0) for k in range(3)]
        )
        classes = classes[:, : size[0], : size[1]]
        ordered = np.sort(classes, axis=0)
        clear = ordered[-1] - ordered[-2] > 1e-5
        assert found.shape == size and clear.mean() > 0.99
        assert np.array_equal(found[clear], classes.argmax(0)[clear])

    def test_ties_are_won_by_the_first_slot(self):
        assert not winners(torch.ones(3, 2, 2), (4, 4), (1, 1)).any()
