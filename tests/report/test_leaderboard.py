"""Leaderboard of a multi-head training."""

import csv
from types import SimpleNamespace

from torch import nn

from dinoseg.modes.train_heads import head_rows, write_leaderboard
from dinoseg.training.progress import Progress


def head(rate, size, best=None, best_step=0):
    return SimpleNamespace(
        run=SimpleNamespace(out_dir=f"runs/{size}"),
        model=SimpleNamespace(head=nn.Linear(size, 1, bias=False)),
        checkpoints=SimpleNamespace(progress=Progress(best=best, best_step=best_step)),
        rate=rate,
    )


HEADS = {
    "slow": head(0.001, 1000, 0.25, 10),
    "lost": head(0.01, 10),
    "good": head(1e-5, 2000, 0.75, 20),
}
SCORES = {"slow": {"miou": 0.2501, "accuracy": 0.5}, "good": {"miou": 0.7499, "accuracy": 0.9}}


def test_the_best_head_is_first_and_those_without_a_score_last(tmp_path, capsys):
    write_leaderboard(head_rows(HEADS, SCORES, {"lost": 3}, "miou", ["loss"]), tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    assert lines[2] == ["good", "1e-05", "75", "20", "74.99", "90", "2,000"]
    assert " ".join(lines[0]).startswith("head learning rate val mIoU % best step mIoU % pixel accuracy % parameters")
    assert [line[0] for line in lines[2:5]] == ["good", "slow", "lost"]
    with open(tmp_path / "leaderboard.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["head"] for row in table] == ["good", "slow", "lost"]
    assert table[0]["val_miou"] == "0.75" and table[1]["parameters"] == "1000" and table[2]["miou"] == ""
    assert table[2]["best_step"] == table[2]["val_miou"] == ""
    assert table[2]["note"].startswith("left the training at step 4") and not table[0]["note"]


def test_the_lowest_loss_is_first():
    rows = head_rows(HEADS, SCORES, {}, "loss", ["loss"])
    assert [row["head"] for row in rows] == ["slow", "good", "lost"] and rows[0]["val_loss"] == 0.25
