"""What ids mean to the pooled semantic scores: binary masks, and those that are no class."""

import numpy as np
import pytest
from score_making import save, scores, tree

from dinoseg.metrics.protocols.contract import BadFile, ScoringCase
from dinoseg.metrics.protocols.semantic import Semantic


def path(number):
    return f"{number}.png"


def test_binary_masks_are_two_classes(tmp_path):
    rng = np.random.default_rng(11)
    pairs = [tuple((rng.random((9, 7)) < share).astype(int) for _ in range(2)) for share in (0.2, 0.5, 0, 1)]
    as_ids = tree(tmp_path / "as ids", pairs, path)
    for name, factors in (("both", (255, 255)), ("predicted ids", (255, 1)), ("ids", (1, 1))):
        drawn = [(reference * factors[0], guess * factors[1]) for reference, guess in pairs]
        folders = tree(tmp_path / name, drawn, path)
        protocol = Semantic(binary=True, nsd=True, tolerance=0)
        found = scores(protocol, *folders)
        expected = scores(Semantic(num_classes=2, nsd=True, tolerance=0), *as_ids)
        assert found == expected and 0 < found["NSD"] < 1
        assert protocol.rules["ignore"] == "nothing" and "binary" in protocol.rules
    good, grey = save(tmp_path / "good.png", [[0, 255]]), save(tmp_path / "grey.png", [[255, 128]])
    mixed = save(tmp_path / "mixed.png", [[1, 255]])
    for files, bad, ids in (((good, grey), grey, 128), ((mixed, good), mixed, 1)):
        with pytest.raises(
            BadFile, match=f"holds the ids {ids} in 1 pixels. A binary mask holds only 0 and 255"
        ) as error:
            protocol.measure(ScoringCase("a", "a", (files,)))
        assert error.value.path == bad


def test_references_of_0_and_255_alone_are_warned_of(tmp_path):
    masks = [np.array([[0, 255, 0]]), np.zeros((1, 3))]
    folders = tree(tmp_path / "a", [(mask, mask) for mask in masks], path)
    for options in ({"num_classes": 2}, {"num_classes": 19}):
        found = Semantic(**options).find(*folders)
        assert len(found.cases) == 2 and "holds 0 and 255 alone" in found.notes[0]
        assert "set the protocol's binary=true" in found.notes[0]
    for options in (
        {"binary": True},
        {"num_classes": 1},
        {"num_classes": 2, "ignore_index": 9},
        {"num_classes": 2, "reduce_zero_label": True},
    ):
        found = Semantic(**options).find(*folders)
        assert len(found.cases) == 2 and not found.notes
    for number, further in enumerate(([[0, 1, 255]], [[2, 2, 2]])):
        folders = tree(tmp_path / f"b{number}", [(mask, mask) for mask in [*masks, np.array(further)]], path)
        found = Semantic(num_classes=3).find(*folders)
        assert len(found.cases) == 3 and not found.notes
    for number, alone in enumerate((0, 255)):
        folders = tree(tmp_path / f"c{number}", [(np.full((2, 2), alone),) * 2], path)
        found = Semantic(num_classes=3).find(*folders)
        assert len(found.cases) == 1 and not found.notes


def test_one_foreign_id_is_offered_to_be_ignored(tmp_path):
    guess = save(tmp_path / "guess.png", [[0, 1, 1]])
    for stored, options, message in (
        ([[0, 1, 11]], {}, "set num_classes, ignore_index=11 to ignore these pixels, or correct it"),
        ([[1, 2, 5]], {"reduce_zero_label": True}, "set num_classes, ignore_index=4 to ignore"),
        ([[0, 11, 12]], {}, "255 is ignored: set num_classes or correct it"),
        ([[0, 11, 255]], {}, "255 is ignored: set num_classes or correct it"),
    ):
        reference = save(tmp_path / "reference.png", stored)
        with pytest.raises(BadFile, match=message):
            Semantic(num_classes=4, **options).measure(ScoringCase("a", "a", ((reference, guess),)))
    case = ScoringCase("a", "a", ((save(tmp_path / "reference.png", [[1, 2, 5]]), guess),))
    assert Semantic(num_classes=4, reduce_zero_label=True, ignore_index=4).measure(case).sums[:4].sum() == 2
