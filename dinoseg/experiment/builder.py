"""Builder of the parts of an experiment, for training tasks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.checks import check_given
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment import build, criteria
from dinoseg.experiment.benchmark_videos import BenchmarkVideos, benchmark_videos, chosen_supervision
from dinoseg.experiment.min_batch import check_batch
from dinoseg.experiment.provenance import Provenance, provenance_of
from dinoseg.experiment.teacher import Teacher
from dinoseg.experiment.trackers import tracker_factory, tracker_maker
from dinoseg.experiment.trained import Trained, labels_of
from dinoseg.models.model import Segmenter
from dinoseg.tracking.tracker import Tracker
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.key import hash_of
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError


def build_task(cfg: DictConfig) -> Any:
    """Return the training task that `trainer.task` names (`dinoseg.tasks.task.TrainingTask`); it reads no data yet.

    Raises:
        UserError: a teacher is given to a task without distillation, or an option is invalid.
    """
    if cfg.get("teacher") is not None and "teacher" not in cfg.trainer.task:
        raise UserError(
            f"teacher={cfg.teacher} is read by trainer=distil alone, and this is trainer={cfg.choices.trainer}. Give "
            "trainer=distil, or leave teacher out."
        )
    try:
        return instantiate(cfg.trainer.task)(Builder(cfg))
    except TypeError as error:
        raise UserError(
            f"trainer.task={cfg.trainer.task.get('_target_')} cannot be built ({error}). Name a class that inherits "
            "dinoseg.tasks.task.TrainingTask, and set `_partial_: true` beside it."
        ) from error


class Builder:
    """Builder of the parts of an experiment from its config.

    Args:
        cfg: the whole config.

    Attributes:
        options: the selected option of each config group, such as {"head": "linear"}; for messages.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self.options: Mapping[str, str] = cfg.choices

    @property
    def seed(self) -> int:
        """Return the seed of all random numbers of the run."""
        return build.seed_of(self._cfg)

    @property
    def cache_dir(self) -> Path:
        """Return the folder of all caches."""
        return Path(self._cfg.cache_dir).expanduser()

    @property
    def workers(self) -> int:
        """Return the number of processes that check or pack files."""
        return self._cfg.data.get("workers") or count_cores()

    @property
    def skips_faulty_files(self) -> bool:
        """Return whether unreadable files are left out with a warning instead of an error."""
        return self._cfg.data.on_error == "skip"

    @property
    def class_names(self) -> list[str]:
        """Return the class names of the data in the order of their IDs."""
        return [str(name) for name in self._cfg.data.classes]

    @property
    def labels(self) -> Labels:
        """Return the classes, palette and ignored ID of the data."""
        return labels_of(self._cfg)

    @property
    def background(self) -> int | None:
        """Return the ID of the background class; None if every class is an object."""
        return build.background_of(self._cfg)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value or config node at a full key such as `data.group`; `default` if the config lacks it."""
        node: Any = self._cfg
        for name in key.split("."):
            if name not in node.keys():
                return default
            node = node[name]
        return node

    def arguments(self, target: Callable[..., Any], keys: Mapping[str, str]) -> dict[str, Any]:
        """Return config values as keyword arguments of a class or function, validated against its signature.

        Args:
            target: what takes them.
            keys: from parameter names to full keys; keys that the config lacks are left out.

        Raises:
            UserError: a value has another type or is out of range; the message names its key.
        """
        absent = object()
        values = {name: self.value(key, absent) for name, key in keys.items()}
        given = {name: value for name, value in values.items() if value is not absent}
        check_given(f"{target.__module__}.{target.__qualname__}", given, keys)
        return given

    def part(self, key: str) -> Any:
        """Return the object of the config node at a full key such as `data.augment`."""
        return instantiate(self.value(key))

    def digest(self, key: str, **overrides: Any) -> str:
        """Return a hash of the resolved config node at a full key, with new values of some of its keys."""
        return hash_of(repr({**plain(self.value(key), resolve=True), **overrides}))

    def dataset(self, split: str, engine: Engine | None = None) -> SegmentationData:
        """Return one split of the data, see `build.dataset`; with an engine, as it is opened for training."""
        if engine is None:
            return build.dataset(self._cfg, split)
        return build.dataset(self._cfg, split, reduced=True, decided=engine.decided)

    def reader(self) -> Callable[[str], SegmentationData]:
        """Return the function that maps a split to the data as read from files, see `build.reader`."""
        return build.reader(self._cfg)

    def clips(self, split: str) -> Any:
        """Return one split of the videos as clips, see `build.clips`."""
        return build.clips(self._cfg, split)

    @property
    def supervision(self) -> str:
        """Return the default supervision of the data when videos are tracked, see `chosen_supervision`."""
        return chosen_supervision(self._cfg, None)

    def benchmark_videos(self, split: str) -> BenchmarkVideos:
        """Return the videos of a split for tracking with the default supervision, see `benchmark_videos`."""
        return benchmark_videos(self._cfg, split, None)

    def tracker_maker(self, engine: Engine, trained: Trained) -> Callable[[], Tracker]:
        """Return a function that creates trackers of a trained model, see `tracker_maker`."""
        return tracker_maker(self._cfg, engine, trained, batch_size=engine.images_at_once())

    def clip_trackers(self) -> Callable[..., Tracker]:
        """Return the factory of slot trackers for clips without masks, see `tracker_factory`."""
        unlocked = {"lock_on": False, "slots_per_object": 1, "extra_slots": 0}  # no labels to lock on to
        return tracker_factory(self._cfg.slots, f"slots={self.options.get('slots')}", unlocked)

    def provenance(self, out_dir: Path, best: Path) -> Provenance:
        """Return the provenance of the evaluation of the checkpoint `best` into `out_dir`, which ends a training."""
        return provenance_of(self._cfg, out_dir, best)

    def loss(self, train: SegmentationData | None) -> Loss:
        """Return the loss, with class weights from the training masks, see `criteria.loss`."""
        return criteria.loss(self._cfg, train)

    def unweighted_loss(self) -> Loss:
        """Return the loss with equal class weights."""
        return criteria.unweighted(self._cfg)

    @property
    def loss_has_classes(self) -> bool:
        """Return whether the loss is computed from labels, see `build.loss_has_classes`."""
        return build.loss_has_classes(self._cfg)

    def teacher(self, engine: Engine, labels: SegmentationData) -> Teacher:
        """Return the trained segmenter that `teacher` names."""
        return Teacher(self._cfg, engine, labels)

    def check_batch(self, model: Segmenter, world: int) -> None:
        """Refuse a batch that is too small for the head or for BatchNorm on `world` ranks."""
        check_batch(self._cfg, model.head.least_batch, world)
