"""Comparison of each side with the first side: by class, by image, and in example images."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from dinoseg.core.metric import plain_score
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.custom import CustomDataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.evaluation.collected import image_mious
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import (
    Estimate,
    UnitScore,
    combine_errors,
    estimate_difference,
    holm,
    jackknife_error,
    mean_of,
    score_units,
    subtract_means,
    unit_sums,
)
from dinoseg.evaluation.unit_scores import ClassScores
from dinoseg.extensions.compare.page import OtherRun
from dinoseg.extensions.compare.paper_table import Score, find_main_score
from dinoseg.extensions.compare.pooled_scores import average_images, average_scores
from dinoseg.extensions.compare.sides import Side, read_ensemble
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


def against(sides: Sequence[Side], open_data: Callable[..., SegmentationData]) -> list[OtherRun]:
    """Compare each other side with the first side.

    Args:
        sides: the first of them and the others.
        open_data: returns the data set of an evaluation of the first side, by its folder, for the example images; with
            `split="train"`, that of its training.
    """
    first = sides[0]
    kind = _kind(first.scored[0])
    counts = [[record.counts for record in side.scored] for side in sides]
    by_image = [mean_image_scores(side) for side in sides]
    found: list[OtherRun] = []
    refused: dict[str, None] = {}

    @cache  # opened for the first images that are needed, and once for all sides, also if that fails
    def open_once(place: Path, **split: str) -> SegmentationData | UserError:
        try:
            return open_data(place, **split)
        except UserError as error:
            return error

    def load(place: Path, name: str) -> SegmentationData:
        opened = open_once(place)
        if not isinstance(opened, UserError) and name not in opened.names and read_ensemble(place).out_of_fold:
            opened = open_once(place, split="train")  # folds divide the images of both splits
        if isinstance(opened, UserError):
            raise opened
        return opened

    names = first.scored[0].images
    for number, gaps in enumerate(differences([score_side(side) for side in sides]), start=1):
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
                differences=gaps,
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
    by_unit = [score_side(side) for side in sides]
    found = {}
    for key in (*_kind(sides[0].scored[0]).means, *further):
        sign = -1 if key in further and further[key].better == "min" else 1
        values = [of_side[key] for of_side in scores]
        order = best_first([None if value is None else sign * value for value in values])
        gaps = differences([by_unit[index] for index in order], [key])
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
    runs, seeds = score_side(side)
    found = {}
    for key in runs[0]:
        of_runs = [run[key] for run in runs]
        values = np.array([score.value for score in of_runs], dtype=np.float64)
        mean = average_scores(of_runs)
        estimate = mean.estimate()
        if np.sum(mean.scored) == 1 and seeds:
            estimate = replace(estimate, error=0.0, freedom=1)
        interval = combine_errors(estimate, [each[key] for each in seeds]).ci95
        deviation = plain_score(values.std(ddof=1)) if len(values) > 1 else None
        found[key] = Score(plain_score(values.mean()), deviation, interval, side.seeds)
    return found


def mean_image_scores(side: Side) -> list[float | None]:
    """Return the score that ranks runs of each image by itself, averaged over those runs where it is defined."""
    main = find_main_score({"miou", *side.scored[0].scores})
    by_run = [record.image_scores.get(main) or image_mious(record.counts) for record in side.scored]
    return average_images(by_run)


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


SideRuns = Sequence[np.ndarray]  # runs of one side: sums (U, 3 K) each, over the same units


class SideScores(NamedTuple):
    """Scores of a side.

    Attributes:
        runs: of each run by name: `ClassScores`, and those of further metrics.
        seeds: errors over seeds by name: one over the runs, or with folds one over the seeds of each fold; empty
            without several seeds.
    """

    runs: Sequence[Mapping[str, UnitScore]]
    seeds: Sequence[Mapping[str, Estimate]]


def score_side(side: Side) -> SideScores:
    """Return the scores of all runs of a side.

    Seeds of folds are left out one by one, with all other folds complete.
    """
    kind, records = _kind(side.scored[0]), side.scored
    runs = score_runs(kind, [unit_sums(record.counts, record.units) for record in records])
    runs = [{**run, **record.scores} for run, record in zip(runs, records, strict=True)]
    if side.pooled is None:
        return SideScores(runs, average_seeds(runs))
    seeds = [
        {
            key: Estimate(math.nan, jackknife_error(scores), len(scores) - 1)
            for key, scores in kind.scores(totals).items()
        }
        for totals in side.pooled.without_seed
    ]
    return SideScores(
        runs, [{**own, **further} for own, further in zip(seeds, side.pooled.seeds_of_further, strict=True)]
    )


def score_runs(kind: ClassScores, runs: SideRuns) -> list[dict[str, UnitScore]]:
    """Return the scores of the classes of each run."""
    return [score_units(kind, run.reshape(len(run), math.prod(run.shape[1:]))) for run in runs]


def average_seeds(runs: Sequence[Mapping[str, UnitScore]]) -> list[dict[str, Estimate]]:
    """Return `SideScores.seeds` of runs without folds."""
    values = {key: np.array([run[key].value for run in runs], dtype=np.float64).tolist() for key in runs[0]}
    return [{key: mean_of(scores) for key, scores in values.items()}] if len(runs) > 1 else []


def mean_scores(kind: ClassScores, side: SideRuns) -> dict[str, float | None]:
    """Return each score, averaged over the runs of a side; None where undefined."""
    scores = kind.scores(np.stack([run.sum(axis=0).reshape(-1) for run in side]))
    return {key: plain_score(values.mean()) for key, values in scores.items()}


def differences(sides: Sequence[SideScores], keys: Sequence[str] | None = None) -> list[dict[str, dict[str, Any]]]:
    """Return, for each other side, the differences of its scores from those of the first side.

    Each difference has a `value`, an interval `ci95`, a p-value `p` and the resulting `verdict`. Holm's method
    corrects `p` over all sides; for the class scores, over all classes as well.

    Args:
        sides: the scores of each side.
        keys: names of scores; None: all.
    """
    first, *others = sides
    scores = {key: first.runs[0][key] for key in keys or first.runs[0]}
    gaps = [
        {
            key: estimate_difference(
                [run[key] for run in first.runs],
                [run[key] for run in other.runs],
                [[each[key] for each in side.seeds] for side in (first, other)],
            )
            for key in scores
        }
        for other in others
    ]
    families = [*([key] for key in scores if not _is_of_class(key)), [key for key in scores if _is_of_class(key)]]
    return _with_verdicts(gaps, families, [key for key, score in scores.items() if score.better == "min"])


def _is_of_class(key: str) -> bool:
    return key.startswith("iou/")


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


def image_contributions(kind: ClassScores, first: SideRuns, second: SideRuns) -> list[float | None]:
    """Return each image's contribution to the mIoU difference: that of all images minus that of all others.

    The runs of both sides are counts (N, 3, K) of the same images.
    """
    whole, *others = subtract_means(*([run["miou"] for run in score_runs(kind, side)] for side in (first, second)))
    return [plain_score(whole - gap) for gap in others]


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
    load: Callable[[Path, str], SegmentationData],
    folders: Mapping[str, tuple[Path, Path]],
    first: Sequence[float | None],
    second: Sequence[float | None],
    sides: int = 1,
) -> tuple[list[PairShot], str]:
    """Return the images whose score differs most in another run, by size of the difference; or none, and the reason.

    Args:
        load: returns the data set with an image, by the folder of its evaluation and its name.
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
        data = load(places[0], names[index])
        if isinstance(data, PairDataset | CustomDataset) and data.has_layers:
            return [], "No images: the masks have a layer for each class."
        shots.append(_pair_shot(data, names[index], places, (first[index] or 0.0, second[index] or 0.0)))
    return shots, ""
