import csv

import numpy as np
import pytest

from dinoseg.modes.compare import COLUMNS, costs_picture, costs_table, write_costs

ROWS = [
    dict(run="a", miou=0.75, accuracy=0.9, parameters=22_000_000, trainable=10_000, seconds=0.5, memory_gib=2.0),
    dict(run="b", miou=0.5, accuracy=0.8, parameters=300_000_000, trainable=None, seconds=0.0125, memory_gib=None),
    dict(run="c", miou=None, accuracy=None, parameters=None, trainable=None, seconds=None, memory_gib=None),
]


def test_the_table_has_what_is_known(tmp_path):
    said = costs_table(ROWS)
    assert "75.00" in said and "300,000,000" in said and "0.0125" in said and said.splitlines()[-1].count("-") == 6
    assert "GiB" not in costs_table(ROWS[1:]) and "mIoU" in costs_table(ROWS[1:])
    write_costs(tmp_path / "runs.csv", ROWS)
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as file:
        a, b, c = csv.DictReader(file)
    assert [*a] == ["run", *COLUMNS] and float(a["miou"]) == 0.75 and b["memory_gib"] == "" and c["run"] == "c"


@pytest.mark.parametrize(("rows", "panels"), [(ROWS, 2), (ROWS[:1], 0), (ROWS[1:], 0), ([ROWS[0]] * 2, 3), ([], 0)])
def test_a_score_is_drawn_against_costs_that_two_runs_are_known_by(rows, panels):
    picture = costs_picture(rows)
    if not panels:
        assert picture is None
        return
    height, width, _ = picture.shape
    assert (height, width) == (440, 110 * (1 + 4 * panels)) and picture.dtype == np.uint8
    blue = (picture == (0x00, 0x72, 0xB2)).all(axis=2)
    assert all(part.any() for part in np.array_split(blue, panels, axis=1))


@pytest.mark.parametrize("name", ["a$x_{$b", "lr_1e-3_" * 30, "\x1b[31m", "\u65e5"])
def test_a_run_is_drawn_whatever_its_name(name):
    assert costs_picture([{**ROWS[0], "run": name}, ROWS[1]]).shape[0] == 440
