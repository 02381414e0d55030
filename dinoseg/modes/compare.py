"""mode=compare: comparison of evaluations of the same images, from the files that mode=eval wrote."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.evaluation.about import about_run
from dinoseg.evaluation.comparison import (
    against,
    mean_mious,
    score_labels,
    scores_of,
    verdicts,
    write_tables,
)
from dinoseg.evaluation.image_report import PAGE
from dinoseg.evaluation.run_costs import run_rows, side_rows
from dinoseg.evaluation.sides import Side, seeds_note, sides_of, units_note
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.run_config import open_saved_data
from dinoseg.report.costs import costs_picture, costs_table, write_costs
from dinoseg.report.html.comparison import ComparisonReport, comparison_page
from dinoseg.report.scores import few_units
from dinoseg.report.verdicts import verdicts_picture
from dinoseg.utils.atomic import write_json, write_text
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)


def run(cfg: DictConfig, *, out_dir: Path, runs: Sequence[str | Sequence[str]] | None) -> dict[str, Any]:
    """Compare runs of mode=eval with the first of them: significance, differences by class and image, and costs.

    Args:
        cfg: the whole config.
        out_dir: the run folder.
        runs: run folders of mode=eval on the same images, or of trainings, whose final evaluation is used. Several
            seeds of one side form a list of their own, or are found by their configs.

    Raises:
        UserError: there are fewer than two runs, or they are not comparable.
    """
    sides = sides_of(runs)
    report = _report(Builder(cfg), out_dir, sides)
    rows = run_rows(sides)
    costs = side_rows(sides, rows)
    print(f"{costs_table(costs)}\n\n{verdicts(sides[0], report.images, report.others)}")
    print(f"points:       minus {report.first}\nintervals:    {units_note(sides)}\nseeds:        {report.seeds}")
    if few := few_units(report.units, report.unit):
        logger.warning("%s", few)
    write_tables(out_dir, sides[0], report.others)
    write_costs(out_dir / "runs.csv", rows)
    picture = costs_picture(costs)
    if picture is not None:
        write_png(out_dir / "runs.png", picture)
    drawn = [(other.name, other.differences) for other in report.others]
    write_png(out_dir / "compare.png", verdicts_picture(report.first, score_labels(sides[0]), drawn))
    results = {other.name: {"scores": other.scores, "differences": other.differences} for other in report.others}
    result = {
        "sides": {side.name: [str(folder) for folder in side.folders] for side in sides},
        "first": report.first,
        "scores": report.scores,
        "others": results,
    }
    write_json(out_dir / "compare.json", {**result, "units": report.units, "unit": report.unit})
    write_text(out_dir / PAGE, comparison_page(report))
    print(f"report:       {out_dir}/{PAGE}, compare.png, compare.csv, compare.json, images.csv")
    print(f"runs:         {out_dir}/runs.csv{', runs.png' * (picture is not None)}")
    return {"miou_difference": report.others[-1].differences["miou"]["value"], "run": str(out_dir)}


def _report(build: Builder, out_dir: Path, sides: Sequence[Side]) -> ComparisonReport:
    first = sides[0].records[0]
    open_data = partial(open_saved_data, build, sides[0].places[0], root=first.root, split=first.split)
    facts = {
        f"run {name}": f"{folder.resolve()}, model {record.source}"
        for side in sides
        for name, folder, record in zip(side.names, side.folders, side.records, strict=True)
    }
    return ComparisonReport(
        said=f"data={first.data}, split {first.split}, {count_of(first.images, 'image')}",
        classes=first.classes,
        palette=first.palette,
        ignore_index=first.ignore_index,
        images=first.images,
        units=len(set(first.units)),
        unit=first.unit,
        intervals=units_note(sides),
        seeds=seeds_note(sides),
        first=sides[0].name,
        scores=scores_of(sides[0].records),
        mious=mean_mious(sides[0]),
        others=against(sides, open_data),
        about=about_run(out_dir, build.yaml, facts),
    )
