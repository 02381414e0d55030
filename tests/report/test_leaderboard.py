import csv

from dinoseg.modes.train_heads import Row, leaderboard

ROWS = (
    Row("slow", 0.001, 0.25, 10, 0.2501, 0.5, 1000, run="runs/slow"),
    Row("lost", note="dropped out. Step 3:\nthe loss is nan, and what is told of it is longer than a table would show"),
    Row("good", 1e-5, 0.75, 20, 0.7499, 0.9, 2_000_000, run="runs/good"),
)


def test_the_best_stands_first_and_those_without_a_score_last(tmp_path, capsys):
    assert leaderboard(ROWS, tmp_path, "miou", ["loss"], visible=True) == "good"
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    assert [line[0] for line in lines[2:5]] == ["good", "slow", "lost"]
    assert "val/miou %" in " ".join(lines[0])
    assert lines[2] == ["good", "1e-05", "75.00", "20", "74.99", "90.00", "2,000,000"]
    with open(tmp_path / "leaderboard.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["head"] for row in table] == ["good", "slow", "lost"]
    assert table[0]["val_miou"] == "0.75" and table[1]["parameters"] == "1000" and table[2]["miou"] == ""
    assert table[2]["note"].endswith("than a table would show") and "\n" not in table[2]["note"]


def test_of_losses_the_lowest_is_best_and_other_ranks_write_nothing(tmp_path, capsys):
    assert leaderboard(ROWS, tmp_path, "loss", ["loss"], visible=False) == "slow"
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_loss_is_no_share(tmp_path, capsys):
    leaderboard(ROWS, tmp_path, "loss", ["loss"], visible=True)
    lines = capsys.readouterr().out.splitlines()
    assert "val/loss  " in lines[1] and " 0.2500 " in lines[3]
