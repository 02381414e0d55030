"""Report sections on the run: training curves, command, versions, machine and config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinoseg.report.html.charts import MAX, Axes, Points, around, line_chart, thinned
from dinoseg.report.html.page import Section, block, paragraph
from dinoseg.report.html.tables import plain_cell, table

_CURVES = (
    ("Loss", {"training": "train/loss", "validation": "val/loss"}, "loss"),
    ("mIoU", {"training": "train/miou", "validation": "val/miou"}, "mIoU"),
    ("Pixel accuracy", {"training": "train/accuracy", "validation": "val/accuracy"}, "accuracy"),
)


@dataclass(frozen=True)
class About:
    """Provenance of a run.

    Args:
        command: command line, ready to type.
        facts: names and values of versions, machine, checkpoint and so on.
        config: config as YAML.
    """

    command: str
    facts: Mapping[str, str]
    config: str


def about_sections(about: About) -> list[Section]:
    """Return the section on the run, with the whole config collapsed."""
    rows = [[plain_cell(name), plain_cell(value)] for name, value in about.facts.items()]
    command, config = block("Command", about.command, shut=False), block("Config", about.config)
    facts = table([("what", "text"), ("value", "long")], rows, "Versions and machine")
    return [Section("run", "Run", command + facts + config)]


def training_section(rows: Sequence[Mapping[str, Any]] | None) -> Section:
    """Return the training curves of the model."""
    if not rows:
        return Section("training", "Training", paragraph("The run folder of the checkpoint has no metrics.jsonl."))
    charts = []
    for title, keys, name in _CURVES:
        curves = [(label, points) for label, key in keys.items() if (points := _points(rows, key))]
        if not curves:
            continue
        steps = [x for _, points in curves for x, _ in points]
        values = [y for _, points in curves for _, y in points]
        axes = Axes(
            around(steps) if len(set(steps)) > 1 else (steps[0] - 1, steps[0] + 1),
            around(values, zero=True),
            "step",
            name,
        )
        charts.append(line_chart(title, curves, axes))
    note = paragraph(f"From the run's metrics.jsonl; curves of more than {MAX} points are averaged over neighbours.")
    return Section("training", "Training", note + f'<div class="charts">{"".join(charts)}</div>')


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Return the steps and finite values of a curve."""
    known = {row["step"]: float(row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])}
    return thinned(sorted(known.items()))
