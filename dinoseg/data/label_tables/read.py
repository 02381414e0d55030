"""Official label tables, stored as CSV files in this folder; imports no torch."""

import csv
from functools import lru_cache
from importlib.resources import files


@lru_cache
def label_table(name: str) -> tuple[dict[str, str], ...]:
    """Return the rows of a table, `idd` or `cityscapes`, as column to text."""
    text = files("dinoseg.data.label_tables").joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))
