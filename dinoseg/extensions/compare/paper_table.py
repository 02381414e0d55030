"""Tables for papers, as Markdown and as LaTeX with booktabs."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from dinoseg.utils.atomic import write_text

MARKDOWN, LATEX = "table.md", "table.tex"
MAIN_SCORES = (
    "PQ",
    "AP",
    "miou",
)  # the first one that all runs have ranks them: of single objects before those of pixels
_MARKDOWN_ESCAPES = str.maketrans({**{character: f"\\{character}" for character in "\\`*_|<~"}, "\n": " ", "\r": " "})
_LATEX_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        # \\ takes a bracket or an asterisk after it for its own argument
        "[": "{[}",
        "]": "{]}",
        "*": "{*}",
        "±": r"$\pm$",
        "\n": " ",
        "\r": " ",
    }
)
# an interval after its score; \shortstack sets it below, so that several scores fit a page
_INTERVAL = re.compile(r"(\S.*?) (\{\[\}.*)")
_MINUS = re.compile(r"(?<![\w.-])-(?=\d)")


def find_main_score(scores: Collection[str]) -> str:
    """Return the name of the score that ranks runs, of those that all have."""
    return next(name for name in MAIN_SCORES if name in scores)


@dataclass(frozen=True)
class PaperTable:
    """A table for a paper.

    Args:
        caption: sentences that say what the numbers, and bold ones, mean.
        heads: headings of the columns.
        rows: cells as plain text.
        labels: number of columns on the left that are text.
        bold: rows and columns of the cells whose first word is bold.
        notes: lines on what is missing; comments in LaTeX.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    bold: Collection[tuple[int, int]] = ()
    notes: Sequence[str] = ()


class Score(NamedTuple):
    """A score over several runs; parts that are undefined are None.

    Args:
        value: the score.
        deviation: sample standard deviation.
        interval: 95 % interval.
        seeds: number of seeds behind the interval.
    """

    value: float | None
    deviation: float | None
    interval: Sequence[float] | None
    seeds: int


def format_score(score: Score, to_text: Callable[[float], str]) -> str:
    """Return a cell such as `80.12 ± 0.45 [79.00, 81.24] (2 seeds)`; a dash for an undefined score."""
    if score.value is None:
        return "-"
    deviation = "" if score.deviation is None else f" ± {to_text(score.deviation)}"
    interval = f" [{', '.join(map(to_text, score.interval))}]" if score.interval else ""
    return to_text(score.value) + deviation + interval + (" (2 seeds)" if score.interval and score.seeds == 2 else "")


def write_paper_tables(folder: Path, tables: Sequence[PaperTable]) -> None:
    """Write table.md and table.tex, which a paper can take by `\\input`."""
    write_text(folder / MARKDOWN, "\n".join(map(_to_markdown, tables)))
    package = "% needs \\usepackage{booktabs}\n"
    write_text(folder / LATEX, package + "\n".join(map(_to_latex, tables)))


def _to_markdown(table: PaperTable) -> str:
    rows = _mark_cells(table, _MARKDOWN_ESCAPES, "**{}**")
    aligned = ["left" if column < table.labels else "right" for column in range(len(table.heads))]
    heads = [head.translate(_MARKDOWN_ESCAPES) for head in table.heads]
    text = tabulate(rows, headers=heads, tablefmt="pipe", disable_numparse=True, colalign=aligned)
    paragraphs = [line.translate(_MARKDOWN_ESCAPES) for line in (table.caption, *table.notes)]
    return "\n\n".join((paragraphs[0], text, *paragraphs[1:])) + "\n"


def _to_latex(table: PaperTable) -> str:
    heads = [head.translate(_LATEX_ESCAPES) for head in table.heads]
    rows = [
        [
            *row[: table.labels],
            *(_INTERVAL.sub(r"\\shortstack[r]{\1\\\\\\scriptsize \2}", cell) for cell in row[table.labels :]),
        ]
        for row in _mark_cells(table, _LATEX_ESCAPES, r"\textbf{{{}}}")
    ]
    head, *body = [f"    {_MINUS.sub('$-$', ' & '.join(row))} \\\\" for row in (heads, *rows)]
    columns = "l" * table.labels + "r" * (len(heads) - table.labels)
    lines = [
        r"\begin{table}",
        r"  \centering\small",
        rf"  \caption{{{table.caption.translate(_LATEX_ESCAPES)}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        *(r"    \toprule", head, r"    \midrule", *body, r"    \bottomrule"),
        r"  \end{tabular}",
        r"\end{table}",
        *(f"% {' '.join(note.splitlines())}" for note in table.notes),
    ]
    return "\n".join(lines) + "\n"


def _mark_cells(table: PaperTable, escapes: dict[int, str], bold: str) -> list[list[str]]:
    """Return the escaped cells, with the first word of the bold ones set in `bold`."""
    marked = [[cell.translate(escapes) for cell in row] for row in table.rows]
    for row, column in table.bold:
        word, space, rest = marked[row][column].partition(" ")
        marked[row][column] = bold.format(word) + space + rest
    return marked
