"""Base class of training methods: everything before the first step and after the last; `fit` runs the steps between."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import Provenance
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel
from dinoseg.training.data_module import DataModule
from dinoseg.training.engine import Engine
from dinoseg.utils.errors import UserError


class TrainingMethod(ABC):
    """Base class of training methods: their data, the checks of their parts, and the evaluation of the best checkpoint.

    A config names a method as `trainer.method._target_`; further keys of that node are its own options. The constructor
    reads no files. `open` lists the data, and sets `data_module`, `labels`, `labelled` and `split`.

    Args:
        builder: builds the parts of the experiment.

    Attributes:
        what: name of the training samples, for messages.
        on_clips: whether it trains on clips of videos instead of images.
        score_names: scores of its validations that can select the best checkpoint; some data have only a part of them.
        data_module: batches and validation.
        labels: classes, palette and ignored ID, which a checkpoint stores.
        labelled: dataset whose masks a loss may count; None: there are no masks.
        split: names in train and val.
        unread: keys without effect; a training warns if they are typed.
        unread_because: sentence on what takes their place.
    """

    what: str
    on_clips: bool = False
    score_names: Sequence[str]
    data_module: DataModule
    labels: SegmentationData | Labels
    labelled: SegmentationData | None = None
    split: Mapping[str, Sequence[str]]
    unread: Collection[str] = ()
    unread_because: str = ""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    @abstractmethod
    def check_parts(self, model: SegmentationModel, world_size: int) -> None:
        """Refuse a model, which may be on the meta device, a loss or a batch that `world_size` ranks cannot train with.

        Raises:
            UserError: parts do not go together; the message names them.
        """

    @abstractmethod
    def check_sources(self) -> None:
        """Refuse a reader or a transform of the data that cannot be built, without reading data."""

    @abstractmethod
    def open(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the data for one of the engine's ranks; each validation shows `pictures` samples."""

    def check_data(self) -> TrainedSizes | None:
        """Report faults of the data; return the sizes of the training images, if they are known."""
        return None

    def wrap_loss(self, loss: Loss) -> Loss:
        """Return the loss to minimise, built from the loss of the config."""
        return loss

    def cache_features(
        self, model: SegmentationModel, engine: Engine, epochs: float, *, previous_choices: Mapping[str, str | None]
    ) -> dict[str, str]:
        """Let the feed cache the features of the frozen part of a model, if `engine.cache` enables it.

        Args:
            model: on the device.
            engine: device and ranks.
            epochs: of the whole training.
            previous_choices: choices of a resumed run, by key; empty for a new run.

        Returns:
            Where features are cached (engine.cache) and in which type (features.dtype); empty if they are not cached.

        Raises:
            UserError: features must be cached, but cannot be.
        """
        if engine.cache in ("disk", "memory"):
            raise UserError(f"engine.cache={engine.cache}: features of {self.what} cannot be cached. Leave it out.")
        return {}

    @abstractmethod
    def evaluate(
        self, model: SegmentationModel, engine: Engine, provenance: Provenance, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score the model of a run's best checkpoint into `evaluation` in the run folder, as mode=eval does.

        Args:
            model: with the weights of the best checkpoint.
            engine: device and ranks.
            provenance: of the evaluation: run folder, config and checkpoint of the model.
            metrics_only: write no figures.
            report: also write report.html, if there are scores to report.

        Returns:
            The scores.
        """

    @property
    def skipped(self) -> Mapping[str, Mapping[str, str]]:
        """Return the names that data.on_error=skip left out, with their reasons, by split."""
        return {}
