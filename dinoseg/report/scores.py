"""Official scores as a text table."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from dinoseg.utils.wording import count_of

_MAX_CLASSES = 40  # longer tables are in the file only
FEW = 10  # units: with fewer, intervals cover less than 95 % (benchmarks/interval_coverage.py)


def scores_table(result: Mapping[str, Any]) -> str:
    """Return the scores of `scoring.summary` as text, in percent: class scores for few classes, then the totals."""
    unit = result["unit"]
    parts = []
    if 0 < len(result["per_class"]) <= _MAX_CLASSES:
        columns = {key: [row[key] for row in result["per_class"]] for key in result["per_class"][0]}
        shares = {
            key for key, values in columns.items() if all(value is None or type(value) is float for value in values)
        }
        rows = [[_percent(row[key]) if key in shares else row[key] for key in columns] for row in result["per_class"]]
        headers = [f"{key} %" if key in shares else key for key in columns]
        parts.append(tabulate(rows, headers=headers, disable_numparse=True))
    none = _no_interval(result["n"], unit)
    rows = [
        [key, _percent(value), *_interval(result["ci95"][key], none, result["n"])]
        for key, value in result["scores"].items()
    ]
    parts.append(_interval_table(rows, [result["protocol"], "%"], f"{unit}s"))
    return "\n\n".join(parts)


def few_units(units: int, unit: str) -> str:
    """Return a warning about intervals over few units; empty for enough units, or for too few to have intervals."""
    if not 2 <= units < FEW:
        return ""
    return (
        f"The 95 % intervals are over {count_of(units, unit)}: with fewer than {FEW} their true coverage is lower, "
        "much lower for rare classes."
    )


def difference_table(differences: Mapping[str, Mapping[str, Any]], unit: str, scored_unit: str) -> str:
    """Return paired differences as text, in percentage points; intervals are over groups of scored units."""
    counts = next(iter(differences.values()))
    none = _no_interval(counts["n"], unit)
    rows = [
        [key, _percent(row["value"], "+"), *_interval(row["ci95"], none, row["n"], "+")]
        for key, row in differences.items()
    ]
    table = _interval_table(rows, ["second - first", "points"], f"shared {unit}s")
    if not counts["n"]:
        return f"second - first: none. No {scored_unit} could be scored in both folders."
    left_out = (
        f"Left out of this difference: {count_of(counts['left_out'], 'file')} or sequences scored in only one folder."
    )
    return f"{table}\n{left_out}" if counts["left_out"] else table


def _interval_table(rows: list[list[str]], headers: list[str], units: str) -> str:
    columns = ("left", "right", "left", "right")
    return tabulate(rows, headers=[*headers, "95 % interval", f"over {units}"], disable_numparse=True, colalign=columns)


def _no_interval(units: int, unit: str) -> str:
    """Return the placeholder for a missing interval."""
    return f"- (needs two {unit}s)" if units < 2 else "-"


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"


def _interval(limits: list[float] | None, none: str, units: int, sign: str = "") -> tuple[str, str]:
    """Return an interval as text, and its number of units."""
    text = none if limits is None else f"{_percent(limits[0], sign)} .. {_percent(limits[1], sign)}"
    return text, str(units)
