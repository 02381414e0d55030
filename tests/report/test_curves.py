import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from dinoseg.report import curves
from dinoseg.report.curves import draw_curves
from dinoseg.utils.images import read_image

BLUE, VERMILION = (0, 114, 178), (213, 94, 0)
TRAINING = [{"step": step, "train/loss": 2 / step, "train/lr": 0.1} for step in range(1, 120)]
VALIDATION = [{"step": 10, "val/loss": 1.0, "val/miou": 0.2, "val/accuracy": 0.5}]


def holds(path, colour):
    return bool((read_image(path) == colour).all(axis=2).any())


def draw(rows, folder):
    paths = draw_curves(rows, folder)
    assert [path.name for path in paths] == ["loss.png", "accuracy.png", "miou.png"]
    return paths


def test_a_whole_run(tmp_path):
    loss, accuracy, miou = draw(TRAINING + VALIDATION, tmp_path)
    assert holds(loss, BLUE) and holds(loss, VERMILION)
    assert holds(accuracy, VERMILION) and not holds(accuracy, BLUE)
    assert holds(miou, VERMILION)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "train/loss": None, "val/miou": float("nan")}],
        [{"step": 3, "train/loss": float("inf")}],
    ],
)
def test_nothing_to_draw_says_so_and_draws_no_line(rows, tmp_path):
    for path in draw(rows, tmp_path):
        assert not holds(path, BLUE) and not holds(path, VERMILION)
        assert (read_image(path) != 255).any()  # the words


def test_no_validation_yet(tmp_path):
    loss, accuracy, miou = draw(TRAINING[:1], tmp_path)
    assert holds(loss, BLUE)
    assert not holds(miou, VERMILION) and not holds(accuracy, VERMILION)


def test_one_validation(tmp_path):
    _, accuracy, miou = draw(VALIDATION, tmp_path)
    assert holds(accuracy, VERMILION) and holds(miou, VERMILION)


def test_points_are_finite_sorted_and_the_last_of_a_step():
    rows = [
        {"step": 9, "x": 3.0},
        {"step": 1, "x": 1.0},
        {"step": 9, "x": 4.0},
        {"step": 5, "x": math.nan},
        {"step": 6},
        {"step": 7, "x": None},
    ]
    assert curves._points(rows, "x").tolist() == [[1, 1], [9, 4]]


def test_running_mean_is_centred():
    points = np.stack([np.arange(200), 3.0 * np.arange(200)], axis=1)
    mean = curves._running_mean(points)
    assert np.allclose(mean[10:-10], points[10:-10])
    assert np.array_equal(mean[:, 0], points[:, 0])
    assert curves._running_mean(np.array([[1.0, 5.0]])).tolist() == [[1, 5]]


@pytest.mark.parametrize("start", [0.02, 0.9])
def test_small_differences_are_seen_and_the_axis_says_so(tmp_path, monkeypatch, start):
    """Also where a training score began near 0, before the first validation."""
    labels, label = [], Axes.set_ylabel
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, text: (labels.append(text), label(axes, text)))
    training = [{"step": step, "train/miou": max(start, 0.9)} for step in range(100, 1000, 100)]
    rows = [{"step": 10, "train/miou": start}, *training]
    rows += [{"step": step, "val/miou": 0.9 + step / 50_000} for step in range(100, 1001, 100)]
    _, _, miou = draw(rows, tmp_path)
    drawn = (read_image(miou) == VERMILION).all(axis=2).any(axis=1)
    assert drawn.sum() > 0.4 * len(drawn)
    assert labels[-1].startswith("mean IoU (axis starts at 0.8") and labels[-1].endswith(", not at 0)")


def test_a_validation_at_the_end_alone_leaves_the_training_curve_in_the_picture():
    training = np.array([[10, 0.02], [50, 0.3], [100, 0.8], [150, 0.95]])
    shown = curves._shown_values([training, np.array([[150, 0.9]])], share=True)
    assert shown.tolist() == [0.3, 0.8, 0.95, 0.9]


@pytest.mark.parametrize(
    ("lowest", "highest", "share", "limits"),
    [
        (0.1, 0.9, True, (0, 0.948)),
        (0.4, 1.0, True, (0, 1.036)),
        (0.9, 0.9, True, (0.8888, 0.9112)),
        (0.0, 0.0, False, (0, 0.56)),
        (-0.1, 0.1, True, (-0.112, 0.112)),
    ],
)
def test_an_axis_starts_at_0_where_the_values_are_near_it(lowest, highest, share, limits):
    assert curves._limits(lowest, highest, share=share) == pytest.approx(limits)
