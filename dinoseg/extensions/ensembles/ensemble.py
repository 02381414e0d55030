"""`resume=[RUN,RUN,...]` and `dinoseg.load([...])`: several trained models as one."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from dinoseg.checkpoints.trained import C, TrainedModel, load_member
from dinoseg.core.contracts import require_classes
from dinoseg.core.metric import RowMetric, plain_score
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.core.task import ObjectTask, Task
from dinoseg.data.loader import eval_samples, stack_equal
from dinoseg.evaluation.image_record import read_record
from dinoseg.evaluation.scoring.intervals import jackknife, unit_sums
from dinoseg.evaluation.unit_scores import ClassScores
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.models import ModelBuilder
from dinoseg.extensions.ensembles import scoring
from dinoseg.extensions.ensembles.strategy import AveragedModel, AveragedStrategy
from dinoseg.extensions.thresholds.choice import choose_by_fold, count_images
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.models.model import SegmentationModel
from dinoseg.report.html.page import format_interval
from dinoseg.report.table import few_units, percent
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.segmenter import Segmenter
from dinoseg.segmenter.torch_runtime import TorchRuntime
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import compute_dtype
from dinoseg.utils.wording import count_of, format_text

logger = logging.getLogger(__name__)


@dataclass
class Ensemble:
    """Several trained models as one: class probabilities are averaged with equal weights, and instances fused.

    Args:
        offload: whether one model at a time is on the device.
        out_of_fold: whether each image of the split val is predicted by the runs that have not seen it; None: if
            `resume` is the folder of a sweep.
    """

    offload: bool = False
    out_of_fold: bool | None = None

    def compose(
        self, resume: str | Sequence[str], split: str | None, compose_run: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the config of a job: that of the first run, and those of the others as its `members`.

        Args:
            resume: runs, or the folder of a sweep.
            split: that the job scores; None: it scores none.
            compose_run: returns the plain config of the job with one checkpoint.

        Raises:
            UserError: there are fewer than two different runs, or the job scores nothing out of fold.
        """
        is_sweep = isinstance(resume, str)
        is_val = split == "val"
        if self.out_of_fold and not is_val:
            raise UserError("mode.ensemble.out_of_fold=true is for mode=eval and mode.split=val. Leave it out.")
        out_of_fold = is_val and (is_sweep if self.out_of_fold is None else self.out_of_fold)
        runs = scoring.list_sweep(resume) if isinstance(resume, str) else [*map(str, resume)]
        paths = [scoring.find_weights(run, out_of_fold=out_of_fold) for run in runs]
        if len({path.resolve() for path in paths}) < max(2, len(paths)):
            raise UserError(f"resume={resume}: an ensemble needs two or more different runs, each named once.")
        first, *others = map(compose_run, paths)
        first["members"] = others
        first["mode"]["ensemble"]["out_of_fold"] = out_of_fold
        if out_of_fold:  # its images are those of all folds; the protocol of a benchmark reads a split from files
            first["data"] |= {"fold": None, "folds": None}
            first["mode"]["official"] = False
        return first

    def load(self, builder: ModelBuilder, first: TrainedModel) -> TrainedModel:
        """Return the ensemble of the loaded first member and the others, which a builder describes.

        Raises:
            UserError: a member does not fit the first one.
        """
        builders = [builder, *builder.members]
        models = [first]
        self._unload(first.model)
        for each in builder.members:
            models.append(load_member(each, first.engine))
            self._unload(models[-1].model)
        if self.out_of_fold and builder.value("task.threshold") == "auto":
            # those of a training were chosen on the images that are scored here
            for each, trained in zip(builders, models, strict=True):
                trained.model.task = each.with_changes({}).task
        facts = {
            f"resume={each.resume}": describe_member(
                trained.model, trained, each.pixels.as_dict(), trained.strategy, averages=not self.out_of_fold
            )
            for each, trained in zip(builders, models, strict=True)
        }
        check_members(facts, "Set task.threshold=[...] with numbers for all.")
        members = [
            Predictor(trained.model, first.device, _autocast(each, first.device), trained.strategy.base)
            for each, trained in zip(builders, models, strict=True)
        ]
        averaged = AveragedStrategy(members, offload=self.offload)
        given = {**vars(first), "strategy": first.strategy.around(averaged), "averaged": averaged}
        return TrainedEnsemble(**given, builders=builders, models=models, out_of_fold=bool(self.out_of_fold))

    def open(self, models: Iterable[Model]) -> Model:
        """Return the ensemble of models that were loaded from files.

        Raises:
            UserError: one does not fit the first, or is no model of torch.
        """
        members: list[Predictor] = []
        facts: dict[str, Any] = {}
        for model in models:
            if not isinstance(model, Segmenter):
                raise UserError(
                    f"{model.source} needs another runtime, and an ensemble averages models of torch. Leave it out."
                )
            predictor = model.runtime.predictor
            members.append(replace(predictor, strategy=predictor.strategy.base))
            self._unload(model.model)
            facts[str(Path(str(model.source)).resolve())] = describe_member(
                model.model, model, model.facts.pixels, predictor.strategy
            )
        if len(facts) < max(2, len(members)):
            raise UserError("path: an ensemble needs two or more different models, each named once.")
        check_members(facts, "Export each with one task.threshold=[...], or use dinoseg.evaluate or dinoseg.predict.")
        strategy = predictor.strategy.around(AveragedStrategy(members, offload=self.offload))
        return Model(TorchRuntime(replace(members[0], strategy=strategy)), replace(model.facts, scores=None))

    def _unload(self, model: SegmentationModel) -> None:
        if self.offload:
            model.to("cpu")


@dataclass(kw_only=True)
class TrainedEnsemble(TrainedModel):
    """Trained ensemble, whose model is the first member.

    Args:
        averaged: the inference strategy without post-processing.
        builders: of the members.
        models: the members.
        out_of_fold: whether the images of a split are those of all folds, each predicted by the runs of its own.
    """

    averaged: AveragedStrategy
    builders: Sequence[ModelBuilder]
    models: Sequence[TrainedModel]
    out_of_fold: bool
    counts: scoring.MemberCounts | None = None  # of the members, in an evaluation
    data: SegmentationData | None = None  # the split that is evaluated
    metrics: Sequence[RowMetric] = ()  # of its objects

    @property
    def single_pass_model(self) -> SegmentationModel:
        """Return the mean of all members in one pass over whole images.

        Raises:
            UserError: only one member at a time is on the device, or the members find objects.
        """
        if isinstance(self.model.task, ObjectTask):
            raise UserError("mode=track follows the objects of one model. Give a single run.")
        if self.averaged.offload:
            raise UserError("mode.ensemble.offload=true: mode=track holds all models on the device. Leave it out.")
        return AveragedModel(self.averaged).eval()

    def limit_size(self, *, reduces: bool = True) -> None:
        """Reduce images larger than any of a member's training, for each member by its own."""
        for member in self.models:
            member.limit_size(reduces=reduces)

    def open_split(self, builder: Builder, split: str) -> SegmentationData:
        """Return a split on which no member (out of fold: of the image's fold) was trained or selected.

        Raises:
            UserError: one was, or segments of several members would be fused.
        """
        group, paths = builder.value("data.group"), [*map(Path, builder.checkpoints)]
        if not self.out_of_fold:
            self.data = builder.dataset(split)
            self.metrics = [metric for metric in builder.metrics if metric.needs_objects]
            scoring.check_unseen(self.data, group, paths, split=split)
            return self.data
        folds = {}
        for fold, members in self._folds.items():
            if len(members) > 1 and is_panoptic(self.model.task):
                raise UserError(
                    f"resume: {len(members)} runs predict fold {fold}, and panoptic segments cannot be fused. Give one "
                    "run of each fold."
                )
            folds[fold] = Builder(self.builders[members[0]].with_changes(self._fold_of(members[0])).cfg).dataset(split)
            scoring.check_unseen(folds[fold], group, [paths[number] for number in members])
        self.data = scoring.FoldedData(folds)
        scoring.check_folds(self.data, paths)
        return self.data

    def batches(self, data: SegmentationData) -> Iterator[Batch] | None:
        """Return the images of all folds, each predicted by its own members; None: the split's own."""
        return self._read_folds(data) if isinstance(data, scoring.FoldedData) else None

    def choose_thresholds(
        self, choose: Callable[..., Any], builder: Builder, data: SegmentationData, split: str
    ) -> None:
        """Choose the thresholds of each fold on the other folds.

        Raises:
            UserError: the ensemble is not scored out of fold: no member may choose on what another has seen.
        """
        if not isinstance(data, scoring.FoldedData):
            raise UserError(
                "task.threshold=auto chooses thresholds on validation images, which members of this ensemble were "
                "trained or selected on. Set task.threshold=[...], or score runs of all folds out of fold."
            )
        counts = count_images(self.model, data, self.engine, self.averaged, self._read_folds(data))
        folds = [data.fold_of[name] for name in data.names]
        logged = data.classes if self.engine.is_main else None
        self.thresholds_by_fold = choose_by_fold(counts, folds, self.model.task.beta, logged)

    def watch(self, collector: C) -> C:
        """Return a collector that also counts the predictions of each member."""
        if collector is None or self.out_of_fold or self.data is None:
            return collector
        if self.strategy is not self.averaged:
            logger.info("The ensemble is not compared with its members, whose small regions are not removed.")
            return collector
        self.counts = scoring.MemberCounts(collector, self, self.averaged, self.data, self.metrics)
        return self.counts  # type: ignore[return-value]

    def report(self, out_dir: Path) -> dict[str, Any]:
        """Log the gain over the members, or out of fold the score over all images, with intervals."""
        counts = None if self.counts is None else self.counts.gather()
        if not self.engine.is_main or (counts is None and not self.out_of_fold):
            return {}
        record = read_record(out_dir)
        if counts is not None:
            names = [str(builder.resume) for builder in self.builders]
            gain = scoring.measure_gain(record, dict(zip(names, counts, strict=True)), self.metrics)
            write_json(out_dir / "ensemble.json", gain)
            return {"ensemble": gain}
        kind, units = ClassScores(len(record.classes), record.background), record.count_units()
        found = {name: score.estimate() for name, score in record.scores.items() if name in record.image_scores}
        found["mIoU"] = jackknife(kind, unit_sums(record.counts, record.units))["miou"]
        logger.info(
            "out of fold: %s over %s, each predicted by the runs of its fold",
            ", ".join(
                f"{name} {percent(plain_score(score.value), 2)} % (95 % interval {format_interval(score.ci95, 2)})"
                for name, score in found.items()
            ),
            count_of(units, record.unit),
        )
        if few := few_units(units, record.unit):
            logger.warning("%s", few)
        if any(trained.info["config"]["trainer"].get("patience") for trained in self.models):
            logger.info("trainer.patience may have stopped trainings by scores of these images, which may be too high")
        return {}

    def _fold_of(self, member: int) -> dict[str, Any]:
        """Return the fold of a member, as its training had it."""
        data = self.models[member].info["config"].get("data", {})
        return {"data": {"fold": data.get("fold"), "folds": data.get("folds")}}

    @property
    def _folds(self) -> dict[str, list[int]]:
        """Return the members of each fold, by `data.fold`."""
        folds: dict[str, list[int]] = {}
        for member in range(len(self.models)):
            folds.setdefault(str(self._fold_of(member)["data"]["fold"]), []).append(member)
        return folds

    def _read_folds(self, data: scoring.FoldedData) -> Iterator[Batch]:
        engine = self.engine
        samples = eval_samples(data, workers=engine.workers, rank=engine.rank, world_size=engine.world_size)
        for fold, same in groupby(samples, key=lambda sample: data.fold_of[sample["name"]]):
            self.averaged.active = self._folds[fold]
            if self.thresholds_by_fold:
                self.model.task.use_thresholds(self.thresholds_by_fold[fold], "other folds")
            yield from stack_equal(same, engine.images_at_once)


def describe_member(
    model: SegmentationModel,
    labels: Any,
    pixels: Mapping[str, Any],
    strategy: InferenceStrategy,
    *,
    averages: bool = True,
) -> dict[str, Any]:
    """Return what the members of an ensemble must have in common, by its name in messages.

    Args:
        model: of the member.
        labels: has its `classes` and `ignore_index`.
        pixels: format of its images.
        strategy: of its inference.
        averages: whether members predict the same images.

    Raises:
        UserError: the model has no classes, or finds panoptic segments, which are not fused.
    """
    require_classes(model.head, "A member of the ensemble")
    if averages and is_panoptic(model.task):
        raise UserError("An ensemble fuses instances, and cannot fuse panoptic segments. Give a single run.")
    return {
        "classes": [*labels.classes],
        "ignored id": labels.ignore_index,
        "task": type(model.task).__name__.removesuffix("Task").lower(),
        "things": sorted(model.task.things) if isinstance(model.task, ObjectTask) else None,
        "task.threshold": model.task.thresholds and [*model.task.thresholds],
        "image format": {**pixels, "channels": model.backbone.channels},
        "post-processing": None if strategy.base is strategy else repr(strategy),
    }


def is_panoptic(task: Task) -> bool:
    """Return whether a task finds objects that never overlap."""
    return isinstance(task, ObjectTask) and not task.overlap


def check_members(facts: Mapping[str, Mapping[str, Any]], same_thresholds: str) -> None:
    """Refuse members, by name, that differ in what they must have in common.

    Args:
        facts: of each member.
        same_thresholds: how they get the same thresholds, for messages.

    Raises:
        UserError: naming both and the difference.
    """
    (first, common), *others = facts.items()
    for name, own in others:
        for what in [what for what, value in own.items() if value != common[what]]:
            values = [format_text(str(each[what])) for each in (own, common)]
            remedy = same_thresholds if what == "task.threshold" else "Average models that agree in it."
            raise UserError(f"{name} has {what} {values[0]}, and {first} {values[1]}. {remedy}")


def _autocast(builder: ModelBuilder, device: torch.device) -> Callable[[], torch.autocast]:
    """Return the context factory of a member's own precision."""
    dtype = compute_dtype(builder.value("engine.precision"), device)
    if dtype == torch.float32:
        return partial(torch.autocast, device.type, enabled=False)
    return partial(torch.autocast, device.type, dtype=dtype)
