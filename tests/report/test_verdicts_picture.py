import numpy as np
import pytest

from dinoseg.report.verdicts import SURELY_BETTER, SURELY_WORSE, UNSURE, verdicts_picture


def gaps(labels):
    kinds = (SURELY_BETTER, SURELY_WORSE, UNSURE)
    return {
        key: {"value": 0.01 * (n - 2), "ci95": [0.01 * n - 0.03, 0.01 * n - 0.01], "verdict": kinds[n % 3]}
        for n, key in enumerate(labels)
    }


def holds(picture, colour):
    return (picture == colour).all(axis=2).any()


def test_each_verdict_has_its_colour_and_each_side_its_panel():
    labels = {"miou": "mIoU", "iou/0": "IoU road", "iou/1": "IoU pole"}
    picture = verdicts_picture("a", labels, [("b", gaps(labels)), ("c", gaps(labels))])
    assert picture.dtype == np.uint8 and picture.shape[1] == pytest.approx(110 * 9.4, abs=1)
    for half in np.array_split(picture, 2, axis=1):
        assert holds(half, (0x00, 0x72, 0xB2)) and holds(half, (0xD5, 0x5E, 0x00)) and holds(half, (0x88, 0x88, 0x88))


def test_many_sides_take_further_lines_of_panels():
    labels = {"miou": "mIoU", "iou/0": "IoU road", "iou/1": "IoU pole"}
    four, six = (verdicts_picture("a", labels, [(str(n), gaps(labels)) for n in range(sides)]) for sides in (4, 6))
    assert four.shape[1] == six.shape[1] and six.shape[0] > 1.5 * four.shape[0]
    upper, lower = np.array_split(six, 2)
    assert holds(upper, (0x00, 0x72, 0xB2)) and holds(lower[:, : six.shape[1] // 2], (0x00, 0x72, 0xB2))
    assert not holds(lower[:, six.shape[1] * 3 // 5 :], (0x00, 0x72, 0xB2))  # six leave two places empty
    assert (six[six.shape[0] * 2 // 3 : -40, six.shape[1] * 3 // 5 :] == 255).all()


def test_panels_have_one_scale():
    labels = {"miou": "mIoU", "iou/0": "IoU road"}
    wide = {key: {**gap, "ci95": [-0.9, 0.9]} for key, gap in gaps(labels).items()}
    one, other = (verdicts_picture("a", labels, [("b", gaps(labels)), ("c", each)]) for each in (gaps(labels), wide))
    half = one.shape[1] // 2
    assert one.shape == other.shape and (one[:, :half] != other[:, :half]).any()


def test_names_that_end_alike_are_told_apart():
    labels = {"miou": "mIoU"}
    names = [f"adapter.rank={rank} optim.optimizer.lr=0.001 head=multiscale" for rank in (8, 16)]
    one, other = (verdicts_picture("a", labels, [(name, gaps(labels))]) for name in names)
    assert one.shape == other.shape and (one != other).any()
    one, other = (verdicts_picture(name, labels, [("b", gaps(labels))]) for name in names)
    assert one.shape == other.shape and (one != other).any()
    short = verdicts_picture("a", labels, [("b", gaps(labels))])  # a line less below and above
    assert short.shape[0] < one.shape[0] and holds(one, (0x00, 0x72, 0xB2))


@pytest.mark.parametrize("name", ["a$x_{$b", "lr_1e-3_" * 30, "\x1b[31m"])
def test_any_name_and_undefined_values_are_drawn(name):
    labels = {"miou": name, "iou/0": name}
    one = gaps(labels) | {"iou/0": {"value": None, "ci95": None, "verdict": "no verdict"}}
    assert verdicts_picture(name, labels, [(name, one)]).ndim == 3


def test_of_many_classes_those_that_differ_most_are_drawn():
    labels = {"miou": "mIoU"} | {f"iou/{n}": f"IoU {n}" for n in range(150)}
    few = dict(list(labels.items())[:40])
    assert (
        verdicts_picture("a", labels, [("b", gaps(labels))]).shape
        == verdicts_picture("a", few, [("b", gaps(few))]).shape
    )
