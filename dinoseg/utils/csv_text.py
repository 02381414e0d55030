"""CSV that a spreadsheet opens: names from files and folders stay text and are never run as formulas."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.utils.atomic import write_text
from dinoseg.utils.wording import one_line, printable

_FORMULA = re.compile('(^|;)(?=["\\s]*[=+\\-@\uff1d\uff0b\uff0d\uff20])')  # `;` ends cells in much of Europe


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows of values to a CSV file, as `csv_cells` writes them.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(csv_cells, rows))
    write_text(path, text.getvalue())


def write_csv_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the header `columns` and a line for each row; values of other keys are left out."""
    write_csv(path, [columns, *([row.get(column) for column in columns] for row in rows)])


def csv_cells(row: Iterable[Any]) -> list[Any]:
    """Return the values of a row as cells: text that would be a formula begins with an apostrophe, None is empty.

    Numbers stay numbers, written as text too. Control characters and those that turn text around are escaped.
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
