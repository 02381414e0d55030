"""mode=compare: evaluations of the same images held against one another; reads what mode=eval has left of them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.evaluation.about import about_run
from dinoseg.evaluation.collected import image_mious
from dinoseg.evaluation.comparison import against, aligned, comparison_table, run_names, scores_of, write_tables
from dinoseg.evaluation.image_record import evaluated, read_record
from dinoseg.evaluation.image_report import PAGE
from dinoseg.evaluation.run_costs import run_rows
from dinoseg.images import write_png
from dinoseg.report.costs import costs_picture, costs_table, write_costs
from dinoseg.report.html.comparison import ComparisonReport, comparison_page
from dinoseg.report.scores import few_units
from dinoseg.storage.atomic import write_json, write_text
from dinoseg.wording import count_of, typed

_MOST = 8  # runs: a page of more is no comparison but a table, which a sweep writes
logger = logging.getLogger(__name__)


def run(cfg: DictConfig, *, out_dir: Path, runs: Sequence[str] | None) -> dict[str, Any]:
    """Hold runs of mode=eval against the first of them, and show what each scores and costs, best first.

    Args:
        cfg: the whole config.
        out_dir: the run folder.
        runs: run folders of mode=eval on the same images, or of trainings, for the evaluation at their end.

    Raises:
        UserError: fewer than two, or runs that do not compare.
    """
    folders = _folders(runs)
    places = [evaluated(folder) for folder in folders]
    records = aligned({folder: read_record(place) for folder, place in zip(folders, places, strict=True)})
    names, first = run_names(folders), records[0]
    others = against(cfg, places, records, names)
    told = zip(names, folders, records, strict=True)
    facts = {f"run {name}": f"{folder.resolve()}, model {record.source}" for name, folder, record in told}
    report = ComparisonReport(
        said=f"data={first.data}, split {first.split}, {count_of(first.images, 'image')}",
        classes=first.classes,
        palette=first.palette,
        ignore_index=first.ignore_index,
        images=first.images,
        units=len(set(first.units)),
        unit=first.unit,
        first=names[0],
        scores=scores_of(first),
        mious=image_mious(first.counts),
        others=others,
        about=about_run(cfg, out_dir, facts),
    )
    rows = run_rows(names, folders, records)
    print(f"{costs_table(rows)}\n\n{comparison_table(names[0], first, others)}")
    units = count_of(report.units, report.unit)
    print(f"\npoints:       less {names[0]}; intervals over {units}" + ("" if report.units > 1 else ", which has none"))
    if few := few_units(report.units, report.unit):
        logger.warning("%s", few)
    write_tables(out_dir, names[0], first, others)
    write_costs(out_dir / "runs.csv", rows)
    picture = costs_picture(rows)
    if picture is not None:
        write_png(out_dir / "runs.png", picture)
    results = {other.name: {"scores": other.scores, "differences": other.differences} for other in others}
    result = {
        "runs": [str(folder) for folder in folders],
        "first": names[0],
        "scores": report.scores,
        "others": results,
    }
    write_json(out_dir / "compare.json", {**result, "units": report.units, "unit": report.unit})
    write_text(out_dir / PAGE, comparison_page(report))
    print(f"report:       {out_dir}/{PAGE}, compare.csv, compare.json, images.csv")
    print(f"runs:         {out_dir}/runs.csv{', runs.png' * (picture is not None)}")
    return {"miou_difference": others[-1].differences["miou"]["value"], "run": str(out_dir)}


def _folders(runs: Sequence[str] | None) -> list[Path]:
    names = [] if runs is None or isinstance(runs, str) else list(runs)
    folders = [Path(str(name)).expanduser() for name in names]
    if not 2 <= len(folders) <= _MOST or len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(
            f"runs={typed(runs)}: give 2 to {_MOST} different run folders of mode=eval or mode=train, "
            "such as runs=[outputs/a/eval_1,outputs/b/eval_1]."
        )
    return folders
