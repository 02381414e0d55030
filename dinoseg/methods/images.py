"""Training on images and their masks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dinoseg.core.contracts import check_needs, require_classes
from dinoseg.core.sample_maps import check_needed_maps, get_map_kinds
from dinoseg.core.task import ObjectTask, refuse_layers
from dinoseg.data.checks.errors import check_for_errors
from dinoseg.data.splits import evenly_spaced_subset
from dinoseg.data.transforms import Augment
from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.images import evaluate_images
from dinoseg.evaluation.run_facts import EVALUATION
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import Provenance
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.methods.training import Training
from dinoseg.metrics.confusion import commonest_class
from dinoseg.metrics.rows import MetricRows, check_score_names
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule, list_score_names
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
# from parameters of the feed to the keys that set them
SAMPLING = {"batch_size": "data.batch_size", "views": "data.views"}


class ImageTraining(Training):
    """Training on images in which every pixel has a class.

    Args:
        builder: see `Training`.
    """

    what = "images"
    data_module: ImageDataModule

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self._val_count = builder.arguments(evenly_spaced_subset, {"count": "trainer.val_images"})

    def find_score_names(self) -> Sequence[str]:
        """Return the scores of every validation, and those of the configured metrics."""
        check_score_names(self.builder.metrics)
        return list_score_names(self.builder.metrics, has_background=self.builder.background is not None)

    def open_data(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the images and masks of train and val."""
        builder = self.builder
        options = builder.arguments(ImageDataModule, SAMPLING)
        train, val = builder.dataset("train", reduced=True), builder.dataset("val")
        self._val_total = len(val)
        self.split = {"train": list(train.names), "val": list(val.names)}
        self.data_module = ImageDataModule(
            train=train,
            val=evenly_spaced_subset(val, **self._val_count),
            augment=builder.part("data.augment"),
            background=builder.background,
            strategy=builder.strategy(builder.class_names),
            seed=builder.seed,
            workers=engine.workers,
            rank=engine.rank,
            world_size=engine.world_size,
            pictures=pictures,
            metrics=builder.metrics,
            task=builder.task,
            **options,
        )
        self.labels = self.labelled = self.data_module.train
        for split, data in (("train", train), ("val", val)):
            names = f"loss={builder.options['loss']}", f"data={builder.options['data']} ({split})"
            if isinstance(builder.task, ObjectTask):
                builder.task.check_data(names[1], get_map_kinds(data), data.classes, builder.loss_outline)
            check_needed_maps(builder.loss_outline.needs_maps, get_map_kinds(data), *names)

    def _check_masks(self) -> None:
        """Refuse a loss or an option of the data that needs another form of masks than the task has."""
        builder, task = self.builder, self.builder.task
        needs_layers = "layers" in builder.loss_outline.needs
        if needs_layers != task.has_layers:
            raise UserError(
                f"loss={builder.options['loss']} does not fit task={builder.options['task']}. Choose {task.advice}; or "
                f"task={'multilabel' if needs_layers else 'semantic'} for this loss."
            )
        if isinstance(task, ObjectTask) and "masks" not in builder.loss_outline.needs:
            raise UserError(
                f"loss={builder.options['loss']} does not fit task={builder.options['task']}, whose objects are masks. "
                f"Choose {task.advice}; or task=semantic for this loss."
            )
        for key in ("data.augment.cat_max_ratio", "data.cache"):
            if (value := builder.value(key)) is not None:
                refuse_layers(task, f"{key}={value}", "Leave it out.")

    def check_parts(self, model: SegmentationModel, world_size: int) -> None:
        """Refuse a loss or a batch that the head cannot be trained with."""
        builder, options = self.builder, self.builder.options
        self._check_masks()
        if builder.value("loss.weights") != "none":
            names = builder.class_names
            builder.part("loss.class_weights")([1] * len(names), names)  # refuses an unknown scheme or class name
        head = model.head
        require_classes(head, f"head={options['head']}")
        provided = head.provides | {"layers"} if model.task.has_layers else head.provides
        by = f"head={options['head']} with task={options['task']}"
        check_needs(builder.loss_outline, provided, f"loss={options['loss']}", by)
        if head.init is not None:
            refuse_layers(model.task, f"head.init={head.init}", "Leave it out.")
        least = head.min_batch_size * world_size
        if builder.value("data.batch_size") < least:
            raise UserError(
                f"data.batch_size={builder.value('data.batch_size')}: head={options['head']} is trained on "
                f"{head.min_batch_size} images or more per device. Set data.batch_size={least} or choose another head."
            )

    def check_sources(self) -> None:
        """Refuse a reader of pairs or an augmentation that cannot be built."""
        self.builder.part("data.reader")
        self.builder.part("data.augment")

    def cache_features(self) -> dict[str, str]:
        """Let the data module cache the features of the frozen part, if there is one and `engine.cache` allows it."""
        if self.builder.value("features") is None:
            return super().cache_features()
        cache_features: Callable[..., dict[str, str]] = self.builder.part("features")
        epochs = self.settings.steps * self.settings.accumulate / self.data_module.epoch
        return cache_features(self.builder, self.data_module, self.model, self.engine, epochs, self.previous_choices)

    def check_data(self) -> TrainedSizes | None:
        """Refuse data with errors; return the sizes of the training images, if they are files."""
        builder = self.builder
        splits = check_for_errors(
            self.data_module.train,
            self.data_module.val,
            cache_dir=builder.cache_dir,
            group=builder.value("data.group"),
            workers=builder.workers,
            has_objects=isinstance(builder.task, ObjectTask),
        )
        if isinstance(builder.task, ObjectTask):
            for split, data in (("train", self.data_module.train), ("val", self.data_module.val)):
                builder.task.check_objects(f"data={builder.options['data']} ({split})", data)
        sizes = [
            [size for record in split.records if (size := record.image_size or record.mask_size)] for split in splits
        ]
        augment, longest = self.data_module.augment, builder.value("resolution.longest")
        if not any(sizes[:1]):
            return None
        if isinstance(augment, Augment):
            scaled = (augment.scaled_size(size, 1) for size in sizes[0])
            sizes[0] = [(round(height), round(width)) for height, width in scaled]
        return TrainedSizes.of(*sizes, longest=longest, enlarged=builder.value("data.augment.scale")[1])

    def evaluate(self, provenance: Provenance, *, metrics_only: bool, report: bool) -> dict[str, Any]:
        """Score by one exact count over the split; warn if the model is no better than a constant prediction."""
        module, engine = self.data_module, self.engine
        data, out_dir = module.val, provenance.folder / EVALUATION
        place = (data, engine.rank, engine.world_size)
        collector = Collector(*place) if report else None
        rows = MetricRows(module.metrics, *place, None if collector is None else collector.add_errors)
        scores = evaluate_images(
            self.model,
            data,
            engine,
            out_dir,
            metrics_only=metrics_only,
            strategy=module.strategy,
            background=module.background,
            collector=collector,
            rows=rows if module.metrics else None,
            split="val",
        )
        if collector is not None:
            from dinoseg.evaluation.image_report import report_images  # imports jinja2, which no step needs

            report_images(
                provenance,
                collector,
                scores,
                rows,
                data,
                engine,
                out_dir,
                split="val",
                background=module.background,
                calibrates=module.strategy is None or module.strategy.base is module.strategy,
            )
        if engine.is_main and len(data) < self._val_total:
            few, every = len(data), self._val_total
            print(f"scored on:    {few} of {every} validation images (trainer.val_images); mode=eval scores all")
        # layers have no matrix, and no class that could be predicted everywhere; objects may be found at a low mIoU
        is_semantic = scores["matrix"] is not None and not isinstance(module.task, ObjectTask)
        commonest, constant = commonest_class(scores["matrix"]) if is_semantic else (0, 0.0)
        if engine.is_main and 0 < constant < 1 and scores["miou"] <= constant:
            logger.warning(
                "mIoU %.4f is not better than the %.4f of always predicting %s, the most frequent class: the model "
                "learned nothing. Try a higher or lower optim.optimizer.lr, more trainer.steps, loss.weights=median or "
                "loss=ce_dice for rare classes, and mode=doctor on the data.",
                scores["miou"],
                constant,
                data.classes[commonest],
            )
        return scores

    @property
    def skipped(self) -> dict[str, Mapping[str, str]]:
        """Return the files that were left out, with their reasons, by split."""
        return {"train": self.data_module.train.skipped, "val": self.data_module.val.skipped}
