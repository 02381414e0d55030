"""Leaderboard of the heads of a run, best first."""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from tabulate import tabulate

from dinoseg.utils.csv_text import write_csv

TABLE = "leaderboard.csv"  # in the run folder
_SHOWN_NOTE = 50  # characters


@dataclass(frozen=True)
class Row:
    """Results of one head; None means unknown."""

    name: str
    rate: float | None = None  # highest base learning rate
    best: float | None = None  # best value of the score that selects checkpoints
    best_step: int | None = None
    miou: float | None = None  # of the final evaluation, 0..1, like `accuracy`
    accuracy: float | None = None
    parameters: int | None = None  # of the head
    note: str = ""
    run: str = ""  # run folder


def leaderboard(rows: Sequence[Row], out_dir: Path, score: str, lowest: Collection[str], *, visible: bool) -> str:
    """Print the heads, best first, and write them to leaderboard.csv; return the name of the best head.

    Args:
        rows: one per head, in any order.
        out_dir: folder of the table.
        score: name of the score in `best`.
        lowest: names of scores for which lower is better.
        visible: whether this rank prints and writes.
    """
    sign = 1 if score in lowest else -1
    ordered = sorted(rows, key=lambda row: (row.best is None, sign * (row.best or 0.0)))
    if visible:
        share = score not in lowest  # a loss is not a share
        headers = [
            *(
                "head",
                "learning rate",
                f"best val/{score}{' %' * share}",
                "at step",
                "mIoU %",
                "pixel accuracy %",
                "parameters",
            ),
            "note",
        ]
        shown = [_shown(row, share) for row in ordered]
        aligned = ("left", *["right"] * 6, "left")
        print(f"\n{tabulate(shown, headers=headers, disable_numparse=True, colalign=aligned)}")
        _write(out_dir / TABLE, ordered, f"val_{score}")
        print(f"\nleaderboard:  {out_dir / TABLE}")
    return ordered[0].name


def _shown(row: Row, share: bool) -> list[str]:
    note = row.note if len(row.note) <= _SHOWN_NOTE else f"{row.note[: _SHOWN_NOTE - 4]} ..."
    percent = ["" if value is None else f"{100 * value:.2f}" for value in (row.miou, row.accuracy)]
    score = row.best if row.best is None or not share else 100 * row.best
    rate, best, parameters = (
        "" if value is None else format(value, form)
        for value, form in ((row.rate, "g"), (score, ".2f" if share else ".4f"), (row.parameters, ","))
    )
    step = "" if row.best_step is None else str(row.best_step)
    return [row.name, rate, best, step, *percent, parameters, note]


def _write(path: Path, rows: Sequence[Row], score: str) -> None:
    names = {"name": "head", "rate": "learning_rate", "best": score}
    columns = [names.get(field.name, field.name) for field in fields(Row)]
    write_csv(path, [columns, *(astuple(replace(row, note=row.note.replace("\n", " "))) for row in rows)])
