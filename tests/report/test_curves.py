import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dinoseg.report import curves
from dinoseg.report.curves import draw_curves
from dinoseg.report.log import RunLog
from dinoseg.utils.images import read_image

BLUE, VERMILION = (0, 114, 178), (213, 94, 0)
TRAINING = [{"step": step, "train/loss": 2 / step, "train/lr": 0.1} for step in range(1, 120)]
VALIDATION = [{"step": 10, "val/loss": 1.0, "val/miou": 0.2, "val/accuracy": 0.5}]


def holds(path, colour):
    return bool((read_image(path) == colour).all(axis=2).any())


def draw(rows, folder):
    log = RunLog(folder)
    for row in rows:
        log.scalars(row["step"], {key: value for key, value in row.items() if key != "step"})
    log.close()
    return draw_curves(folder, "miou", 10)


def titles(rows, score="miou"):
    return [axes.get_title(loc="left") for axes in curves.curves_figure(rows, score, 10).axes]


def test_scores_with_values_have_a_panel(tmp_path):
    assert titles(TRAINING + VALIDATION) == ["loss", "pixel accuracy", "mean IoU"]
    assert titles(TRAINING) == ["loss"]
    assert titles([{"step": 3, "val/loss": 1.0, "val/fg_ari": 0.5}]) == ["loss", "FG-ARI"]
    assert titles([{"step": 3, "train/confident": 0.5, "train/pseudo_accuracy": None}]) == ["pseudo-labels"]
    whole = draw(TRAINING + VALIDATION, tmp_path)
    assert holds(whole, BLUE) and holds(whole, VERMILION)
    assert not holds(draw(VALIDATION, tmp_path), BLUE)


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "train/loss": None, "val/miou": math.nan}], [{"step": 3, "train/loss": math.inf}]]
)
def test_empty_curves_show_a_note_and_no_line(rows, tmp_path):
    path = draw(rows, tmp_path)
    assert titles(rows) == ["loss"] and not holds(path, BLUE) and not holds(path, VERMILION)
    assert (read_image(path) != 255).any()  # the words


@pytest.mark.parametrize(
    ("score", "values", "title", "best"),
    [
        ("miou", (0.5, 0.7), "mean IoU", "best 50.00 % at step 10"),  # not the highest: the selected one counts
        ("loss", (0.5, 0.25), "loss", "best 0.5 at step 10"),
        ("boundary_iou", (0.25, 0.5), "boundary_iou", "best 25.00 % at step 10"),
        ("surface_distance", (12.5, 3.0), "surface_distance", "best 12.5 at step 10"),
    ],
)
def test_the_selecting_score_has_a_panel_and_the_star(score, values, title, best):
    rows = [{"step": step, "val/loss": 2.0, "val/miou": 0.1} for step in (10, 20)]
    rows = [{**row, f"val/{score}": value} for row, value in zip(rows, values, strict=True)]
    assert titles(rows, score)[-1] == (title if score != "loss" else "mean IoU")
    stars = {
        axes.get_title(loc="left"): text.get_text()
        for axes in curves.curves_figure(rows, score, 10).axes
        for text in axes.get_legend().get_texts()
        if text.get_text().startswith("best")
    }
    assert stars == {title: best}


@pytest.mark.parametrize("steps", [(10, 20), range(10, 500, 10)])  # points, and running means with longer names
def test_legends_cover_neither_curves_nor_labels(steps):
    kinds = ("train/loss", "val/loss", "train/miou", "val/miou", "val/miou_no_background")
    figure = curves.curves_figure([{"step": step, **dict.fromkeys(kinds, 0.5)} for step in steps], "miou", 10)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent(renderer)
        labels = [label.get_window_extent(renderer) for label in (axes.xaxis.label, *axes.get_xticklabels())]
        assert not any(legend.overlaps(box) for box in (axes.bbox, *labels))
        assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= figure.bbox.x1
    for left, right in itertools.pairwise(axes.get_legend().get_window_extent(renderer) for axes in figure.axes):
        assert left.x1 <= right.x0


def test_points_are_finite_sorted_and_the_last_of_a_step():
    rows = [{"step": step, "x": value} for step, value in ((9, 3.0), (1, 1.0), (9, 4.0), (5, math.nan), (7, None))]
    rows.append({"step": 6})
    assert curves._points(rows, "x").tolist() == [[1, 1], [9, 4]]


def test_running_mean_is_centred():
    points = np.stack([np.arange(200), 3.0 * np.arange(200)], axis=1)
    mean = curves._running_mean(points)
    assert np.allclose(mean, points[5:-5])


def test_pyplot_is_not_imported():
    code = "import sys; from dinoseg.report.curves import draw_curves; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
