"""mode=compare: comparison of evaluations of the same images, from the files that mode=eval wrote."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.checkpoints.run_config import open_saved_data
from dinoseg.evaluation.image_report import PAGE
from dinoseg.evaluation.run_facts import about_run
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.compare.comparison import (
    MAX_NAME,
    against,
    best_first,
    find_best,
    find_bold,
    mean_image_scores,
    score_labels,
    scores_of,
    side_scores,
    verdicts,
    write_tables,
)
from dinoseg.extensions.compare.effects import effects_table, estimate_effects
from dinoseg.extensions.compare.page import ComparedRun, comparison_page
from dinoseg.extensions.compare.paper_table import (
    LATEX,
    MARKDOWN,
    PaperTable,
    find_main_score,
    format_score,
    write_paper_tables,
)
from dinoseg.extensions.compare.pooled_scores import build_metrics
from dinoseg.extensions.compare.side_names import swept_words
from dinoseg.extensions.compare.sides import (
    Side,
    describe_folds,
    describe_left_out,
    describe_seeds,
    describe_units,
    rename_sides,
    sides_of,
)
from dinoseg.report.table import CHOSEN_HERE, few_units, percent
from dinoseg.training.cost import COST
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json, write_text
from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
COLUMNS = {  # key of a row: heading and format
    "PQ": ("PQ %", lambda value: f"{100 * value:.2f}"),
    "AP": ("AP %", lambda value: f"{100 * value:.2f}"),
    "miou": ("mIoU %", lambda value: f"{100 * value:.2f}"),
    "accuracy": ("pixel accuracy %", lambda value: f"{100 * value:.2f}"),
    "parameters": ("parameters", "{:,}".format),
    "trainable": ("trained", "{:,}".format),
    "seconds": ("s per training image", "{:.3g}".format),
    "memory_gib": ("peak training memory, GiB", "{:.2f}".format),
}
_KEYS = {
    "parameters": forms.whole(),
    "trainable": forms.whole(),
    "images_per_s": forms.maybe(forms.number(1e-9, 1e9)),  # bounded so that its inverse is finite
    "memory_gib": forms.maybe(forms.number(0, 1e9)),
}
_MAX_COST_COLUMN = 13  # characters: the table fits a terminal of 120 columns


def run_rows(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Return a row for each run, by the main score; unknown values are None, and a damaged cost record is logged.

    Folds are scored on different images, so they are not ranked: they stand in their order at their side's score.
    """
    main = find_main_score(scores_of(sides[0].scored))
    rows = []
    ranks = []  # score that each row is sorted by
    runs = [(side, *run) for side in sides for run in zip(side.names, side.folders, side.records, strict=True)]
    for side, name, folder, record in runs:
        scores = scores_of([record])
        ranks.append(scores[main] if side.pooled is None else scores_of(side.scored)[main])
        trained = [folder, Path(record.source).parent.parent]  # run of mode=train, or the checkpoint's
        found = next((path for run in trained if (path := run / COST).is_file()), None)
        cost = (None if found is None else _read(found)) or dict.fromkeys(_KEYS)
        speed = cost.pop("images_per_s")
        seconds = 1 / speed if speed else None
        shown = {key: scores[key] for key in (main, "miou", "accuracy")}
        rows.append({"run": name, **shown, **cost, "seconds": seconds})
    return [rows[index] for index in best_first(ranks)]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return forms.read_json(path, forms.record(**_KEYS))
    except (OSError, forms.SchemaError) as error:
        logger.warning("%s is damaged (%s): the run's costs are left out. Remove it, or train again.", path, error)
        return None


def run(
    cfg: DictConfig,
    *,
    out_dir: Path,
    runs: str | Sequence[str | Sequence[str]] | None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare runs of mode=eval with the first of them: significance, differences by class and image, and costs.

    Args:
        cfg: the whole config.
        out_dir: the run folder.
        runs: run folders of mode=eval on the same images, or of trainings, whose final evaluation is used. Several
            seeds and folds of one side form a list of their own, or are found by their configs. A text is the folder
            of a sweep.
        names: of the sides, in their order; None: the options in which they differ, or their folders.

    Raises:
        UserError: there are fewer than two runs, they are not comparable, or the names do not fit the sides.
    """
    builder = Builder(cfg)
    sides = sides_of(runs, partial(build_metrics, builder))
    if names is not None:
        sides = rename_sides(sides, names)
    first, record = sides[0], sides[0].scored[0]
    open_data = partial(open_saved_data, builder, root=record.root, split=record.split)
    others = against(sides, open_data)
    units = record.count_units()
    intervals = describe_units(sides)
    seeds = describe_seeds(sides)
    folds = describe_folds(sides)
    left_out = {name: None for side in sides if side.pooled for name in side.pooled.left_out}
    if left_out:
        logger.warning("%s", describe_left_out([*left_out]))
    rows = run_rows(sides)
    print(f"{costs_table(rows)}\n\n{verdicts(first, others)}")
    print(f"points:       minus {first.name}\nintervals:    {intervals}\nseeds:        {seeds}")
    if folds:
        print(f"folds:        {folds}")
    if few := few_units(units, record.unit):
        logger.warning("%s", few)
    chosen = [side.name for side in sides if side.chosen_here]
    if chosen:
        seeds += f". {join_names(chosen)}: {CHOSEN_HERE}"
        logger.warning("%s: %s", join_names(chosen), CHOSEN_HERE)
    write_tables(out_dir, first, others)
    write_paper_tables(out_dir, result_tables(sides))
    columns = [key for key in ("run", *COLUMNS) if key in rows[0]]
    write_csv_table(out_dir / "runs.csv", columns, rows)  # scores in 0..1; unknown values are empty cells
    scores = scores_of(first.scored)
    result = {
        "sides": {side.name: [str(folder) for folder in side.folders] for side in sides},
        "folds": {side.name: len(side.pooled.seeds) for side in sides if side.pooled is not None},
        "first": first.name,
        "scores": scores,
        "others": {other.name: {"scores": other.scores, "differences": other.differences} for other in others},
        "units": units,
        "unit": record.unit,
        "chosen_here": chosen,
    }
    write_json(out_dir / "compare.json", result)
    facts = {
        f"run {name}": f"{folder.resolve()}, model {run_record.source}"
        for side in sides
        for name, folder, run_record in zip(side.names, side.folders, side.records, strict=True)
    }
    page = comparison_page(
        record,
        ComparedRun(first.name, scores, mean_image_scores(first)),
        others,
        subtitle=f"data={record.data}, split {record.split}, {count_of(record.images, 'image')}",
        intervals=intervals,
        seeds=f"{seeds}. Folds: {folds}" if folds else seeds,
        about=about_run(out_dir, builder.yaml, facts),
    )
    write_text(out_dir / PAGE, page)
    print(f"report:       {out_dir}/{PAGE}, compare.csv, compare.json, images.csv")
    print(f"runs:         {out_dir}/runs.csv")
    print(f"for a paper:  {out_dir}/{MARKDOWN}, {LATEX}")
    return {"miou_difference": others[-1].differences["miou"]["value"], "run": str(out_dir)}


def costs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `run` and `COLUMNS`, in their order, as text, without columns that all runs lack."""
    columns = {key: column for key, column in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    shown = [[row["run"], *("-" if row[key] is None else columns[key][1](row[key]) for key in columns)] for row in rows]
    heads = ["run", *(head for head, _ in columns.values())]
    return tabulate(
        shown,
        headers=heads,
        disable_numparse=True,
        colalign=("left", *["right"] * len(columns)),
        maxcolwidths=[MAX_NAME, *[None] * len(columns)],  # tabulate fails to wrap numbers with commas
        maxheadercolwidths=[MAX_NAME, *[_MAX_COST_COLUMN] * len(columns)],
    )


def result_tables(sides: Sequence[Side]) -> list[PaperTable]:
    """Return the scores of all sides for a paper, best first, and main effects if all runs are jobs of sweeps."""
    main = find_main_score(scores_of(sides[0].scored))
    ranked = [sides[index] for index in best_first([scores_of(side.scored)[main] for side in sides])]
    best, labels = find_best(ranked), score_labels(ranked[0])
    bold, note = find_bold(best, ranked, len(ranked))
    rows = [
        [side.name, str(side.seeds), *(format_score(scores[key], partial(percent, digits=2)) for key in best)]
        for side, scores in zip(ranked, map(side_scores, ranked), strict=True)
    ]
    heads = ["side", "seeds", *(f"{labels[key]} %" for key in best)]
    cells = [(row, 2 + [*best].index(key)) for key, row in bold.items()]
    notes = [f"seeds: {describe_seeds(sides)}.", *(f"folds: {line}." for line in [describe_folds(sides)] if line)]
    record = sides[0].scored[0]
    units = record.count_units()
    over = (
        f"{count_of(units, record.unit)}, and over seeds where a side has several"
        if units > 1
        else f"seeds alone, as there is one {record.unit}"
    )
    mean = "Mean ± standard deviation over seeds" if any(side.seeds > 1 for side in ranked) else "Score"
    pooled = " Folds are pooled." if describe_folds(sides) else ""
    caption = f"{mean}, [95 % interval] over {over}.{pooled} {note}"
    tables = [PaperTable(caption, heads, rows, 1, cells, notes)]
    words = swept_words([folder for side in sides for folder in side.folders])
    if all(words):
        settings = [{key: word.partition("=")[2] for key, word in of_run.items()} for of_run in words]
        records = [record for side in sides for record in side.records]
        effects, freedom = estimate_effects(settings, [scores_of([record])[main] for record in records])
        if effects:
            tables.append(
                effects_table(effects, freedom, f"{labels[main]} %", lambda value, sign: percent(value, 2, sign))
            )
    return tables
