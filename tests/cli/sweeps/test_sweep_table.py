"""How a sweep's table is shown and written."""

import pytest

from dinoseg.cli.sweeps.table import FOLD, _print, _write, over_folds


@pytest.mark.parametrize(("ignored", "miou"), [(None, 1.5 / 3), (0, 1.5 / 2)])
def test_pooled_means_leave_out_the_ignored_class(ignored, miou):
    matrix = [[0, 0, 0], [1, 1, 0], [0, 0, 4]]
    fold = {"job": 0, "note": "", "miou": None, "matrix": matrix, "ignored_class": ignored}
    (row,) = over_folds([fold | {FOLD: "0"}, fold | {FOLD: "1"}], [], ["miou"])
    assert row["folds"] == 2 and row["miou"] == pytest.approx(miou)


def test_long_number_is_rounded_on_screen_but_not_in_the_file(tmp_path, capsys):
    rows = [
        {"job": 0, "lr": "0.0012345678901234567", "data.root": "1.2.3.4.5.6.7", "miou": 0.5, "run": "r", "note": ""}
    ]
    _print(rows, ["lr", "data.root"], ["miou"])
    _write(tmp_path / "sweep.csv", rows, ["lr", "data.root"], ["miou"])
    shown = capsys.readouterr().out
    assert " 0.00123457 " in shown and " 1.2.3.4.5.6.7 " in shown
    assert "0.0012345678901234567" in (tmp_path / "sweep.csv").read_text()
