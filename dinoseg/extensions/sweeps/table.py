"""Hydra callback for sweeps: refuses invalid cells before the first job and writes a table of all jobs at the end."""

import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import inf, isfinite
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.cli.typos import explain_errors
from dinoseg.config.composition import SHIPPED
from dinoseg.config.job import job_config
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.core.metric import INFINITE_IMAGES, RowMetric
from dinoseg.evaluation.scoring.intervals import mean_of
from dinoseg.extensions.compare.effects import FOLD, SEED, effects_table, estimate_effects
from dinoseg.extensions.compare.paper_table import (
    LATEX,
    MAIN_SCORES,
    MARKDOWN,
    PaperTable,
    Score,
    format_score,
    write_paper_tables,
)
from dinoseg.extensions.sweeps.folds import BuildMetrics, pool_matrix, pool_records
from dinoseg.extensions.sweeps.job_results import JobResults, describe_runs, find_swept_keys, list_runs
from dinoseg.extensions.sweeps.lifetime import end_with_sweep, note_sweep
from dinoseg.runs.location import locate_runs
from dinoseg.runs.log_file import LABEL
from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, printable

SHARES = {  # keys of a job's scores in 0..1 to columns in percent, as in the score tables
    "miou": "mIoU %",
    "miou_no_background": "mIoU without background %",
    "accuracy": "pixel accuracy %",
    "AP": "AP %",
    "AP50": "AP50 %",
    "PQ": "PQ %",
    "J&F-Mean": "J&F %",
    "FG-ARI": "FG-ARI %",
    "mBO": "mBO %",
}
LOSS = "val/loss"  # column of a job's `loss`, as in metrics.jsonl: a swept `loss=` has a column, too
_BOUNDS = {**dict.fromkeys(SHARES, (0.0, 1.0)), "FG-ARI": (-0.5, 1.0), LOSS: (0.0, inf)}
JOBS = "jobs.csv"  # one row per job, where folds or seeds are averaged
OTHERS = {LOSS: "z.4f", "parameters": ",", "trainable": ",", "images_per_s": ".1f", "memory_gib": ".2f"}
# the first one that any job has, or that is pooled over folds, is the sort key; without any, the lowest loss
RANKED = (*MAIN_SCORES, "J&F-Mean", "FG-ARI")
_ONE_BY_ONE = ".BasicLauncher"  # Hydra's own launcher, without a plug-in
_ON_THIS_MACHINE = (".JoblibLauncher", ".LocalLauncher")  # their jobs end with the sweep; those of a cluster continue
_LONGEST_NUMBER = 10  # characters
_SHOWN = 10  # maximum number of invalid cells in a message
DEVIATION, LOW, HIGH = "deviation", "low", "high"  # the last two: ends of the 95 % interval
_CAPTIONS = {
    "": "One run each.",
    "seeds": "Mean ± standard deviation over seeds, [95 % interval] over seeds.",
    "folds": "Score over all folds ± standard deviation over folds, [95 % interval] over images or groups and over "
    "seeds, each where there are several.",
}
Row = dict[str, Any]


def over_folds(
    rows: Sequence[Row], settings: Sequence[str], scores: Sequence[str], build_metrics: BuildMetrics | None = None
) -> list[Row]:
    """Return a row for each setting, with the number of folds that have a score under `folds`.

    The seeds of a fold are averaged. Scores count each image of all folds once: they come from the sum of the confusion
    matrices, or of layers and further metrics from the records of images. Their names are under `pooled`; other scores
    are None. If no setting has pooled scores, all are means over folds. Columns named after the score and a suffix hold
    the sample standard deviation over folds, and the ends of the 95 % interval over groups of images, as in
    mode=compare. They are None where undefined. There is no interval if a job has no record of its images, as with
    `mode.report=false`. If all images are one group, it is over seeds alone, and needs several in each fold.

    Args:
        rows: of all jobs.
        settings: swept keys except fold and seed.
        scores: keys to summarise.
        build_metrics: builds the further metrics that are pooled; None: there are none.
    """
    joined = []
    for jobs in _group_rows(rows, settings):
        folds = _group_rows(jobs, [FOLD])
        averaged = [_average(seeds, "seed", [FOLD, *settings], scores) for seeds in folds]
        row = _average(averaged, "fold", settings, scores)
        seeds_of_folds = [fold["seeds"] for fold in averaged if fold["seeds"]]
        row |= {"folds": len(seeds_of_folds), "seeds": min(seeds_of_folds, default=0)}
        if notes := [job["note"] for job in jobs if job["note"]]:
            row["note"] = f"{len(jobs) - len(notes)} of {count_of(jobs, 'job')}: {notes[0]}"
        matrices = [[job["matrix"] for job in seeds if job["matrix"] is not None] for seeds in folds]
        pooled: Row = {}
        if any(matrices):
            means = [np.mean(of_fold, axis=0) for of_fold in matrices if of_fold]
            pooled = pool_matrix(np.sum(means, axis=0), jobs[0])
        records, row["remark"] = pool_records([Path(job["run"]) for job in jobs if job.get("run")], build_metrics)
        # of layers, which have no matrix, and of further metrics
        pooled |= {key: score.value for key, score in records.items() if score.value is not None}
        for key in scores:
            found = records.get(key)
            row[f"{key} {LOW}"], row[f"{key} {HIGH}"] = (found and found.interval) or (None, None)
        joined.append(row | pooled | {"pooled": [*pooled]})
    for row in joined:
        if row["folds"] > 1 and any(each["pooled"] for each in joined):
            left_out = {*scores} - {*OTHERS, *row["pooled"]}
            row |= dict.fromkeys(f"{key} {part}".strip() for key in left_out for part in ("", DEVIATION))
    return joined


def over_seeds(rows: Sequence[Row], settings: Sequence[str], scores: Sequence[str]) -> list[Row]:
    """Return a row for each setting, with the number of seeds that have a score under `seeds`.

    Scores are means. Columns named after the score and a suffix hold the sample standard deviation and the ends of the
    95 % interval of the mean. The interval is Student's t over seeds. All three are None for one seed.

    Args:
        rows: of all jobs.
        settings: swept keys except the seed.
        scores: keys to summarise; integers are taken from the first seed, since seeds do not change them.
    """
    return [_average(seeds, "seed", settings, scores) for seeds in _group_rows(rows, settings)]


def _group_rows(rows: Sequence[Row], settings: Sequence[str]) -> list[list[Row]]:
    """Return the rows of each setting, in the order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in settings), []).append(row)
    return [*groups.values()]


def _average(rows: Sequence[Row], name: str, settings: Sequence[str], scores: Sequence[str]) -> Row:
    notes = [str(row["note"]) for row in rows if row["note"]]
    whole = len(rows) - len(notes)
    found: Row = {"job": ",".join(str(row["job"]) for row in rows), f"{name}s": whole}
    found["note"] = f"{whole} of {count_of(rows, name)}: {notes[0]}" if notes else ""
    for key in scores:
        values = [row[key] for row in rows if row.get(key) is not None]
        if any(row.get(f"{key}{INFINITE_IMAGES}") for row in rows):  # so is the mean
            values = []
        mean = mean_of(values, *_BOUNDS.get(key, (-inf, inf)))
        low, high = mean.ci95 or (None, None)
        found[key] = None if not values else values[0] if isinstance(values[0], int) else mean.value
        found[f"{key} {DEVIATION}"] = stdev(values) if len(values) > 1 else None
        found[f"{key} {LOW}"] = low
        found[f"{key} {HIGH}"] = high
        found[f"{key} {name}s"] = len(values)
    return found | {key: rows[0][key] for key in settings}


def _build_metrics(config: DictConfig, place: Path, root: str) -> Sequence[RowMetric]:
    """Return the metrics of an evaluation of a job, see `build_metrics`."""
    from dinoseg.experiment.builder import Builder  # imports torch
    from dinoseg.extensions.compare.pooled_scores import build_metrics

    return build_metrics(Builder(job_config(config, config.hydra)), place, root)


class SweepTable(Callback):
    """Callback that validates the cells of a multirun, collects job results, prints a table and writes sweep.csv.

    The config of a mode may name a function `sweep_end`, which is called with the folder of the sweep and the swept
    values and run folder of each job that has ended well.
    """

    _cells = 0  # of a sweep; a search has none

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Exit if a cell is invalid; errors that only a run can show are left to the job."""
        if not _is_first():
            return
        note_sweep()
        bad, self._cells = ([], 0) if _searches(config) else impossible_cells(config)
        if not bad:
            if not _job_results(config).claim(keep=_searches(config)):
                print(
                    f"error: another sweep is running in {config.hydra.sweep.dir}. Wait for it, or choose another "
                    "hydra.sweep.dir.",
                    file=sys.stderr,
                )
                sys.exit(1)
            folder = Path(config.hydra.sweep.dir)
            if config.get("resume") == "auto" and not locate_runs(config.hydra, folder).is_given:
                message = f"resume=auto: this sweep is new. To resume one, set its hydra.sweep.dir, here {folder}"
                print(printable(message), file=sys.stderr)
            return
        named = "".join(f"\n- {cell}: {reason}" for cell, reason in bad[:_SHOWN])
        more = f"\n- and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        print(
            f"error: {len(bad)} of {count_of(self._cells, 'cell')} of this sweep cannot run, so no job is "
            f"started:{named}{more}\nLeave them out: run the others as several sweeps.",
            file=sys.stderr,
        )
        sys.exit(1)  # Hydra ignores any other exception of a callback

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Let a job in another process end with its sweep; label its log lines if several jobs may run at once."""
        if config.hydra.mode == RunMode.MULTIRUN and config.hydra.launcher._target_.endswith(_ON_THIS_MACHINE):
            end_with_sweep()
        if config.hydra.mode == RunMode.MULTIRUN and not config.hydra.launcher._target_.endswith(_ONE_BY_ONE):
            os.environ[LABEL] = f"job {config.hydra.job.num}: "

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Store the overrides and scores of a finished job, in the process that ran it."""
        if config.hydra.mode != RunMode.MULTIRUN or not _is_first():
            return
        scores = job_return._return_value if isinstance(job_return._return_value, dict) else {}
        # ++ marks keys of a checkpoint's own config
        words = [word.removeprefix("++").partition("=") for word in job_return.overrides or []]
        number = config.hydra.job.num
        row: dict[str, Any] = {"words": {key: value for key, _, value in words if key != "mode"}}
        row |= {"job": number, "process": os.getpid()}
        numbers = {name: value for name, value in scores.items() if type(value) in (int, float) and isfinite(value)}
        chosen = [name for name in config.get("metric") or () if name in scores and name not in SHARES]
        further = [key for name in chosen for key in (name, f"{name}{INFINITE_IMAGES}") if key in scores]
        row |= {name: numbers.get(name) for name in (*SHARES, *further, *OTHERS, "background", "ignored_class")}
        row |= {LOSS: numbers.get("loss"), "further": further}
        row |= {name: scores.get(name) for name in ("matrix", "run")}
        _job_results(config).store(number, row | {"returned": numbers, "note": scores.get("error", "")})

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and write the table, best first; folds and seeds of a setting are averaged."""
        if not _is_first():
            return
        results = _job_results(config)
        jobs = results.rows()
        results.release(keep=_searches(config))
        if len(jobs) < self._cells:
            print(
                f"error: {self._cells - len(jobs)} of {count_of(self._cells, 'job')} stored no result in "
                f"{config.hydra.sweep.dir}. That folder has to be on storage that all machines see.",
                file=sys.stderr,
            )
        further = dict.fromkeys(name for row in jobs for name in row["further"])
        columns = [key for key in (*SHARES, *further, *OTHERS) if any(row.get(key) is not None for row in jobs)]
        if _find_rank(columns)[0] in columns or any(row["note"] for row in jobs):
            self._report(config, jobs, columns)
        if "sweep_end" in config.mode:
            done = list_runs(jobs, find_swept_keys(jobs))
            instantiate(config.mode.sweep_end)(Path(config.hydra.sweep.dir), done)
        if len(jobs) < self._cells or any(row["note"] and row["process"] != os.getpid() for row in jobs):
            sys.exit(1)  # the command line reports jobs that failed in this process

    def _report(self, config: DictConfig, jobs: Sequence[Row], columns: Sequence[str]) -> None:
        """Print and write the table, and that of single jobs if folds or seeds are averaged."""
        build_metrics = partial(_build_metrics, config)
        score, sign = _find_rank(columns)
        swept = find_swept_keys(jobs)
        rows = [{**row, **{key: row["words"].get(key, "") for key in swept}} for row in jobs]
        path = Path(config.hydra.sweep.dir) / "sweep.csv"
        averaged = [] if _searches(config) else [key for key in (FOLD, SEED) if key in swept]
        counts = [name for key, name in ((FOLD, "folds"), (SEED, "seeds")) if key in averaged]
        caption = _CAPTIONS[counts[0] if counts else ""]
        ranked = score
        left_out: list[str] = []
        printed, written = columns, columns
        runs, settings = rows, [{key: row["words"][key] for key in swept if key in row["words"]} for row in rows]
        if averaged:
            _write(path.with_name(JOBS), _rank_rows(rows, score, sign), swept, columns)
            swept = [key for key in swept if key not in averaged]
            if FOLD in averaged:
                rows = over_folds(rows, swept, columns, build_metrics)
            else:
                rows = over_seeds(rows, swept, columns)
            pooled = {key for row in rows for key in row.get("pooled", ())}
            if pooled:
                left_out = [key for key in columns if key not in {*pooled, *OTHERS}]
                columns = [key for key in columns if key not in left_out]
                ranked, sign = _find_rank(columns)
            elif FOLD in averaged:
                caption = "Mean over folds ± standard deviation over folds."
            printed = [*counts, *_with_parts(columns, [ranked])]
            written = [*counts, *_with_parts(columns, [key for key in columns if key == LOSS or key not in OTHERS])]
        rows = _rank_rows(rows, ranked, sign)
        _print(rows, swept, printed)
        _write(path, rows, swept, written)
        print(f"\nwritten to {path}{f', each job to {path.with_name(JOBS)}' if averaged else ''}")
        places = describe_runs(path.parent, rows[0], jobs)
        print("\n".join(places))
        remarks = [f"folds: {remark}" for remark in dict.fromkeys(row.get("remark") for row in rows) if remark]
        if left_out:
            from dinoseg.extensions.compare.sides import describe_left_out  # imports torch

            remarks.append(describe_left_out([*map(_head, left_out)]))
        print("".join(f"{remark}\n" for remark in remarks), end="")
        failed = [_describe_failure(*run) for run in zip(runs, settings, strict=True) if run[0].get(score) is None]
        scores = [key for key in columns if key == ranked or key not in OTHERS]
        bold, note = (
            _find_significance(path.parent, rows, jobs, scores, ranked, build_metrics)
            if ranked in MAIN_SCORES
            else ({}, "")
        )
        labels = [*swept, *counts]
        cells = [
            [
                *(str(row[key]) for key in labels),
                *(format_score(_score(row, key), partial(_text, key)) for key in scores),
            ]
            for row in rows
        ]
        bold_cells = [(row, len(labels) + scores.index(key)) for key, row in bold.items()]
        caption = f"{caption} {note or 'Nothing is bold: rows were not compared.'}"
        notes = [*remarks, *failed, *places]
        tables = [PaperTable(caption, [*labels, *map(_head, scores)], cells, len(labels), bold_cells, notes)]
        effects, freedom = estimate_effects(settings, [row.get(score) for row in runs])
        if effects and not _searches(config):
            tables.append(effects_table(effects, freedom, _head(score), partial(_text, score)))
            shown = tabulate(tables[1].rows, headers=tables[1].heads, disable_numparse=True)
            print("\n".join(["", tables[1].caption, "", shown, "", *failed]))
        write_paper_tables(path.parent, tables)
        print(f"for a paper: {path.with_name(MARKDOWN)}, {LATEX}")


def _describe_failure(run: Row, settings: Mapping[str, str]) -> str:
    """Return a line on a job without a score, with its settings and its error."""
    words = " ".join(f"{key}={value}" for key, value in settings.items())
    return f"job {run['job']} ({words}) has no score" + (f": {run['note']}" if run["note"] else "")


def _score(row: Row, key: str) -> Score:
    value, deviation, low, high = (row.get(f"{key} {part}".strip()) for part in ("", DEVIATION, LOW, HIGH))
    interval = None if low is None or high is None else [low, high]
    seeds = row[f"{key} seeds"] if f"{key} seeds" in row else row.get("seeds", 0)
    # a mean over some of the seeds is not comparable: mode=compare has no such score either
    return Score(None if seeds < row.get("seeds", 0) else value, deviation, interval, seeds)


def _find_significance(
    sweep: Path,
    rows: Sequence[Row],
    jobs: Sequence[Row],
    scores: Sequence[str],
    ranked: str,
    build_metrics: BuildMetrics,
) -> tuple[dict[str, int], str]:
    """Print how many settings are significantly worse than the best, and the test; return `find_bold` of the scores.

    The best setting is that of the score `ranked`, of which nothing is tested if folds cannot pool it.

    There is nothing if a row with a score has no record of images, or cannot be compared with the others.
    """
    from dinoseg.extensions.compare.comparison import find_best, find_bold  # imports torch
    from dinoseg.extensions.compare.sides import describe_units, sides_of

    runs = {str(job["job"]): job["run"] for job in jobs if job.get("run")}
    scored = [str(row["job"]).split(",") for row in rows if row.get(ranked) is not None]
    try:
        sides = sides_of([[runs[number] for number in numbers if number in runs] for numbers in scored], build_metrics)
    except UserError:
        return {}, ""
    if len(sides) < len(scored):  # a swept key that is not part of a recipe
        return {}, ""
    best = find_best(sides)
    if ranked not in best:
        return {}, ""
    print(
        f"significantly worse than the best setting: {best[ranked][1]} of {len(sides) - 1}; differences of the others "
        f"are within the 95 % interval ({describe_units(sides)})"
    )
    command = shlex.quote(f"runs=[{sweep}]")
    print(f"test for differences from the first job: python -m dinoseg mode=compare {command}")
    return find_bold({key: best[key] for key in best if key in scores}, sides, len(rows))


def _find_rank(columns: Collection[str]) -> tuple[str, int]:
    """Return the score that ranks rows, and -1 if the highest value is the best, else 1."""
    return next(((key, -1) for key in RANKED if key in columns), (LOSS, 1))


def _rank_rows(rows: Sequence[Row], score: str, sign: int) -> list[Row]:
    """Return the rows, the best first and those without a score last."""
    return sorted(rows, key=lambda row: (row.get(score) is None, sign * (row.get(score) or 0)))


def _with_parts(columns: Sequence[str], scores: Sequence[str]) -> list[str]:
    """Return the columns, each score followed by its deviation and the ends of its interval."""
    parts = (DEVIATION, LOW, HIGH)
    return [name for key in columns for name in (key, *(f"{key} {part}" for part in parts if key in scores))]


def _job_results(config: DictConfig) -> JobResults:
    return JobResults(config.hydra.sweep.dir)


def _is_first() -> bool:
    """Return whether this is the first rank that torchrun or Slurm started, which reports for all."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _searches(config: DictConfig) -> bool:
    """Return whether a sweeper chooses the cells while it runs, and may resume an earlier sweep."""
    return "storage" in config.hydra.sweeper


def _print(rows: Sequence[Mapping[str, Any]], swept: Sequence[str], columns: Sequence[str]) -> None:
    keys = ["job", *swept, *columns, *["note"] * any(row["note"] for row in rows)]
    shown = [[_short(row[key]) if key in swept else _text(key, row.get(key)) for key in keys] for row in rows]
    left = {"note", *swept}
    headers = [key.partition(" ")[2] or _head(key) for key in keys]
    widths = [60 if key == "note" else 30 if key in swept else None for key in keys]
    aligned = ["left" if key in left else "right" for key in keys]
    print(f"\n{tabulate(shown, headers=headers, maxcolwidths=widths, disable_numparse=True, colalign=aligned)}")


def _write(path: Path, rows: Sequence[Mapping[str, Any]], swept: Sequence[str], columns: Sequence[str]) -> None:
    keys = ["job", *swept, *columns, "run", "note"]
    shares = {key for key in keys if key.partition(" ")[0] in SHARES}
    cells = [[_text(key, row.get(key)) if key in shares else row.get(key) for key in keys] for row in rows]
    write_csv(path, [[_head(key) for key in keys], *cells])


def _short(word: str) -> str:
    """Return a swept value as it was typed; long decimals, as a search samples them, with six digits."""
    try:
        return f"{float(word):.6g}" if "." in word and len(word) > _LONGEST_NUMBER else word
    except ValueError:
        return word


def _head(key: str) -> str:
    """Return the header of a column: that of a score, or of its deviation or interval."""
    name, _, part = key.partition(" ")
    return f"{SHARES.get(name, name)} {part}".strip()


def _text(key: str, value: Any, sign: str = "") -> str:
    key = key.partition(" ")[0]
    if value is None:
        return ""
    if key in SHARES:
        return f"{100 * value:{sign}z.2f}"
    form = OTHERS.get(key, "z.4f" if isinstance(value, float) else "")
    return format(value, sign + form)


def impossible_cells(config: DictConfig) -> tuple[list[tuple[str, str]], int]:
    """Return the swept values of each invalid cell with the reason, and the number of cells.

    Only modes whose config names a `check` are validated. Jobs that resume from a checkpoint are not, since its config
    is merged later. Errors other than UserError are left to the job, which shows their origin.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)  # it expands glob()
    overrides = parser.parse_overrides(
        to_container(config.hydra.overrides)["task"]
    )  # as typed, including `${hydra:...}`
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    cells = [cell for batch in BasicSweeper.split_arguments(overrides, None) for cell in batch]
    bad = []
    for cell in cells:
        if reason := _fault(loader, config, cell):
            named = " ".join(word for word in cell if word.partition("=")[0] in swept)
            bad.append((named or "each", reason))
    return bad, len(cells)


def _fault(loader: ConfigLoader, config: DictConfig, cell: list[str]) -> str:
    """Return the error of a cell; "" if none is found."""
    try:
        with explain_errors(cell, [SHIPPED, *map(Path, job_config(config, config.hydra).config_dirs)]):
            composed = loader.load_sweep_config(config, cell)
        cfg = job_config(composed, composed.hydra)
        if cfg.resume is None and "check" in cfg.mode:
            instantiate(cfg.mode.check)(cfg)
    except UserError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - found again: by the job, with its traceback, or by Hydra, before the first job
        return ""
    return ""
