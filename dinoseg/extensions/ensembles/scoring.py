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
from dinoseg.core.metric import LabelledImage, plain_score
from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.data.splits import find_groups
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import estimate_difference, score_units, unit_sums
from dinoseg.evaluation.unit_scores import ClassScores
from dinoseg.extensions.ensembles.strategy import AveragedStrategy
from dinoseg.metrics.miou import count_classes
from dinoseg.report.html.page import format_interval
from dinoseg.report.table import percent
from dinoseg.runs.folder import LOG, command_line
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


def read_seen(path: Path) -> set[str]:
    """Return the names of the images that a checkpoint was trained or selected on.

    Raises:
        UserError: there is no split.json of its training.
    """
    file = path.parent.parent / "split.json"
    if not file.is_file():
        raise UserError(f"resume: {path} has no {file.name} of its training: its images are unknown. {_REMEDY}")
    split = forms.read_json(file, _SPLIT)
    return {name for side in ("train", *(("val",) if _is_selected(path) else ())) for name in split.get(side, ())}


def check_unseen(data: SegmentationData, group: str | None, paths: Sequence[Path], *, warns: bool = False) -> None:
    """Refuse a split with an image, or an image of a group, that a member was trained or selected on.

    Args:
        data: the split.
        group: pattern of `data.group`.
        paths: checkpoint of each member.
        warns: log a warning instead, since images of another split may have the same names.

    Raises:
        UserError: naming the member and the images.
    """
    for path in paths:
        seen = read_seen(path)
        groups = find_groups(group, sorted({*data.names, *seen}), "data.group")[0]
        known = {groups.get(name, name) for name in seen}
        twice = [name for name in data.names if groups.get(name, name) in known]
        if twice and warns:
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
    lacking = sorted(set.union(*map(read_seen, paths)) - {*data.names, *data.skipped})
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
        ensemble: stores the class ids of the members.
        data: the evaluated split; each rank has every `world_size`-th image in order.
    """

    def __init__(
        self, collector: Any, ensemble: TrainedModel, strategy: AveragedStrategy, data: SegmentationData
    ) -> None:
        self._collector, self._engine, self._strategy, self._data = collector, ensemble.engine, strategy, data
        self._rows: list[tuple[int, np.ndarray]] = []  # index of an image, and counts (M, 3 or 4, K)
        strategy.ids = {}

    def add(self, batch: Batch, ids: Tensor, logits: Tensor) -> None:
        """Add a batch, in the form that `evaluate` passes to `on_batch`."""
        self._collector.add(batch, ids, logits)
        found = self._strategy.ids or {}
        members = [torch.cat(found[number], dim=-2).cpu().numpy() for number in sorted(found)]
        for image, mask in enumerate(batch.mask.cpu().numpy()):
            sample = LabelledImage(mask, len(self._data.classes), self._data.ignore_index)
            index = self._engine.rank + len(self._rows) * self._engine.world_size
            self._rows.append((index, np.stack([count_classes(each[image], sample) for each in members])))

    def gather(self) -> np.ndarray:
        """Return the counts (N, M, 3 or 4, K) of the images of all ranks, in the order of the data."""
        rows = sorted(self._engine.gather(self._rows), key=lambda row: row[0])
        return np.stack([counts for _, counts in rows])


def measure_gain(record: ImageRecord, counts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Log and return how much better an ensemble is than the mean of its members, paired over units.

    The interval is for these members, not for other trainings.

    Args:
        record: of the ensemble's evaluation.
        counts: (N, M, 3 or 4, K) of the members on the same images.
        names: of the members.
    """
    kind = ClassScores(len(record.classes), record.background)
    by_run = [*counts.swapaxes(0, 1), record.counts]
    *members, ensemble = [score_units(kind, unit_sums(of_run, record.units)) for of_run in by_run]
    gaps = {key: estimate_difference([each[key] for each in members], [ensemble[key]]) for key in kind.keys}
    scores = [
        {key: plain_score(value) for key, value in kind.scores(each.sum(axis=0).ravel()).items()} for each in by_run
    ]
    gap = gaps["miou"]
    logger.info(
        "ensemble of %d: mIoU %s %%, %s over the mean of its members (95 %% interval %s over %s; members: %s %%)",
        len(names),
        percent(scores[-1]["miou"], 2),
        percent(plain_score(gap.value), 2, "+"),
        format_interval(gap.ci95, 2, "+"),
        count_of(record.count_units(), record.unit),
        ", ".join(percent(each["miou"], 2) for each in scores[:-1]),
    )
    over_mean = {key: {"value": plain_score(gap.value), "ci95": gap.ci95} for key, gap in gaps.items()}
    return {"members": dict(zip(names, scores[:-1], strict=True)), "over_mean": over_mean}
