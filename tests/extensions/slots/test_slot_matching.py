import itertools
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from mistakes import refusals

from dinoseg.extensions.slots.tracker import matching as slot_matching
from dinoseg.extensions.slots.tracker.matching import Correspondence, assign_slots, cosine, owners, soft_iou, winners
from dinoseg.extensions.slots.tracker.propagation import lock
from dinoseg.extensions.slots.tracker.settings import SlotTracking


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("first", "second", "grid"), [(3, 4, (5, 7)), (1, 1, (1, 1)), (6, 2, (9, 2))])
def test_soft_iou_is_the_sum_of_minima_over_the_sum_of_maxima(first, second, grid):
    one, other = draw(first, *grid), draw(second, *grid, seed=1)
    np.testing.assert_allclose(soft_iou(one, other).numpy(), minima_over_maxima(one, other), rtol=1e-5)
    assert not soft_iou(torch.zeros_like(one), other).any() and not soft_iou(torch.zeros_like(one), one * 0).any()


def minima_over_maxima(one, other):
    a = one.double().numpy()
    b = other.double().numpy()
    return np.array([[np.minimum(x, y).sum() / np.maximum(x, y).sum() for y in b] for x in a])


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

    def test_still_follows_when_the_product_has_forgotten_all(self):
        generator = torch.Generator().manual_seed(5)
        correspondence = Correspondence.start(4)
        expected = torch.arange(4)
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

    def test_equals_a_plain_search(self):
        for seed in range(5):
            slots = draw(8, 6, 8, seed=seed).softmax(0) * 3
            table = minima_over_maxima(slots, self.shares)
            expected = table.argmax(1).tolist()
            while missing := [one for one in (1, 2) if one not in expected]:
                free = [slot for slot, one in enumerate(expected) if one == 0]
                slot, one = max(itertools.product(free, missing), key=lambda pair: table[pair])
                expected[slot] = one
            assert owners(slots, self.shares, [0, 1, 2]) == expected


test_message_names_value_and_remedy = refusals(
    {
        "two objects and two slots": (
            lambda: owners(boxes((0, 3, 0, 8), (3, 6, 0, 8)), TestOwners.shares, [0, 1, 2]),
            *("2 slots cannot track 2 objects", "slots.lock_on=true", "head.num_slots"),
        ),
        "a fourth object": (lambda: assign_slots([0, 5, 9, 6], {10: np.zeros(4)}), "4 slots cannot track 4 objects"),
    }
)


@pytest.mark.parametrize(
    ("own", "overlaps", "expected"),
    [
        ([0, 0, 0, 5], {8: [0.3, 0.2, 0.1, 0.9], 9: [0.4, 0.0, 0.1, 0.0]}, [9, 8, 0, 5]),  # the greatest goes first
        ([0, 5, 5, 0], {9: [0.1, 0.9, 0.2, 0.3]}, [0, 5, 5, 9]),  # the background gives, if an object overlaps more
        ([0, 5, 5, 6], {9: [0.9, 0.1, 0.2, 0.9]}, [0, 5, 9, 6]),  # objects give only where the background cannot
        ([0], {}, [0]),
    ],
)
def test_slots_are_given_by_overlap_first_of_the_background(own, overlaps, expected):
    assign_slots(own, {one: np.array(values) for one, values in overlaps.items()})
    assert own == expected


@pytest.mark.parametrize(("size", "valid"), [((24, 40), (1.0, 1.0)), ((23, 37), (23 / 24, 37 / 40)), ((3, 5), (1, 1))])
@pytest.mark.parametrize("at_once", [1, 2**25])
def test_a_pixel_is_won_by_the_class_of_the_greatest_slot(size, valid, at_once, monkeypatch):
    monkeypatch.setattr(slot_matching, "_AT_ONCE", at_once)
    masks = draw(7, 3, 5)
    serves = np.array([0, 2, 2, 1, 0, 1, 1])
    found = serves[winners(masks, size, valid).numpy()]
    full = (round(size[0] / valid[0]), round(size[1] / valid[1]))
    maps = [cv2.resize(mask.double().numpy(), full[::-1], interpolation=cv2.INTER_LINEAR) for mask in masks]
    if size == (3, 5):
        maps = masks.double().numpy()
    classes = np.stack([np.max([m for m, one in zip(maps, serves, strict=True) if one == k], axis=0) for k in range(3)])
    classes = classes[:, : size[0], : size[1]]
    ordered = np.sort(classes, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    assert found.shape == size and clear.mean() > 0.99
    assert np.array_equal(found[clear], classes.argmax(0)[clear])


def test_ties_are_won_by_the_first_slot():
    assert not winners(torch.ones(3, 2, 2), (4, 4), (1, 1)).any()


def shares_of(rows):
    """Shares (ids, h, w) of a drawing with a letter for each cell: its own id alone."""
    ids = sorted({letter for row in rows for letter in row})
    return torch.tensor([[[float(letter == one) for letter in row] for row in rows] for one in ids])


SCENE = shares_of(["....", ".aa.", ".aab"])


settings = partial(SlotTracking, lock_on=True)


def test_each_slot_attends_to_the_cells_of_its_object():
    allowed, serves, num_background = lock(SCENE, [0, 4, 9], settings(slots_per_object=2, background_slots=3))
    assert serves == [0, 0, 0, 4, 4, 9] and num_background == 3  # b has one cell, and one slot
    for cells, one in zip(allowed, serves, strict=True):
        assert torch.equal(cells, SCENE[[0, 4, 9].index(one)].bool())


def test_each_cell_goes_to_the_object_covering_it_most():
    shares = torch.tensor([[[0.6, 0.3, 0.5]], [[0.4, 0.5, 0.5]], [[0.0, 0.2, 0.0]]])
    allowed, serves, _ = lock(shares, [0, 1, 2], settings(background_slots=1))
    assert serves == [0, 1, 2]
    assert allowed[:, 0].int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]  # 2 has its best cell together with 1


def test_extra_slots_attend_to_the_foreground():
    background = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1]]).bool()
    allowed, serves, num_background = lock(SCENE, [0, 1, 2], settings(background_slots=2, extra_slots=5), background)
    assert serves == [0, 0, 1, 2, 0, 0] and num_background == 2
    extra = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(allowed[4], extra) and torch.equal(allowed[5], extra)
    assert torch.equal(allowed[0], SCENE[0].bool())  # slots of the background see those cells as well


def test_without_such_cells_there_are_no_extra_slots():
    nothing = torch.ones(3, 4, dtype=torch.bool)
    assert lock(SCENE, [0, 1, 2], settings(extra_slots=3), nothing).serves == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("extra_slots", [0, 2])
def test_the_background_has_a_slot_even_without_a_cell(extra_slots):
    full = shares_of(["aa", "ab"])
    shares = torch.cat([torch.zeros(1, 2, 2), full])
    background = torch.zeros(2, 2, dtype=torch.bool)
    allowed, serves, num_background = lock(shares, [0, 1, 2], settings(extra_slots=extra_slots), background)
    assert serves == [0, 1, 2] and num_background == 1 and not allowed[0].any()


def test_a_frame_without_objects():
    allowed, serves, _ = lock(torch.ones(1, 2, 1), [0], settings())
    assert serves == [0, 0] and allowed.all()  # no more slots than cells
