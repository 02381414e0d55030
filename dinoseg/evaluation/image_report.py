"""Report of an image evaluation, with the record that comparisons need."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import Counts
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.splits import find_groups
from dinoseg.evaluation.collected import Collected, Collector, image_mious, join
from dinoseg.evaluation.image_record import ImageRecord, write_record
from dinoseg.evaluation.run_facts import about_run
from dinoseg.evaluation.scoring.intervals import UnitScore, has_labels, jackknife, unit_sums
from dinoseg.evaluation.unit_scores import ClassScores, further_scores, leave_units_out, metric_intervals
from dinoseg.experiment.provenance import Provenance
from dinoseg.metrics.calibration import fit_temperature, negative_log_likelihood, reliability
from dinoseg.metrics.miou import count_decisions
from dinoseg.metrics.rows import MetricRows
from dinoseg.metrics.surface import DISTANCES
from dinoseg.report.html.evaluation import ErrorAnalysis, EvaluationScores, evaluation_page
from dinoseg.report.log import read_rows
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_text
from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.errors import UserError

PAGE, TABLE = "report.html", "images.csv"  # in a run folder
logger = logging.getLogger(__name__)


def report_images(
    provenance: Provenance,
    collector: Collector,
    scores: Mapping[str, Any],
    rows: MetricRows,
    data: SegmentationData,
    engine: Engine,
    out_dir: Path,
    *,
    split: str,
    background: int | None,
    official: Mapping[str, Any] | None = None,
    charts: Sequence[Mapping[str, Any]] = (),
    calibrates: bool = True,
) -> None:
    """Write report.html, images.csv and the record for comparisons to a folder, and print the paths.

    Args:
        provenance: the run, its model and its data.
        collector: results of this rank; the main rank writes the results of all ranks.
        scores: scores of the same images.
        rows: counts of further metrics, whose scores are among the scores.
        data: the evaluated data set.
        engine: device and ranks.
        out_dir: folder of the scores.
        split: name of the data's split.
        background: ID of the background class; None without one.
        official: result by the protocol of the data set's benchmark, with its unit; None without one.
        charts: of the classes, for the page.
        calibrates: the page states the calibration, which edited probabilities would distort.
    """
    parts = engine.gather(collector.parts)
    if not engine.is_main:
        return
    collected, choices = join(parts), provenance.choices
    groups = _group_images(provenance.group, data.names, official)
    sums = unit_sums(collected.classes, groups)
    kind = ClassScores(len(data.classes), background)
    further, intervals = _estimate_scores(kind, sums, rows, groups)
    record = ImageRecord(
        classes=list(data.classes),
        palette=data.palette,
        ignore_index=data.ignore_index,
        background=background,
        data=choices["data"],
        root=provenance.root,
        split=split,
        unit=_unit(groups, int(has_labels(sums).sum()), official),
        images=[*data.names],
        units=groups,
        source=provenance.model,
        counts=collected.classes,
        scores=further,
        chosen_here=scores.get("thresholds", {}).get("chosen_here", False),
        image_scores=_score_images(rows),
    )
    write_record(record, out_dir, _counts_to_store(rows))
    mious = image_mious(collected.classes)
    _write_table(out_dir / TABLE, record, mious, rows.errors)
    sources = {"model": record.source, "data": record.root}
    page = evaluation_page(
        record,
        EvaluationScores(scores, intervals, official, rows.metrics, charts),
        ErrorAnalysis(
            mious,
            best=collected.best,
            worst=collected.worst,
            distances=DISTANCES,
            boundary=collected.boundary.sum(axis=0),
            calibration=_calibration(collected) if calibrates else None,
            objects=collected.errors,
        ),
        title=f"{choices['hparam']}: {choices['data']}, split {split}",
        subtitle=provenance.kind,
        about=about_run(provenance.folder, provenance.config, sources, engine.device),
        training=_training(provenance.training),
        selecting=provenance.score,
    )
    write_text(out_dir / PAGE, page)
    print(f"report:       {out_dir}/{PAGE}, and {TABLE}")


def _estimate_scores(
    kind: ClassScores, sums: np.ndarray, rows: MetricRows, groups: Sequence[str]
) -> tuple[dict[str, UnitScore], dict[str, list[float] | None]]:
    """Return the scores of further metrics, and the 95 % intervals of these and of the scores of the classes."""
    scores: dict[str, UnitScore] = {}
    intervals = {key: estimate.ci95 for key, estimate in jackknife(kind, sums).items()}
    for metric, counts in zip(rows.metrics, rows.counts, strict=True):
        # leaving out images of many objects takes minutes: once for both
        found = leave_units_out(metric, counts, groups)
        scores |= further_scores(metric, found)
        intervals |= metric_intervals(metric, found)
    return scores, intervals


def _score_images(rows: MetricRows) -> dict[str, list[float | None]]:
    """Return the main score of each metric of objects, of each image by itself."""
    found = {}
    for metric, counts in zip(rows.metrics, rows.counts, strict=True):
        if metric.needs_objects:
            main = next(iter(metric.scores))
            found[main] = [metric.score([row])[main] for row in counts]
    return found


def _counts_to_store(rows: MetricRows) -> dict[str, Sequence[Counts]]:
    """Return the counts of each metric by its main score."""
    # those in bins take gigabytes
    return {
        next(iter(metric.scores)): counts
        for metric, counts in zip(rows.metrics, rows.counts, strict=True)
        if not metric.needs_bins
    }


def _group_images(pattern: str | None, names: Sequence[str], official: Mapping[str, Any] | None) -> list[str]:
    """Return the group of each image by `data.group`, such as its video; each image is one without groups."""
    groups, notes = find_groups(pattern, list(names), "data.group")
    for note in notes if official is None else ():  # the official scores have the same note
        logger.warning("%s", note)
    return [groups.get(name, name) for name in names]


def _unit(groups: list[str], scored: int, official: Mapping[str, Any] | None) -> str:
    """Return the name of the groups: the benchmark's unit if it has as many as there are `scored` groups."""
    if official is not None and official["n"] == scored:
        return str(official["unit"])
    return "image" if len(set(groups)) == len(groups) else "group"


def _calibration(collected: Collected) -> dict[str, Any] | None:
    logits, labels = collected.logits, collected.labels.astype(np.int64)
    if not len(labels) or logits.shape[1] < 2:
        return None
    temperature = fit_temperature(logits, labels)

    def state(factor: float) -> dict[str, Any]:
        found = reliability(logits, labels, factor)
        bins = zip(found.pixels.tolist(), found.correct.tolist(), found.confidence.tolist(), strict=True)
        return {"nll": negative_log_likelihood(logits, labels, factor), "ece": found.ece, "bins": list(bins)}

    sampled = {"pixels": len(labels), "images": len(collected.classes)}
    return {**sampled, "temperature": temperature, "before": state(1.0), "after": state(temperature)}


def _training(folder: Path | None) -> list[dict[str, Any]] | None:
    """Return the log rows of the model's training in `folder`; None if the log is missing or unreadable."""
    if folder is None:
        return None
    try:
        return read_rows(folder / "metrics.jsonl")
    except (OSError, UserError):
        return None


def _write_table(path: Path, record: ImageRecord, mious: list[float | None], errors: Sequence[Counts]) -> None:
    """Write a line for each image; with numbers of objects, if they were compared."""
    numbers: Sequence[Counts] = errors or [{}] * len(mious)
    heads = ["image", "unit", "miou", "labelled_pixels", "wrong_pixels"]
    rows: list[list[Any]] = [[*heads, *(f"objects_{name}" for name in numbers[0])]]
    images = zip(record.images, record.units, mious, record.counts, numbers, strict=True)
    for name, unit, miou, counts, objects in images:
        correct, labelled = map(int, count_decisions(counts))
        rows.append([name, unit, miou, labelled, labelled - correct, *(int(each.sum()) for each in objects.values())])
    write_csv(path, rows)
