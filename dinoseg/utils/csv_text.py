"""CSV for spreadsheets: names from files and folders stay text and never run as formulas."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.utils.atomic import write_text
from dinoseg.utils.wording import one_line, printable

_FORMULA = re.compile('(^|;)(?=["\\s]*[=+\\-@\uff1d\uff0b\uff0d\uff20])')  # `;` separates cells in much of Europe


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows of values to a CSV file, converted by `csv_cells`.

    Raises:
        OSError: if the file cannot be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(csv_cells, rows))
    write_text(path, text.getvalue())


def write_csv_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header of `columns` and one line for each row; values of other keys are ignored."""
    write_csv(path, [columns, *([row.get(column) for column in columns] for row in rows)])


def csv_cells(row: Iterable[Any]) -> list[Any]:
    """Convert the values of a row to cells: a text that would be a formula gets an apostrophe, None becomes empty.

    Numbers stay numbers, even as text. Control characters and those that reverse the text direction are escaped.
    """
    return ["" if value is None else _as_text(value) if isinstance(value, str) else value for value in row]


def _as_text(value: str) -> str:
    text = one_line(printable(value)).replace("\t", "\\t")
    return text if _is_number(text) else _FORMULA.sub(r"\1'", text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
