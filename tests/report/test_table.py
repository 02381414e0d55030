"""Tables of scores and costs, on a terminal and as files."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinoseg.extensions.compare.compare_mode import costs_table
from dinoseg.metrics.confusion import ConfusionMatrix, LayerCounts
from dinoseg.report.table import class_statistics, class_table, write_scores_csv
from dinoseg.utils.atomic import write_json

NAMES = ["background", "tool, long", "thread", "clamp"]


@pytest.fixture
def scores():
    confusion = ConfusionMatrix(4, background=0)
    confusion.update(torch.tensor([[[0, 0, 1, 1, 0, 0]]]), torch.tensor([[[0, 0, 0, 1, 2, 255]]]))
    return confusion.compute()


def test_class_table_lists_each_class_and_marks_absent_ones(scores):
    lines = class_table(scores, NAMES, 0).splitlines()
    by_name = {name: next(line for line in lines if f" {name} " in line) for name in NAMES[1:]}
    assert by_name["tool, long"].split()[-5:] == ["50.0", "66.7", "100.0", "50.0", "1"]
    assert by_name["thread"].split()[-5:] == ["0.0", "0.0", "0.0", "-", "1"]
    assert "absent" in by_name["clamp"]
    means = {line[:25].strip(): line[25:].split()[0] for line in lines[-5:]}
    assert means["mIoU"] == f"{100 * (2 / 4 + 1 / 2 + 0) / 3:.1f}"
    assert means["mIoU without background"] == "25.0"
    assert "without class 0, background" in lines[-4]
    assert "background" not in class_table(scores, ["sky", *NAMES[1:]])


def test_metrics_are_in_percent_or_numbers(scores):
    metric = SimpleNamespace(
        scores={"share": "max", "area": "min"}, unbounded=("area",), class_columns=(), advise=lambda _: ""
    )
    lines = class_table({**scores, "share": 0.4075, "area": 1.5}, NAMES, metrics=[metric]).splitlines()
    assert [line.split() for line in lines[-2:]] == [["share", "40.8", "%"], ["area", "1.5"]]


def test_table_without_pixels_marks_all_classes_absent():
    text = class_table(ConfusionMatrix(4).compute(), NAMES)
    assert text.count("absent") == 4 and "mIoU" in text


def test_accuracy_of_layers_counts_decisions_of_all_classes():
    counts = LayerCounts(2)
    counts.update(torch.ones(1, 2, 1, 4), torch.tensor([[[[1, 1, 0, 255]], [[0, 0, 0, 1]]]]))
    lines = class_table(counts.compute(), ["smoke", "tool"]).splitlines()
    assert "pixel accuracy 42.9 % of all decisions, present or absent" in [" ".join(line.split()) for line in lines]


def test_csv_and_json_hold_the_numbers(scores, tmp_path):
    write_scores_csv(tmp_path / "deep" / "scores.csv", scores, NAMES)
    write_json(tmp_path / "scores.json", scores)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    with open(tmp_path / "deep" / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == NAMES
    heads = ["id", "class", "iou", "dice", "precision", "recall", "pixels", "predicted_pixels"]
    assert [*rows[0]] == heads and "accuracy" not in scores["classes"][0]  # of a class, it is the recall
    assert float(rows[0]["iou"]) == scores["classes"][0]["iou"]
    assert rows[3]["iou"] == "" and rows[2]["precision"] == "" and rows[2]["iou"] == "0.0"


def test_statistics_follow_the_format_line_by_line():
    mask = np.zeros((40, 50), np.uint8)
    mask[:13, :] = 2
    mask[39, 49] = 3
    assert class_statistics(mask, NAMES).split("\n") == [
        "Segmentation statistics",
        "=" * 50,
        "Total pixels: 2,000",
        "Classes found: 3",
        "",
        "Class distribution:",
        "-" * 50,
        " 0: background                -    1,349 px (67.45%)",
        " 2: thread                    -      650 px (32.50%)",
        " 3: clamp                     -        1 px ( 0.05%)",
        "",
    ]


ROWS = [
    dict(run="a", miou=0.75, accuracy=0.9, parameters=22_000_000, trainable=10_000, seconds=0.5, memory_gib=2.0),
    dict(run="b", miou=0.5, accuracy=0.8, parameters=300_000_000, trainable=None, seconds=0.0125, memory_gib=None),
    dict(run="c", miou=None, accuracy=None, parameters=None, trainable=None, seconds=None, memory_gib=None),
]


def test_costs_table_shows_known_values():
    said = costs_table(ROWS)
    assert "75.00" in said and "300,000,000" in said and "0.0125" in said and said.splitlines()[-1].count("-") == 6
    assert "GiB" not in costs_table(ROWS[1:]) and "mIoU" in costs_table(ROWS[1:])
