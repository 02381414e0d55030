"""Builder of the parts of an experiment from the config: data, loss, optimizer, schedule, task and loop settings."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import Optimizer

from dinoseg.config.composition import compose_options
from dinoseg.config.nodes import argument_keys, check_partial, expect_type, instantiate
from dinoseg.config.plain import to_container
from dinoseg.core.channels import check_rgb
from dinoseg.core.contracts import Loss
from dinoseg.core.metric import Metric, RowMetric
from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.splits import SPLITS
from dinoseg.core.task import ObjectTask
from dinoseg.experiment.models import ModelBuilder
from dinoseg.training.description import METRIC
from dinoseg.training.optim import Schedule
from dinoseg.training.trainer import Settings
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import KeyNotSet, UserError, name_parameters
from dinoseg.utils.ranges import Count, Positive
from dinoseg.utils.units import hash_of
from dinoseg.utils.wording import format_override, join_names

logger = logging.getLogger(__name__)
_NAMED = 40  # maximum number of class weights in the log
_LAYER_METRIC = {"_target_": "dinoseg.metrics.layers.LayerMetric", "_partial_": True}
# of packages that this module may not import: parts that a config names do not depend on one another
_PREPARE = "dinoseg.data.opened.prepare_dataset"
_CUSTOM_CHECK = {"_target_": "dinoseg.data.custom.check_custom_dataset", "_partial_": True}


class Lengths(NamedTuple):
    """Lengths that `fit` takes."""

    steps: int
    val_every: int


def in_steps(
    samples: int,
    *,
    batch_size: Count,
    accumulate: Count,
    steps: Count | None = None,
    epochs: Positive | None = None,
    val_every: Count | None = None,
) -> Lengths:
    """Return a training's lengths in optimizer steps.

    Epochs follow one another without a gap: an epoch of 10 samples in batches of 4 is two and a half steps long. Only
    the total is rounded.

    Args:
        samples: in an epoch.
        batch_size: samples in a batch, over all devices.
        accumulate: batches per optimizer step.
        steps: the length if `epochs` is None.
        epochs: the length, which takes precedence over `steps`.
        val_every: steps between validations; None: an epoch.

    Raises:
        UserError: neither `steps` nor `epochs` is set.
    """
    if epochs is None and steps is None:
        raise UserError("Neither trainer.steps nor trainer.epochs is set: give one of them.")
    epoch = samples / (batch_size * accumulate)
    return Lengths(
        steps=max(1, round(epochs * epoch)) if epochs is not None else steps or 0,
        val_every=max(1, round(epoch)) if val_every is None else val_every,
    )


class Builder(ModelBuilder):
    """Builder of the model and of all other parts of an experiment."""

    @property
    def cache_dir(self) -> Path:
        """The folder of all caches."""
        return Path(self._cfg.cache_dir).expanduser()

    @property
    def workers(self) -> int:
        """The number of threads that check files."""
        return self._cfg.data.get("workers") or count_cores()

    @property
    def skips_faulty_files(self) -> bool:
        """Return whether unreadable files are left out with a warning instead of an error."""
        return self._cfg.data.on_error == "skip"

    @property
    def class_names(self) -> list[str]:
        """The class names of the data in the order of their IDs."""
        return [str(name) for name in self._cfg.data.classes]

    @property
    def background(self) -> int | None:
        """The class ID of the background, as named by `data.background`; None if every class is an object.

        Raises:
            UserError: the dataset has no class of this name.
        """
        value, names = self.value("data.background"), self.class_names
        if value is None or value in names:
            return None if value is None else names.index(value)
        if type(value) is int and 0 <= value < len(names):
            return value
        raise UserError(
            f"data.background={format_override(value)} is not a class. Give the name or the id of one (0 to "
            f"{len(names) - 1}: {join_names(names)}), or null if there is none."
        )

    def digest(self, key: str, **overrides: Any) -> str:
        """Return a hash of the resolved config node at a full key, with new values of some of its keys."""
        return hash_of(repr({**to_container(self.value(key), resolve=True), **overrides}))

    def with_options(self, overrides: Mapping[str, Any]) -> Self:
        """Return a builder of the same config with new values of keys, and packaged options of groups."""
        new: Any = OmegaConf.create(self.config)
        for key, value in overrides.items():
            if key in new.choices:
                new[key] = compose_options({key: value}, ())[key]
                new.choices[key] = value
            else:
                OmegaConf.update(new, key, value)
        return type(self)(new)

    def make_training(self) -> Any:
        """Return a training of the kind that `trainer.method` names (`dinoseg.methods.training.Training`).

        The builder does not hold it: in a cycle, the model of a failed training would stay in memory.

        Raises:
            UserError: a teacher is given to a method without distillation, or an option is invalid.
        """
        check_partial(self._cfg.trainer.method, "trainer.method")
        return self.part("trainer.method")(self)

    def reader(self) -> Callable[[str], SegmentationData]:
        """Return the function that maps a split to the dataset as read from its files, before it is prepared.

        Raises:
            UserError: no reader is configured. The returned function raises it for any fault of the dataset, see
                `check_custom_dataset`.
        """
        node = self._cfg.data.get("reader") or {}
        check_partial(node, "data.reader")
        try:
            find = self.part("data.reader")
        except KeyNotSet as error:
            if error.key != "data.root":
                raise
            raise KeyNotSet(f"{error}{_expected_files(node.get('layout'))}", key=error.key) from None
        check_custom_dataset = instantiate(_CUSTOM_CHECK)
        classes, ignore_index = list(self._cfg.data.classes), self._cfg.data.ignore_index
        task = self.task
        takes = inspect.signature(find).parameters
        pixels = self.pixels
        known = {**task.reader_options, "suffixes": pixels.suffixes}
        options = {name: value for name, value in known.items() if name in takes}
        checks = {"pixels": pixels, "has_layers": task.has_layers}
        add_objects = None if self.value("data.objects") is None else self.part("data.objects")

        def read(split: str) -> SegmentationData:
            data = find(split=split, **options)
            if add_objects is not None:
                data = add_objects(data, background=self.background)
            return check_custom_dataset(data, classes, ignore_index, **checks)

        return read

    def dataset(self, split: str, *, reduced: bool = False) -> SegmentationData:
        """Return one split of the dataset.

        Args:
            split: train, val or test.
            reduced: open it for training: packed images may be stored at the model's input size.

        Raises:
            UserError: the split is unknown, or the dataset has a fault.
        """
        if split not in SPLITS:
            raise UserError(f"split={split} is unknown. Choose one of {', '.join(SPLITS)}.")
        pairs = self.reader()(split)
        keys = {name: f"data.{name}" for name in ("on_error", "cache", "workers")}
        keys |= {"cache_dir": "cache_dir", "longest": "resolution.longest"}
        if reduced and split == "train" and self.value("data.labelled") is not None:
            keys |= {"labelled": "data.labelled", "group": "data.group", "seed": "seed"}
        options = self.arguments(_PREPARE, keys)
        prepare_dataset = instantiate({"_target_": _PREPARE, "_partial_": True})
        pack = None if self.value("pack") is None else self.part("pack")
        with name_parameters(keys):
            return prepare_dataset(pairs, split=split, reduced=reduced, pack=pack, **options)

    def clips(self, split: str) -> Any:
        """Return one split of the videos as clips of frames (`dinoseg.extensions.clips.cut.Clips`).

        Raises:
            UserError: the data are no videos, or the dataset has a fault.
        """
        if self.value("data.clips") is None:
            raise UserError(
                f"data={self.options['data']} has no clips. Choose data=davis2016, davis2017, youtube_vos, movi or "
                "videos."
            )
        check_rgb(self.pixels, f"data={self.options['data']}")
        return self.part("data.clips")(split=split)

    @property
    def loss_has_classes(self) -> bool:
        """Return whether the loss is computed from labels, whose classes it can weight; losses on clips are not."""
        return self._cfg.loss.class_weights is not None

    def loss(self, train: SegmentationData | None) -> Loss:
        """Return the loss; unless `loss.weights` is none, its class weights follow from the training masks.

        `train` may be None for a loss without classes.
        """
        weights = self._cfg.loss.weights
        if weights == "none":
            return self.unweighted_loss()
        assert train is not None  # `loss_outline` refuses weights of a loss without classes
        counts = self.part("loss.counts")(train) if isinstance(weights, str) else [1] * len(train.classes)
        found = self.part("loss.class_weights")(counts, train.classes)
        named = [f"{name} {weight:.3f}" for name, weight in zip(train.classes, found.tolist(), strict=True)]
        logger.info("loss.weights=%s: %s", weights, join_names(named, _NAMED))
        return self.criterion(class_weights=found)

    @cached_property
    def loss_outline(self) -> Loss:
        """The loss on the meta device with equal class weights, which states its needs before labels are counted.

        Raises:
            UserError: class weights are set for a loss without classes, or an option is invalid.
        """
        weights = self._cfg.loss.weights
        if weights != "none" and not self.loss_has_classes:
            raise UserError(f"loss.weights={weights}: loss={self.options['loss']} uses no classes. Leave it out.")
        with torch.device("meta"):
            return self.unweighted_loss()

    def unweighted_loss(self) -> Loss:
        """Return the loss with equal class weights, without counting labels."""
        if not self.loss_has_classes:
            return self.criterion()
        return self.criterion(class_weights=torch.ones(len(self._cfg.data.classes)))

    def criterion(self, **weights: Tensor) -> Loss:
        """Return the loss with given weights; a loss on labels takes `class_weights`."""
        check_partial(self.value("loss.criterion"), "loss.criterion")
        loss = expect_type(Loss, self.part("loss.criterion")(**weights), "loss.criterion")
        if isinstance(self.task, ObjectTask):
            loss.needs_maps = {**loss.needs_maps, OBJECTS: ObjectMap()}
        for part in loss.modules():  # a sum has terms
            if isinstance(part, Loss):
                part.task = self.task
        return loss

    @cached_property
    def metric_nodes(self) -> Mapping[str, Any]:
        """The config nodes of the group `metric`, and then of the metrics that a task of objects always counts."""
        always = self.task.eval_metrics if isinstance(self.task, ObjectTask) else ()
        return self.with_metrics(always).value(METRIC) or {}

    def with_metrics(self, names: Sequence[str]) -> Self:
        """Return a builder with further options of the group `metric`, after those that are chosen."""
        added = [name for name in names if name not in (self.value(METRIC) or {})]
        return self.with_changes({METRIC: compose_options({METRIC: added})[METRIC]}) if added else self

    @cached_property
    def metrics(self) -> list[RowMetric]:
        """The metrics of `metric_nodes`, in addition to what every validation counts.

        Metrics of a task of layers count each layer by itself, except those that `needs_bins`.

        Raises:
            UserError: a config node makes no metric, its options do not fit the classes, or it needs objects, which the
                task does not predict.
        """
        has_layers = self.task.has_layers
        metrics: list[RowMetric] = []
        for name, node in self.metric_nodes.items():
            if not OmegaConf.is_dict(node):
                raise UserError(
                    f"metric.{name}={node} is not a metric. Choose options of the group metric: metric=[NAME]. In its "
                    "YAML file, `_target_` and its arguments are below the key NAME:."
                )
            metric = expect_type(RowMetric, instantiate(node), f"{METRIC}.{name}")  # type: ignore[type-abstract]
            if metric.needs_objects and not isinstance(self.task, ObjectTask):
                raise UserError(
                    f"metric=[{name}] compares objects, which task={self.options['task']} does not predict. Leave it "
                    "out, or train with task=instance or task=panoptic."
                )
            with name_parameters(argument_keys(node)):
                metric.check_classes(len(self.class_names), has_layers=has_layers)
            is_whole = metric.needs_bins or not isinstance(metric, Metric)
            metrics.append(metric if is_whole or not has_layers else instantiate(_LAYER_METRIC)(metric))
        return metrics

    @property
    def score_metric(self) -> str | None:
        """Return the option of `metric` that computes `trainer.score`; None if validations count it anyway."""
        named = zip(self.metric_nodes, self.metrics, strict=True)
        return next((name for name, metric in named if self.value("trainer.score") in metric.scores), None)

    def optimizer(self, model: torch.nn.Module) -> Optimizer:
        """Return the optimizer of a model's trainable parameters."""
        return self.part("optim.optimizer")(model)

    def schedule(self) -> Schedule:
        """Return the learning-rate schedule, which maps a step and the number of steps to a factor."""
        return self.part("optim.schedule")

    def loop_settings(self, samples: int) -> Settings:
        """Return the settings of the training loop, for `samples` training samples.

        Raises:
            UserError: no length is configured, or a value is out of range.
        """
        names = {key: f"trainer.{key}" for key in ("steps", "epochs", "val_every", "accumulate")}
        names["batch_size"] = "data.batch_size"
        lengths = in_steps(samples, **self.arguments(in_steps, names))._asdict()
        others = {name: f"trainer.{name}" for name in inspect.signature(Settings).parameters if name not in lengths}
        return Settings(**lengths, **self.arguments(Settings, others))


def _expected_files(layout: Mapping[str, Any] | None) -> str:
    """Return example paths of a dataset in a layout of image and mask folders; "" for other layouts."""
    if not layout or not layout.get("images") or not layout.get("masks"):
        return ""
    kinds = (("images", "image_suffix", "jpg"), ("masks", "mask_suffix", "png"))
    paths = [
        f"VALUE/{layout[kind]}/NAME{layout.get(suffix, '')}.{ending}".replace("{split}", name)
        for name in ((layout.get("splits") or {}).get(split, split) for split in ("train", "val"))
        for kind, suffix, ending in kinds
    ]
    return "\n- ".join(["\nExpected files:", *dict.fromkeys(paths)])
