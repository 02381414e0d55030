"""Images on which an ensemble may be scored, and its gain over its members there."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from dinoseg.checkpoints.past_runs import read_run
from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.core.metric import Counts, LabelledImage, PredictedImage, RowMetric, count_image, plain_score
from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.data.splits import find_groups
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import UnitScore, estimate_difference, score_units, unit_sums
from dinoseg.evaluation.unit_scores import ClassScores, further_scores, leave_units_out
from dinoseg.extensions.ensembles.strategy import AveragedStrategy
from dinoseg.metrics.miou import count_classes
from dinoseg.report.html.page import format_interval
from dinoseg.report.table import percent
from dinoseg.runs.folder import LOG, command_line
from dinoseg.runs.split_file import OUTSIDE
from dinoseg.training import checkpoint
from dinoseg.training.description import resolve_evaluate
from dinoseg.training.end_record import describe_sweep
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, natural_order
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
_SPLIT = forms.table(forms.list_of(forms.text))  # form of split.json in the run folder of a training
_REPLICATES = ("data.fold=", "seed=", "hydra")  # words in which runs of one recipe may differ
_REMEDY = (
    "Score the ensemble on new images (mode.split=test); or runs of all folds out of fold, by resume=SWEEP or "
    "mode.ensemble.out_of_fold=true."
)


def list_sweep(folder: str) -> list[str]:
    """Return the trained runs of a sweep.

    Raises:
        UserError: one is unfinished, or they have several recipes.
    """
    jobs = sorted(entries(Path(folder).expanduser()), key=lambda path: natural_order(path.name))
    runs = [job for job in jobs if (job / LOG).is_file()]
    states = {job.name: read_run(job) for job in runs}
    if unfinished := [name for name, state in states.items() if state is None or not state.has_ended]:
        raise UserError(
            f"resume={folder}: no finished training in {join_names(unfinished)}. Finish it (mode=train "
            "resume=RUN), or give a list of runs."
        )
    recipes: dict[frozenset[str], list[str]] = {}
    for run in runs:
        words = [word for word in command_line(run) if not word.lstrip("+").startswith(_REPLICATES)]
        recipes.setdefault(frozenset(words), []).append(str(run))
    if len(recipes) > 1:
        shared = frozenset.intersection(*recipes)
        named = [
            f"{' '.join(sorted(recipe - shared))} in {join_names([Path(run).name for run in of_recipe])}"
            for recipe, of_recipe in recipes.items()
        ]
        raise UserError(
            f"{describe_sweep(Path(folder))}. It has {count_of(recipes, 'recipe')}: {'; '.join(named)}. To average the "
            f"runs of one: resume=[{','.join(next(iter(recipes.values())))}], and to score them out of fold, "
            "mode.ensemble.out_of_fold=true."
        )
    return [*map(str, runs)]


def find_weights(run: str, *, out_of_fold: bool) -> Path:
    """Return the checkpoint of a run; out of fold, `last` if scores of the images of its fold have chosen `best`."""
    best = checkpoint.find(run, "best")
    return checkpoint.find(run, "last") if out_of_fold and _is_selected(best) else best


def _is_selected(path: Path) -> bool:
    """Return whether scores of its validation images have chosen the weights of a checkpoint."""
    config = checkpoint.describe(path)["config"]
    evaluate = config.get("trainer", {}).get("evaluate")
    return path.stem != "last" and resolve_evaluate(evaluate, config.get("data", {}).get("fold")) == "best"


def read_seen(path: Path, split: str | None = None) -> dict[str, list[str]]:
    """Return the names of the images that a checkpoint was trained or selected on, by side of the split.

    Args:
        path: of the checkpoint.
        split: to compare the names with. If train and val have a name in common, equal names of different splits are
            those of different images, and only this side is returned.

    Raises:
        UserError: there is no split.json of its training.
    """
    file = path.parent.parent / "split.json"
    if not file.is_file():
        raise UserError(f"resume: {path} has no {file.name} of its training: its images are unknown. {_REMEDY}")
    sides = forms.read_json(file, _SPLIT)
    if split is not None and not {*sides.get("train", ())}.isdisjoint(sides.get("val", ())):
        sides = {side: names for side, names in sides.items() if side == split}
    return {side: names for side, names in sides.items() if side != "val" or _is_selected(path)}


def check_unseen(data: SegmentationData, group: str | None, paths: Sequence[Path], *, split: str = "val") -> None:
    """Refuse a split with an image, or an image of a group, that a member was trained or selected on.

    Args:
        data: the split.
        group: pattern of `data.group`.
        paths: checkpoint of each member.
        split: its name; with test, a warning is logged instead, since images of another split may have the same names.

    Raises:
        UserError: naming the member and the images.
    """
    for path in paths:
        seen = {name for names in read_seen(path, split).values() for name in names}
        if split == "test":
            seen |= {name.removeprefix(OUTSIDE) for name in seen}
        groups = find_groups(group, sorted({*data.names, *seen}), "data.group")[0]
        known = {groups.get(name, name) for name in seen}
        twice = [name for name in data.names if groups.get(name, name) in known]
        if twice and split == "test":
            logger.warning(
                "%s was trained or selected on images with names or groups of %s here (%s). If they are the same "
                "images, the scores are too high.",
                path,
                count_of(twice, "image"),
                join_names(twice),
            )
            return
        if twice:
            raise UserError(
                f"resume: {path} was trained or selected on {count_of(twice, 'image')} of this split, or on others of "
                f"their groups ({join_names(twice)}). {_REMEDY}"
            )


class FoldedData(ConcatDataset):
    """The validation images of all folds, fold by fold.

    Args:
        folds: the validation split of each fold, by `data.fold`.

    Attributes:
        fold_of: the fold of each image, by name.
    """

    def __init__(self, folds: Mapping[str, SegmentationData]) -> None:
        super().__init__(folds.values())  # type: ignore[arg-type]
        first = next(iter(folds.values()))
        self.classes, self.palette, self.ignore_index = first.classes, first.palette, first.ignore_index
        self.names = [name for data in folds.values() for name in data.names]
        self.skipped = {name: reason for data in folds.values() for name, reason in data.skipped.items()}
        self.maps = get_map_kinds(first)
        self.fold_of = {name: fold for fold, data in folds.items() for name in data.names}


def check_folds(data: FoldedData, paths: Sequence[Path]) -> None:
    """Refuse folds that score an image twice, or not every image of the trainings.

    Raises:
        UserError: naming the images.
    """
    trained = {name for path in paths for name in read_seen(path).get("train", ())}
    lacking = sorted(trained - {*data.names, *data.skipped})
    if lacking or len(data.fold_of) < len(data.names):
        raise UserError(
            f"resume: the runs do not score each image once: {len(data.names) - len(data.fold_of)} twice, "
            f"{len(lacking)} never ({join_names(lacking)}). Give runs of every fold of one division: the same "
            "data.folds, data.group and data."
        )


class MemberCounts:
    """Counts of the members' own predictions, from the passes of the ensemble.

    Args:
        collector: of the ensemble's predictions, which also receives each batch.
        ensemble: stores the class ids and the objects of the members.
        data: the evaluated split; each rank has every `world_size`-th image in order.
        metrics: of objects.
    """

    def __init__(
        self,
        collector: Any,
        ensemble: TrainedModel,
        strategy: AveragedStrategy,
        data: SegmentationData,
        metrics: Sequence[RowMetric] = (),
    ) -> None:
        self._collector, self._engine, self._strategy, self._data = collector, ensemble.engine, strategy, data
        self.metrics = metrics
        # index of an image; of each member, the counts (3 or 4, K) of its classes, and those of each metric
        self._rows: list[tuple[int, list[tuple[np.ndarray, list[Counts]]]]] = []
        strategy.ids = {}

    def add(self, batch: Batch, ids: Tensor, logits: Tensor) -> None:
        """Add a batch, in the form that `evaluate` passes to `on_batch`."""
        self._collector.add(batch, ids, logits)
        found = self._strategy.ids or {}
        members = {number: torch.cat(found[number], dim=-2).cpu().numpy() for number in sorted(found)}
        for image, mask in enumerate(batch.mask.cpu().numpy()):
            held = Objects.of_map(batch.maps[OBJECTS][image].cpu().numpy()) if self.metrics else None
            sample = LabelledImage(mask, len(self._data.classes), self._data.ignore_index, batch.names[image], held)
            index = self._engine.rank + len(self._rows) * self._engine.world_size
            row = []
            for number, masks in members.items():
                objects = self._strategy.found[number][image] if self.metrics else None
                prediction = PredictedImage(masks[image], objects=objects)
                of_metrics = [count_image(metric, prediction, sample) for metric in self.metrics]
                row.append((count_classes(masks[image], sample), of_metrics))
            self._rows.append((index, row))

    def gather(self) -> list[list[tuple[np.ndarray, list[Counts]]]]:
        """Return the counts of each member on the images of all ranks, in the order of the data."""
        rows = sorted(self._engine.gather(self._rows), key=lambda row: row[0])
        return [[*of_member] for of_member in zip(*(row for _, row in rows), strict=True)]


def measure_gain(
    record: ImageRecord,
    members: Mapping[str, Sequence[tuple[np.ndarray, Sequence[Counts]]]],
    metrics: Sequence[RowMetric] = (),
) -> dict[str, Any]:
    """Log and return how much better an ensemble is than the mean of its members, paired over units.

    The interval is for these members, not for other trainings. The log names the first score of the first metric, or
    mIoU.

    Args:
        record: of the ensemble's evaluation.
        members: of each by its name, for each image, the counts (3 or 4, K) of its classes and of each metric.
        metrics: of objects, which the record has, too.
    """
    kind = ClassScores(len(record.classes), record.background)

    def score_classes(counts: np.ndarray) -> dict[str, UnitScore]:
        return score_units(kind, unit_sums(counts, record.units))

    scores = []
    for rows in members.values():
        scores.append(score_classes(np.stack([counts for counts, _ in rows])))
        for number, metric in enumerate(metrics):
            found = leave_units_out(metric, [counts[number] for _, counts in rows], record.units)
            scores[-1] |= further_scores(metric, found)
    ensemble = score_classes(record.counts)
    ensemble |= {key: record.scores[key] for key in scores[0] if key not in ensemble}
    gaps = {key: estimate_difference([each[key] for each in scores], [score]) for key, score in ensemble.items()}
    values = [{key: _plain(score.value) for key, score in each.items()} for each in (*scores, ensemble)]
    main = next((score for metric in metrics for score in metric.scores), "miou")
    gap = gaps[main]
    logger.info(
        "ensemble of %d: %s %s %%, %s over the mean of its members (95 %% interval %s over %s; members: %s %%)",
        len(members),
        "mIoU" if main == "miou" else main,
        percent(values[-1][main], 2),
        percent(plain_score(gap.value), 2, "+"),
        format_interval(gap.ci95, 2, "+"),
        count_of(record.count_units(), record.unit),
        ", ".join(percent(each[main], 2) for each in values[:-1]),
    )
    over_mean = {key: {"value": plain_score(gap.value), "ci95": gap.ci95} for key, gap in gaps.items()}
    return {"members": dict(zip(members, values[:-1], strict=True)), "over_mean": over_mean}


def _plain(value: float | None) -> float | None:
    return None if value is None else plain_score(value)
