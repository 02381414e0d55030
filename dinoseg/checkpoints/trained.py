"""Trained models ready to predict: from a checkpoint, or with a head that was released trained."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinoseg.config.plain import to_container
from dinoseg.core.shapes import Batch, Palette, SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.models import ModelBuilder
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.inference.windows import Whole
from dinoseg.models.model import SegmentationModel, non_persistent_buffers
from dinoseg.models.no_init import allocate
from dinoseg.runs.folder import last_command_line
from dinoseg.runs.log_file import announce
from dinoseg.training import checkpoint
from dinoseg.training.description import THRESHOLDS
from dinoseg.training.engine import Engine
from dinoseg.training.loading import CONSTANTS
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
C = TypeVar("C")


@dataclass
class TrainedModel:
    """Trained segmenter, ready to predict, with its classes."""

    model: SegmentationModel
    engine: Engine
    classes: list[str]
    palette: Palette
    ignore_index: int
    info: Mapping[str, Any]  # description in the checkpoint
    strategy: InferenceStrategy = field(default_factory=Whole)  # inference strategy
    thresholds_by_fold: Mapping[str, list[float]] = field(default_factory=dict)  # of an evaluation, by `data.fold`

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.engine.device

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of the engine's precision for a forward pass."""
        return self.engine.autocast()

    @property
    def predictor(self) -> Predictor:
        """Return a predictor of images with this model."""
        return Predictor(self.model, self.device, self.autocast, self.strategy)

    # what an ensemble does in its own way

    @property
    def single_pass_model(self) -> SegmentationModel:
        """Return the model of one pass over whole images, without the inference strategy."""
        return self.model

    def limit_size(self, *, reduces: bool = True) -> None:
        """Reduce images larger than any of the training, see `limit_to_trained_size`."""
        limit_to_trained_size(self.model, TrainedSizes.from_info(self.info), reduces=reduces)

    def open_split(self, builder: Builder, split: str) -> SegmentationData:
        """Return a split to score the model on."""
        return builder.dataset(split)

    def batches(self, data: SegmentationData) -> Iterable[Batch] | None:
        """Return this rank's images of a split, see `evaluate`; None: it reads them itself."""
        return None

    def choose_thresholds(
        self, choose: Callable[..., Any], builder: Builder, data: SegmentationData, split: str
    ) -> None:
        """Let a function choose the thresholds on the validation split; `data` is the split that is scored."""
        val = data if split == "val" else builder.dataset("val")
        check_classes(val, self.info, "data")
        self.model.task.use_thresholds(choose(self.model, val, self.engine, self.strategy.base), "val")

    def watch(self, collector: C) -> C:
        """Return what receives each batch of an evaluation instead of its collector."""
        return collector

    def report(self, out_dir: Path) -> dict[str, Any]:
        """Report on an evaluation whose results are in a folder, on all ranks; return further scores."""
        return {}


def load_trained(builder: ModelBuilder) -> TrainedModel:
    """Return the model that `resume` names, in eval mode; the config is already merged with its checkpoint.

    Without `resume`, a head with trained weights from a file is used unchanged, with the classes of the dataset.

    Raises:
        UserError: neither is given, or the checkpoint does not fit.
    """
    if not is_trained(builder):
        raise UserError(
            "resume is not set: this mode needs a trained model. Give resume=RUN_FOLDER or a checkpoint; or use "
            "released head weights, as hparam=ade20k_m2f head.weights=FILE does."
        )
    trained = load_member(builder, builder.engine())
    if builder.members:
        ensemble: TrainedModel = builder.part("mode.ensemble").load(builder, trained)
        return ensemble
    if builder.value("mode.ensemble.out_of_fold"):
        raise UserError(
            f"mode.ensemble.out_of_fold=true scores runs of several folds, and resume={builder.resume} is one run. "
            "Give resume=[RUN,RUN,...] or the folder of a sweep."
        )
    return trained


def load_member(builder: ModelBuilder, engine: Engine) -> TrainedModel:
    """Return the model of a config as `load_trained` does, placed by an engine, and never an ensemble."""
    # of the config, whose classes `restore` compares with the file's: a typed `data.palette` counts
    labels = builder.labels
    strategy = builder.strategy(labels.classes)
    if builder.resume is not None:
        model, info = restore(builder, Path(str(builder.resume)))
    else:
        announce("Building the released model and reading its weights")
        model = builder.model()
        # the class entries of a checkpoint's description
        info = {"classes": list(labels.classes), "palette": labels.palette, "ignore_index": labels.ignore_index}
    model = engine.place(model).eval()
    return TrainedModel(model, engine, list(labels.classes), list(labels.palette), labels.ignore_index, info, strategy)


def is_trained(builder: ModelBuilder) -> bool:
    """Return whether a config names a trained model: a checkpoint, or a head that was released trained."""
    head = to_container(builder.value("head"))
    return builder.resume is not None or (head.get("weights") is not None and head.get("class_layer") != "new")


def check_classes(data: SegmentationData | Labels, info: Mapping[str, Any], where: str) -> None:
    """Refuse a dataset whose classes or ignored ID differ from those of a checkpoint's description.

    Raises:
        UserError: they differ; the message names both.
    """
    now, then = (list(data.classes), data.ignore_index), (list(info["classes"]), info["ignore_index"])
    if now != then:
        raise UserError(
            f"{where}: the data has the classes {', '.join(now[0])} (ignored: {now[1]}), and the checkpoint was "
            f"trained on {', '.join(then[0])} (ignored: {then[1]}). Use data of the same classes in the same order."
        )


def find_trained_sizes(trained: TrainedModel, out_dir: Path) -> TrainedSizes | None:
    """Return the training sizes to which images are scaled; None if the command line sets `resolution.longest`."""
    return None if longest_is_typed(out_dir) else TrainedSizes.from_info(trained.info)


def longest_is_typed(out_dir: Path) -> bool:
    """Return whether the newest command of a run folder sets `resolution.longest`."""
    return any(word.lstrip("+").startswith("resolution.longest=") for word in last_command_line(out_dir))


def restore(builder: ModelBuilder, path: Path, *, key: str = "resume") -> tuple[SegmentationModel, Mapping[str, Any]]:
    """Return the model of a checkpoint in eval mode on the CPU, and the description in the file.

    Args:
        builder: of the config, already merged with the checkpoint's.
        path: the checkpoint file.
        key: of the config, which names the file in messages.

    Raises:
        UserError: the checkpoint does not fit.
    """
    # checks without tensors come first: reading tensors may take minutes
    outline = checkpoint.outline(path, key=key)
    check_classes(builder.labels, outline.info, outline.where)
    empty = builder.check_fits(outline)
    announce(f"{outline.where}: reading weights and building the model")
    saved = checkpoint.read(path, key=key)
    whole = builder.value("adapter.bits") is None and empty.state_dict().keys() <= outline.part("model").keys()
    is_allocated = whole and non_persistent_buffers(empty).keys() <= outline.part(CONSTANTS).keys() and allocate(empty)
    model = empty if is_allocated else builder.model(initialised=not whole)
    checkpoint.load_weights(model, saved)
    chosen = outline.info.get(THRESHOLDS)
    if chosen is not None and (model.task.is_auto or model.task.thresholds == chosen):
        model.task.use_thresholds(chosen, "val")
    elif model.task.is_auto and builder.value("mode.choose_thresholds") is None:  # mode=eval chooses now
        logger.warning(
            "%s: no thresholds were chosen for these weights, so 0.5 is used for each class. A training "
            "chooses at its end, for the checkpoint that it evaluates.",
            outline.where,
        )
    return model.eval(), outline.info
