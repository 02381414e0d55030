"""Official scores as a printed table."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

_MOST_CLASSES = 40  # a longer table is left to the file


def scores_table(result: Mapping[str, Any]) -> str:
    """Return the scores of `scoring.result` as text, in percent: per class where there are few, then the scores."""
    unit = result["unit"]
    parts = []
    if 0 < len(result["per_class"]) <= _MOST_CLASSES:
        rows = [[_cell(value, key) for key, value in row.items()] for row in result["per_class"]]
        headers = [key if key in ("id", "name") else f"{key} %" for key in result["per_class"][0]]
        parts.append(tabulate(rows, headers=headers, disable_numparse=True))
    rows = [[key, _percent(value), _interval(result["ci95"][key])] for key, value in result["scores"].items()]
    headers = [result["protocol"], "%", f"95 % interval over {result['n']} {unit}s"]
    parts.append(tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "left")))
    return "\n\n".join(parts)


def difference_table(differences: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """Return paired differences in percentage points as text."""
    rows = [[key, _percent(row["value"], "+"), _interval(row["ci95"], "+")] for key, row in differences.items()]
    count = next(iter(differences.values()))["n"]
    headers = ["second - first", "points", f"95 % interval over {count} shared {unit}s"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "left"))


def _cell(value: Any, key: str) -> str:
    return _percent(value) if isinstance(value, float) or value is None else str(value)


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"


def _interval(limits: list[float] | None, sign: str = "") -> str:
    return "-" if limits is None else f"{_percent(limits[0], sign)} .. {_percent(limits[1], sign)}"
