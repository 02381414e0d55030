"""Comparison of each side with the first side: by class, by image, and in example images."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from dinoseg.core.metric import plain_score
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.custom import CustomDataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.evaluation.collected import image_mious
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import (
    Difference,
    Estimate,
    combine_errors,
    holm,
    jackknife,
    jackknife_error,
    leave_one_out,
    mean_of,
    unit_sums,
)
from dinoseg.evaluation.unit_scores import ClassScores, further_difference
from dinoseg.extensions.compare.page import OtherRun
from dinoseg.extensions.compare.paper_table import Score, find_main_score
from dinoseg.extensions.compare.sides import Side
from dinoseg.report.html.page import format_interval
from dinoseg.report.html.pictures import PairShot
from dinoseg.report.overlay import downscale
from dinoseg.report.table import CHOSEN_HERE, MEANS, percent
from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_size
from dinoseg.utils.levels import to_display
from dinoseg.utils.wording import join_names

logger = logging.getLogger(__name__)
SURELY_BETTER, SURELY_WORSE = "significantly better", "significantly worse"
UNSURE, NO_VERDICT = "no significant difference", "no verdict"
LEVEL = 0.05  # p-value below which a difference is significant
_MAX_DETAILED = 3  # other sides whose scores are printed
# characters of names in tables, which then have at most 120 columns
MAX_NAME = 26
_MAX_LABEL = 20
_MAX_SIDE = 16
SHOWN, _IN_ALL = 4, 28  # most improved images per side and in all, and most worsened: the page is e-mailed
_LONGEST = 512  # pixels of an image's longer side


def scores_of(records: Sequence[ImageRecord]) -> dict[str, float | None]:
    """Return all scores by name, averaged over the records of a side; None where undefined."""
    kind = _kind(records[0])
    scores = mean_scores(kind, [record.counts for record in records])
    further = {
        name: plain_score(np.array([record.scores[name].value for record in records], dtype=np.float64).mean())
        for name in records[0].scores
    }
    return {key: scores[key] for key in kind.means} | further | scores


def best_first(scores: Sequence[float | None]) -> list[int]:
    """Return the indices of scores in descending order: undefined scores last, ties in their original order."""
    return sorted(range(len(scores)), key=lambda index: math.inf if (score := scores[index]) is None else -score)


def against(sides: Sequence[Side], open_data: Callable[[Path], SegmentationData]) -> list[OtherRun]:
    """Compare each other side with the first side.

    Args:
        sides: the first of them and the others.
        open_data: returns the data set of an evaluation of the first side, by its folder, for the example images.
    """
    first = sides[0]
    kind = _kind(first.scored[0])
    counts = [[record.counts for record in side.scored] for side in sides]
    by_image = [mean_image_scores(side) for side in sides]
    found: list[OtherRun] = []
    refused: dict[str, None] = {}

    @cache  # opened for the first images that are needed, and once for all sides, also if that fails
    def open_once(place: Path) -> SegmentationData | UserError:
        try:
            return open_data(place)
        except UserError as error:
            return error

    def load(place: Path) -> SegmentationData:
        opened = open_once(place)
        if isinstance(opened, UserError):
            raise opened
        return opened

    further = further_differences(sides)
    names = first.scored[0].images
    for number, gaps in enumerate(class_differences(sides), start=1):
        other = sides[number]
        folders = {name: (first.place_of(name), other.place_of(name)) for name in names}
        try:
            shots, reason = largest_differences(load, folders, by_image[0], by_image[number], len(sides) - 1)
        except UserError as error:
            shots = []
            reason = f"No images: {error}"
            refused[str(error)] = None
        found.append(
            OtherRun(
                name=other.name,
                scores=scores_of(other.scored),
                differences=gaps | further[number - 1],
                image_scores=by_image[number],
                decides=image_contributions(kind, counts[0], counts[number]),
                shots=shots,
                no_pictures=reason,
            )
        )
    for reason in refused:  # log each reason once, even if it applies to all sides
        logger.warning("The report has no images: %s", reason)
    return found


def find_best(sides: Sequence[Side]) -> dict[str, tuple[int, int]]:
    """Return, for each score but those of classes, the index of the best side and how many are significantly worse.

    All other sides are tested against the best one, and Holm's method corrects p over them.
    """
    further = sides[0].scored[0].scores
    scores = [scores_of(side.scored) for side in sides]
    found = {}
    for key in (*_kind(sides[0].scored[0]).means, *further):
        sign = -1 if key in further and further[key].better == "min" else 1
        values = [of_side[key] for of_side in scores]
        order = best_first([None if value is None else sign * value for value in values])
        ranked = [sides[index] for index in order]
        gaps = further_differences(ranked) if key in further else class_differences(ranked)
        found[key] = order[0], sum(gap[key]["verdict"] == SURELY_WORSE for gap in gaps)
    return found


def find_bold(best: Mapping[str, tuple[int, int]], sides: Sequence[Side], rows: int) -> tuple[dict[str, int], str]:
    """Return, by score, the index of the side that is significantly better than each other one, and a note on it.

    A side whose thresholds were chosen on these images is never bold. A row without a score is no side: with one, no
    side is better than all `rows`.
    """
    winners = {key: index for key, (index, worse) in best.items() if worse == rows - 1}
    bold = {key: index for key, index in winners.items() if not sides[index].chosen_here}
    claim = "significantly better than every other row (p below 0.05, paired by image or group, corrected by Holm)"
    chosen = [side.name for side in sides if side.chosen_here]
    note = f"Bold: {claim}." if bold else f"Nothing is bold: no {'other ' if chosen else ''}score is {claim}."
    return bold, f"{note} Never bold: {join_names(chosen)}. {CHOSEN_HERE}" if chosen else note


def side_scores(side: Side) -> dict[str, Score]:
    """Return each score of a side: over units, and over seeds if there are several.

    With a single unit, the interval is over seeds alone. The deviation is over seeds; with folds there is none.
    """
    kind = _kind(side.scored[0])
    runs = _scored_sums([side])[0]
    seeds = _seed_errors(kind, runs, _get_seed_totals(side))
    left_out = [leave_one_out(kind, run) if len(run) else {key: np.zeros(0) for key in kind.keys} for run in runs]
    parts = {
        key: (values, np.stack([each[key] for each in left_out]), [each[key] for each in seeds])
        for key, values in _scores(kind, runs).items()
    }
    for name in side.scored[0].scores:
        of_runs = [record.scores[name] for record in side.scored]
        values = np.array([score.value for score in of_runs], dtype=np.float64)
        left = np.array([score.left_out for score in of_runs], dtype=np.float64)
        scored = np.any([score.scored for score in of_runs], axis=0)
        parts[name] = values, left[:, scored], [mean_of(values.tolist())] if len(values) > 1 else []
    return {key: _side_score(*of_score, side.seeds) for key, of_score in parts.items()}


def _side_score(values: np.ndarray, left_out: np.ndarray, by_seed: Sequence[Estimate], seeds: int) -> Score:
    """Return the mean of a score over its `values` (S,) of runs, from those without each unit (S, U)."""
    error, freedom = jackknife_error(left_out.mean(axis=0)), left_out.shape[1] - 1
    if left_out.shape[1] == 1 and by_seed:
        error, freedom = 0.0, 1
    mean = Estimate(float(values.mean()), error, freedom, share=True, lowest=0.0, highest=1.0)
    deviation = plain_score(values.std(ddof=1)) if len(values) > 1 else None
    return Score(plain_score(values.mean()), deviation, combine_errors(mean, by_seed).ci95, seeds)


def class_differences(sides: Sequence[Side]) -> list[dict[str, dict[str, Any]]]:
    """Return the `differences` of each other side from the first side."""
    return differences(_kind(sides[0].scored[0]), _scored_sums(sides), [_get_seed_totals(side) for side in sides])


def _get_seed_totals(side: Side) -> Sequence[np.ndarray]:
    return () if side.pooled is None else side.pooled.without_seed


def _scored_sums(sides: Sequence[Side]) -> list[list[np.ndarray]]:
    """Return the sums (U, d) of each run of each side, over the units with labelled pixels."""
    scored = sides[0].scored[0].scored_units  # the references of all runs are equal, and so are their units
    return [[unit_sums(record.counts, record.units)[scored] for record in side.scored] for side in sides]


def mean_image_scores(side: Side) -> list[float | None]:
    """Return the score that ranks runs of each image by itself, averaged over those runs where it is defined."""
    main = find_main_score({"miou", *side.scored[0].scores})
    by_run = [record.image_scores.get(main) or image_mious(record.counts) for record in side.scored]
    defined = [[score for score in of_image if score is not None] for of_image in zip(*by_run, strict=True)]
    return [float(np.mean(each)) if each else None for each in defined]


def _kind(record: ImageRecord) -> ClassScores:
    return ClassScores(len(record.classes), record.background)


def verdicts(first: Side, others: Sequence[OtherRun]) -> str:
    """Return the verdicts as text of at most 120 columns: a row for each side, and all scores of a few sides."""
    table = sides_table(first, others)
    return table if len(others) > _MAX_DETAILED else f"{table}\n\n{score_table(first, others)}"


def sides_table(first: Side, others: Sequence[OtherRun]) -> str:
    """Return a text table with one row per side, best first: the main score in percent, differences in points."""
    scores = scores_of(first.scored)
    main = find_main_score(scores)
    heads = [
        "side",
        f"{MEANS.get(main, main)} %",
        "points",
        "95 % interval",
        "p",
        "verdict",
        "classes\nbetter",
        "\nworse",
    ]
    rows = [[first.name, percent(scores[main], 2), "-", "-", "-", "the first", "", ""]]
    for other in others:
        counts = [str(other.count_classes(verdict)) for verdict in (SURELY_BETTER, SURELY_WORSE)]
        rows.append([other.name, percent(other.scores[main], 2), *_gap_cells(other.differences[main]), *counts])
    order = best_first([scores[main], *(other.scores[main] for other in others)])
    return _tabulate([rows[index] for index in order], heads, "lrrrrlrr", {"side": MAX_NAME})


def score_table(first: Side, others: Sequence[OtherRun]) -> str:
    """Return a text table with one row per score and side, in percent and points."""
    heads = ["score", "side", "first %", "side %", "points", "95 % interval", "p", "verdict"]
    labels = score_labels(first)
    scores = scores_of(first.scored)
    rows = [
        [
            labels[key],
            other.name,
            percent(value, 2),
            percent(other.scores[key], 2),
            *_gap_cells(other.differences[key]),
        ]
        for key, value in scores.items()
        for other in others
    ]
    return _tabulate(rows, heads, "llrrrrrl", {"score": _MAX_LABEL, "side": _MAX_SIDE})


def _gap_cells(gap: Mapping[str, Any]) -> list[str]:
    p_value = "-" if gap["p"] is None else f"{gap['p']:.2g}"
    return [percent(gap["value"], 2, "+"), format_interval(gap["ci95"], 2, "+"), p_value, gap["verdict"]]


def _tabulate(rows: list[list[str]], heads: list[str], align: str, widths: Mapping[str, int]) -> str:
    """Return a text table; columns named in `widths` wrap at their width."""
    return tabulate(
        rows,
        headers=heads,
        disable_numparse=True,
        colalign=[{"l": "left", "r": "right"}[letter] for letter in align],
        maxcolwidths=[widths.get(head) for head in heads],
    )


def write_tables(out_dir: Path, first: Side, others: Sequence[OtherRun]) -> None:
    """Write compare.csv (one line per score) and images.csv (one line per image); scores are in 0..1."""
    record = first.scored[0]
    labels = score_labels(first)
    heads: list[Any] = ["score", first.name]
    for other in others:
        heads += [other.name, *(f"{other.name} {part}" for part in ("difference", "low", "high", "p", "verdict"))]
    lines = [heads]
    for key, value in scores_of(first.scored).items():
        line = [labels[key], value]
        for other in others:
            gap = other.differences[key]
            line += [other.scores[key], gap["value"], *(gap["ci95"] or (None, None)), gap["p"], gap["verdict"]]
        lines.append(line)
    write_csv(out_dir / "compare.csv", lines)
    columns = [part for other in others for part in (other.image_scores, other.decides)]
    names = [name for other in others for name in (other.name, f"{other.name} adds")]
    per_image = zip(record.images, record.units, mean_image_scores(first), *columns, strict=True)
    write_csv(out_dir / "images.csv", [["image", "unit", first.name, *names], *per_image])


def score_labels(side: Side) -> Mapping[str, str]:
    """Return the display label of each score, by the score's name."""
    record = side.scored[0]
    means = {key: MEANS[key] for key in _kind(record).means} | {name: name for name in record.scores}
    return means | {f"iou/{index}": f"IoU {name}" for index, name in enumerate(record.classes)}


Runs = Sequence[np.ndarray]  # runs of one side: sums (U, 3 K) each, over the same units


def mean_scores(kind: ClassScores, side: Runs) -> dict[str, float | None]:
    """Return each score, averaged over the runs of a side; None where undefined."""
    found = {key: values.mean() for key, values in _scores(kind, side).items()}
    return {key: float(value) if np.isfinite(value) else None for key, value in found.items()}


def differences(
    kind: ClassScores, sides: Sequence[Runs], without_seed: Sequence[Runs] | None = None
) -> list[dict[str, dict[str, Any]]]:
    """Return, for each other side, the differences of its scores from those of the first side.

    Each difference has a `value`, an interval `ci95`, a p-value `p` and the resulting `verdict`. Holm's method
    corrects `p` over all sides; for the class scores, over all classes as well.

    Args:
        kind: the scores.
        sides: the runs of each side.
        without_seed: of each side `PooledFolds.without_seed`; None without folds.
    """
    seeds = [
        _seed_errors(kind, side, folds) for side, folds in zip(sides, without_seed or [()] * len(sides), strict=True)
    ]
    gaps = [
        _difference(kind, sides[0], side, [seeds[0], each]) for side, each in zip(sides[1:], seeds[1:], strict=True)
    ]
    families = [*([key] for key in kind.means), [key for key in kind.keys if key not in kind.means]]
    return _with_verdicts(gaps, families)


def further_differences(sides: Sequence[Side]) -> list[dict[str, dict[str, Any]]]:
    """Return the differences of the scores of further metrics in the form of `differences`."""
    first, *others = [side.scored for side in sides]
    scores = first[0].scores
    gaps = [
        {
            name: further_difference([run.scores[name] for run in first], [run.scores[name] for run in other])
            for name in scores
        }
        for other in others
    ]
    return _with_verdicts(gaps, [[name] for name in scores], [name for name in scores if scores[name].better == "min"])


def _with_verdicts(
    gaps: Sequence[Mapping[str, Estimate]], families: Sequence[Sequence[str]], lower_is_better: Collection[str] = ()
) -> list[dict[str, dict[str, Any]]]:
    """Return the differences of each other side with verdicts; each family of scores is corrected together."""
    found: list[dict[str, dict[str, Any]]] = [{} for _ in gaps]
    for family in families:
        members = [(number, key) for number in range(len(gaps)) for key in family]
        p_values = holm([gaps[number][key].p for number, key in members])
        for (number, key), p_value in zip(members, p_values, strict=True):
            gap = gaps[number][key]
            value = gap.value if np.isfinite(gap.value) else None
            found[number][key] = {"value": value, "ci95": gap.ci95, "p": p_value}
            found[number][key]["verdict"] = _verdict(gap, p_value, lower_is_better=key in lower_is_better)
    return found


def image_contributions(kind: ClassScores, first: Runs, second: Runs) -> list[float | None]:
    """Return each image's contribution to the mIoU difference: that of all images minus that of all others.

    The runs of both sides are counts (N, 3, K) of the same images.
    """
    whole = Difference(kind, len(first), len(second))
    sums = _side_by_side(first, second)
    gaps = float(whole.scores(sums.sum(axis=0))["miou"]) - leave_one_out(whole, sums)["miou"]
    return [float(gap) if np.isfinite(gap) else None for gap in gaps]


def _difference(
    kind: ClassScores, first: Runs, second: Runs, seeds: Sequence[Sequence[Mapping[str, Estimate]]]
) -> dict[str, Estimate]:
    """Return each score's difference, with the error over units and those over the `seeds` of both sides.

    With a single unit, the error is that over seeds alone, if both sides have several.
    """
    found = jackknife(Difference(kind, len(first), len(second)), _side_by_side(first, second))
    if len(first[0]) == 1 and all(seeds):
        found = {key: replace(gap, error=0.0, freedom=1) for key, gap in found.items()}
    return {
        key: combine_errors(gap, [each[key] for of_side in seeds for each in of_side]) for key, gap in found.items()
    }


def _seed_errors(kind: ClassScores, side: Runs, without_seed: Runs) -> list[dict[str, Estimate]]:
    """Return the errors of a side's scores over its seeds: one over its runs, or with folds one over those of each.

    The latter is the jackknife over the seeds of a fold, with all other folds complete. Empty without several seeds.
    """
    if len(side) > 1:
        return [{key: mean_of(scores.tolist()) for key, scores in _scores(kind, side).items()}]
    return [
        {
            key: Estimate(math.nan, jackknife_error(scores), len(scores) - 1)
            for key, scores in kind.scores(totals).items()
        }
        for totals in without_seed
    ]


def _side_by_side(*sides: Runs) -> np.ndarray:
    runs = [run.reshape(len(run), math.prod(run.shape[1:])) for side in sides for run in side]  # also of no unit
    return np.concatenate(runs, axis=1).astype(np.float64)


def _scores(kind: ClassScores, side: Runs) -> dict[str, np.ndarray]:
    """Return each score (S,) of the S runs of a side."""
    return kind.scores(np.stack([run.sum(axis=0).reshape(-1) for run in side]))


def _verdict(gap: Estimate, p_value: float | None, *, lower_is_better: bool = False) -> str:
    if p_value is None:
        return NO_VERDICT
    if p_value >= LEVEL:
        return UNSURE
    return SURELY_BETTER if (gap.value > 0) != lower_is_better else SURELY_WORSE


def _pair_shot(data: SegmentationData, name: str, folders: tuple[Path, Path], scores: tuple[float, float]) -> PairShot:
    """Return an image with the predictions of two runs.

    Raises:
        UserError: the data has no image of this name; a file is missing, of another size, or not a mask of the classes.
    """
    if name not in data.names:
        raise UserError(f"{folders[0]} was evaluated on {name}, which its data no longer has.")
    classes = len(data.classes)
    sample = data[list(data.names).index(name)]
    reference: np.ndarray = sample["mask"].numpy()
    predictions = []
    for folder in folders:
        base = folder / "predictions"
        path = base / f"{name}_pred.png"
        if not path.resolve().is_relative_to(base.resolve()):
            raise UserError(f"{folder} names an image outside its own folder: {name}.")
        if read_size(path) != reference.shape:
            raise UserError(f"{path} differs in size from its reference.")
        ids = read_ids(path)
        if ids.ndim != 2 or ids.max() >= classes:
            raise UserError(f"{path} is not a mask of the {classes} classes.")
        predictions.append(downscale(ids, _LONGEST))
    frame = downscale(to_display(sample["image"].permute(1, 2, 0).numpy()), _LONGEST)
    return PairShot(name, scores, frame, downscale(reference, _LONGEST), (predictions[0], predictions[1]))


def largest_differences(
    load: Callable[[Path], SegmentationData],
    folders: Mapping[str, tuple[Path, Path]],
    first: Sequence[float | None],
    second: Sequence[float | None],
    sides: int = 1,
) -> tuple[list[PairShot], str]:
    """Return the images whose score differs most in another run, by size of the difference; or none, and the reason.

    Args:
        load: returns the data set of an evaluation, by its folder.
        folders: of the evaluations of both runs, by image, in the order of the scores.
        first: score of each image in the first run.
        second: score of each image in the other run.
        sides: number of runs compared with the first: many runs get fewer images each.

    Raises:
        UserError: predictions exist, but their images cannot be built.
    """
    pairs: list[Any] = [
        (theirs - ours, index)
        for index, (ours, theirs) in enumerate(zip(first, second, strict=True))
        if ours is not None and theirs is not None and ours != theirs
    ]
    pairs.sort()
    lost = [pair for pair in pairs if pair[0] < 0]
    gained = [pair for pair in pairs if pair[0] > 0]
    per_side = max(1, min(SHOWN, _IN_ALL // sides))
    chosen = {index: gap for gap, index in (*lost[:per_side], *gained[-per_side:])}
    order = sorted(chosen, key=lambda index: -abs(chosen[index]))
    if not order:
        return [], "No image has different scores in the two runs."
    names = [*folders]
    if any(not (folder / "predictions").is_dir() for index in order for folder in folders[names[index]]):
        return [], "No images: a run was evaluated with mode.metrics_only=true, so its predictions were not saved."
    shots = []
    for index in order:
        places = folders[names[index]]
        data = load(places[0])
        if isinstance(data, PairDataset | CustomDataset) and data.has_layers:
            return [], "No images: the masks have a layer for each class."
        shots.append(_pair_shot(data, names[index], places, (first[index] or 0.0, second[index] or 0.0)))
    return shots, ""
