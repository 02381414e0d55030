"""Base class of training tasks: everything before the first step and after the last; `fit` runs the steps between."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.checks import check_given
from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment import build
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import Segmenter
from dinoseg.report.curves import Plot
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed
from dinoseg.utils.errors import UserError


class Regime(ABC):
    """Base class of training tasks: their data, the checks of their parts, and the evaluation of the best checkpoint.

    Attributes:
        what: name of the training samples, for messages.
        feed: batches and validation.
        labels: classes, palette and ignored ID, which a checkpoint stores.
        labelled: dataset whose masks a loss may count; None: there are no masks.
        split: names in train and val.
        plots: curves of the run.
    """

    what: str
    feed: Feed
    labels: SegmentationData | Labels
    labelled: SegmentationData | None = None
    split: Mapping[str, Sequence[str]]
    plots: Sequence[Plot]

    @abstractmethod
    def __init__(self, cfg: DictConfig, engine: Engine, *, pictures: int = 0) -> None:
        """List the data of a config; each validation shows `pictures` images."""

    @classmethod
    @abstractmethod
    def check_parts(cls, cfg: DictConfig, model: Segmenter, world: int) -> None:
        """Refuse a model, which may be on the meta device, a loss or a batch that `world` ranks cannot train with.

        Raises:
            UserError: parts do not go together; the message names them.
        """

    @classmethod
    @abstractmethod
    def data_nodes(cls, cfg: DictConfig) -> Iterator[DictConfig]:
        """Yield the nodes of `data` that training instantiates, which a sweep tries before its first job."""

    def check_data(self) -> TrainedSizes | None:
        """Report faults of the data; return the sizes of the training images, if they are known."""
        return None

    def started(self, model: Segmenter, engine: Engine, *, new: bool) -> Segmenter:
        """Return the model, initialised according to `head.init` if the training is `new`."""
        return model

    def objective(self, loss: Loss) -> Loss:
        """Return the loss to minimise, built from the loss of the config."""
        return loss

    def keep_features(
        self, model: Segmenter, loss: Loss, engine: Engine, epochs: float, *, before: Mapping[str, str | None]
    ) -> dict[str, str]:
        """Let the feed cache the features of the frozen part of a model, if `engine.cache` enables it.

        Args:
            model: on the device.
            loss: the training loss.
            engine: device and ranks.
            epochs: of the whole training.
            before: choices of a resumed run, by key; empty for a new run.

        Returns:
            Where features are cached (engine.cache) and in which type (features.dtype); empty if they are not cached.

        Raises:
            UserError: features must be cached, but cannot be.
        """
        if engine.cache in ("disk", "memory"):
            raise UserError(f"engine.cache={engine.cache}: no features of {self.what} are kept. Leave it out.")
        return {}

    @abstractmethod
    def evaluate(
        self, cfg: DictConfig, model: Segmenter, engine: Engine, best: Path, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score the model of a run's best checkpoint into `evaluation` in the run folder, as mode=eval does.

        Args:
            cfg: the whole config.
            model: with the weights of the best checkpoint.
            engine: device and ranks.
            best: the checkpoint file.
            metrics_only: write no figures.
            report: also write report.html, if there are scores to report.

        Returns:
            The scores.
        """

    @property
    def skipped(self) -> Mapping[str, Mapping[str, str]]:
        """Return the names that data.on_error=skip left out, with their reasons, by split."""
        return {}


def share_of(cfg: DictConfig, engine: Engine, pictures: int) -> dict[str, Any]:
    """Return the arguments common to all feeds: size, order and number of one rank's batches."""
    check_given(
        "dinoseg.training.image_feed.ImageFeed",
        {"batch_size": cfg.data.batch_size},
        {"batch_size": "data.batch_size"},
    )
    return {
        "batch_size": cfg.data.batch_size,
        "seed": build.seed_of(cfg),
        "workers": engine.workers,
        "rank": engine.rank,
        "world": engine.world,
        "pictures": pictures,
    }
