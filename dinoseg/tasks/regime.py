"""What kinds of training differ in, before the first step and after the last: the steps between are `fit`'s alone."""

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
    """A kind of training: what it is fed, what goes together in it, and how the best checkpoint is scored.

    Attributes:
        what: is trained on.
        feed: its batches, and how it is validated.
        labels: classes, palette and ignored id, which a checkpoint keeps.
        labelled: whose masks a loss may count; None: there are none.
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
        """List the data of a config; each validation shows so many pictures."""

    @classmethod
    @abstractmethod
    def check_parts(cls, cfg: DictConfig, model: Segmenter, world: int) -> None:
        """Refuse a model, which may be on meta, a loss or a batch that so many ranks cannot be trained with.

        Raises:
            UserError: naming what does not go together.
        """

    @classmethod
    @abstractmethod
    def data_nodes(cls, cfg: DictConfig) -> Iterator[DictConfig]:
        """Yield the parts of `data` that training makes, which a sweep tries before its first job."""

    def check_data(self) -> TrainedSizes | None:
        """Tell what is wrong with the data; return how large the training images are, where that is known."""
        return None

    def started(self, model: Segmenter, engine: Engine, *, new: bool) -> Segmenter:
        """Return the model; of a `new` training, with what `head.init` says that it begins with."""
        return model

    def objective(self, loss: Loss) -> Loss:
        """Return what training makes small, of the config's loss."""
        return loss

    def keep_features(
        self, model: Segmenter, loss: Loss, engine: Engine, epochs: float, *, before: Mapping[str, str | None]
    ) -> dict[str, str]:
        """Let the feed give what is kept of the frozen part of a model, where `engine.cache` has it so.

        Args:
            model: on the device.
            loss: that it is trained by.
            engine: device and ranks.
            epochs: of the whole training.
            before: what a run that goes on has chosen, by key; nothing of a new one.

        Returns:
            Where it is kept (engine.cache), and as what (features.dtype); nothing where none is.

        Raises:
            UserError: it is to be kept, and cannot be.
        """
        if engine.cache in ("disk", "memory"):
            raise UserError(f"engine.cache={engine.cache}: no features of {self.what} are kept. Leave it out.")
        return {}

    @abstractmethod
    def evaluate(
        self, cfg: DictConfig, model: Segmenter, engine: Engine, best: Path, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score the model of a run's best checkpoint into `evaluation` in the run folder, as mode=eval does.

        Returns the scores; `report` writes report.html too, where there are any to tell of.
        """

    @property
    def skipped(self) -> Mapping[str, Mapping[str, str]]:
        """Return by split the names that data.on_error=skip left out, with their reasons."""
        return {}


def share_of(cfg: DictConfig, engine: Engine, pictures: int) -> dict[str, Any]:
    """Return what every feed takes: the size, order and number of one rank's batches."""
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
