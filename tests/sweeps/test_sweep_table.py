"""How a sweep's table is shown and written."""

from dinoseg.sweeps.table import _print, _write


def test_a_number_of_many_digits_is_shown_by_six_and_written_whole(tmp_path, capsys):
    rows = [
        {"job": 0, "lr": "0.0012345678901234567", "data.root": "1.2.3.4.5.6.7", "miou": 0.5, "run": "r", "note": ""}
    ]
    _print(rows, ["lr", "data.root"], ["miou"])
    _write(tmp_path / "sweep.csv", rows, ["lr", "data.root"], ["miou"])
    shown = capsys.readouterr().out
    assert " 0.00123457 " in shown and " 1.2.3.4.5.6.7 " in shown
    assert "0.0012345678901234567" in (tmp_path / "sweep.csv").read_text()
