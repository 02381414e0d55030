import pytest
import torch

from dinoseg.tracking.slots.propagation import lock
from dinoseg.tracking.slots.settings import SlotTracking


def shares_of(rows):
    """Shares (ids, h, w) of a drawing with a letter for each cell: its own id alone."""
    ids = sorted({letter for row in rows for letter in row})
    return torch.tensor([[[float(letter == one) for letter in row] for row in rows] for one in ids])


SCENE = shares_of(["....", ".aa.", ".aab"])


def settings(**values):
    return SlotTracking(lock_on=True, **values)


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
