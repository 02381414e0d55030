"""The heads of a run beside one another, the best first."""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from tabulate import tabulate

from dinoseg.utils.csv_text import write_csv

TABLE = "leaderboard.csv"  # in the run folder
_SHOWN_NOTE = 50  # letters


@dataclass(frozen=True)
class Row:
    """A head; None: it is not known."""

    name: str
    rate: float | None = None  # highest base learning rate
    best: float | None = None  # the validation's score that decides, at its best
    best_step: int | None = None
    miou: float | None = None  # of the evaluation at the end, 0..1, as the next
    accuracy: float | None = None
    parameters: int | None = None  # of the head
    share: float | None = None  # of the time that training steps took, 0..1; backbone and reading are nobody's
    note: str = ""
    run: str = ""  # its folder


def leaderboard(rows: Sequence[Row], out_dir: Path, score: str, lowest: Collection[str], *, visible: bool) -> str:
    """Print heads and write them to leaderboard.csv, the best first; return the first one's name.

    Args:
        rows: in any order.
        out_dir: where the table goes.
        score: the name of `best`.
        lowest: scores of which the lowest is the best.
        visible: whether this rank prints and writes.
    """
    sign = 1 if score in lowest else -1
    ordered = sorted(rows, key=lambda row: (row.best is None, sign * (row.best or 0.0)))
    if visible:
        share = score not in lowest  # a loss is none
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
            *("time share %", "note"),
        ]
        shown = [_shown(row, share) for row in ordered]
        aligned = ("left", *["right"] * 7, "left")
        print(f"\n{tabulate(shown, headers=headers, disable_numparse=True, colalign=aligned)}")
        _write(out_dir / TABLE, ordered, f"val_{score}")
        print(f"\nleaderboard:  {out_dir / TABLE}")
    return ordered[0].name


def _shown(row: Row, share: bool) -> list[str]:
    note = row.note if len(row.note) <= _SHOWN_NOTE else f"{row.note[: _SHOWN_NOTE - 4]} ..."
    percent = ["" if value is None else f"{100 * value:.2f}" for value in (row.miou, row.accuracy)]
    time = "" if row.share is None else f"{100 * row.share:.1f}"
    score = row.best if row.best is None or not share else 100 * row.best
    rate, best, parameters = (
        "" if value is None else format(value, form)
        for value, form in ((row.rate, "g"), (score, ".2f" if share else ".4f"), (row.parameters, ","))
    )
    step = "" if row.best_step is None else str(row.best_step)
    return [row.name, rate, best, step, *percent, parameters, time, note]


def _write(path: Path, rows: Sequence[Row], score: str) -> None:
    names = {"name": "head", "rate": "learning_rate", "best": score, "share": "time_share"}
    columns = [names.get(field.name, field.name) for field in fields(Row)]
    write_csv(path, [columns, *(astuple(replace(row, note=row.note.replace("\n", " "))) for row in rows)])
