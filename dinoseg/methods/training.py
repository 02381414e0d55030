"""Base class of trainings: everything before the first step and after the last; `fit` runs the steps between."""

import logging
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from dinoseg.checkpoints.trained import check_classes
from dinoseg.checkpoints.unread import warn_of_unused_channels
from dinoseg.config.composition import SHIPPED
from dinoseg.config.job import folder_words
from dinoseg.config.options import options_in
from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.evaluation.images import list_skipped
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.initial import check_initial, has_initial, load_initial_weights
from dinoseg.experiment.loggers import logger_factories
from dinoseg.experiment.provenance import Provenance, provenance_of
from dinoseg.experiment.recipe import config_description, run_description
from dinoseg.experiment.settings import settings_of
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel
from dinoseg.report.log import RunLog
from dinoseg.runs.log_file import announce
from dinoseg.runs.split_file import write_split
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer, Progress
from dinoseg.training.cost import COST, cost_of, count_numbers
from dinoseg.training.data_module import DataModule
from dinoseg.training.description import METRIC
from dinoseg.training.end_record import Ranking, write_end
from dinoseg.training.engine import Engine
from dinoseg.training.loading import Checkpoint, check_resumable
from dinoseg.training.optim import warn_of_long_warmup
from dinoseg.training.trainer import TrainingSetup, explain_score, selects_checkpoints
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override

logger = logging.getLogger(__name__)
CHOICES_KEY = "engine"  # key of a checkpoint's description: choices of the engine, which also affect the numbers
_BUILT_LATE = ("adapter", "head", "loss.criterion", "optim.optimizer", "optim.schedule")
_EXACT = "float32"  # features cached in this type give the same numbers as no cache


class Training(ABC):
    """A training from its config to its scores; each kind of training is a subclass.

    `trainer.method._target_` names the kind; further keys of that node are options of its own. The constructor reads
    no files. `setup` builds what `fit` takes, in order, and each of its results is an attribute.

    Args:
        builder: of the whole config; `resume` names a checkpoint file to resume from, or is None.

    Attributes:
        what: name of the training samples, for messages.
        on_clips: whether it trains on clips of videos instead of images.
        start: the checkpoint that is resumed; None: a new run.
        data_module: batches and validation.
        labels: classes, palette and ignored ID, which a checkpoint stores.
        labelled: dataset whose masks a loss may count; None: there are no masks.
        split: names in train and val.
    """

    what: str
    on_clips: bool = False
    start: Checkpoint | None = None
    data_module: DataModule
    labels: SegmentationData | Labels
    labelled: SegmentationData | None = None
    split: Mapping[str, Sequence[str]]

    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    @abstractmethod
    def find_score_names(self) -> Sequence[str]:
        """Return the scores of validations that can select the best checkpoint; some data have only a part of them."""

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
    def open_data(self, engine: Engine, *, pictures: int = 0) -> None:
        """List the data for one of the engine's ranks; each validation shows `pictures` samples.

        Set `data_module`, `labels`, `labelled` and `split`.
        """

    def check_data(self) -> TrainedSizes | None:
        """Report faults of the data; return the sizes of the training images, if they are known."""
        return None

    def wrap_loss(self, loss: Loss) -> Loss:
        """Return the loss to minimise, built from the loss of the config."""
        return loss

    def cache_features(self) -> dict[str, str]:
        """Let the data module cache the features of the frozen part of the model, if `engine.cache` enables it.

        Returns:
            Where features are cached (engine.cache) and in which type (features.dtype); empty if they are not cached.

        Raises:
            UserError: features must be cached, but cannot be.
        """
        if self.engine.cache in ("disk", "memory"):
            raise UserError(
                f"engine.cache={self.engine.cache}: features of {self.what} cannot be cached. Leave it out."
            )
        return {}

    @abstractmethod
    def evaluate(self, provenance: Provenance, *, metrics_only: bool, report: bool) -> dict[str, Any]:
        """Score the model, with the weights of the best checkpoint, into `evaluation` in the run folder, as mode=eval.

        Args:
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

    def setup(self, out_dir: Path, *, pictures: int = 0, init_head: Callable[..., None] | None = None) -> None:
        """Build all parts of the training, in order. The config is checked before any data or weights are read.

        Args:
            out_dir: the run folder.
            pictures: number of samples that each validation shows.
            init_head: initialises the head of a model by `head.init`; None: that is refused.

        Raises:
            UserError: a value or a part does not fit, the data have errors, or the checkpoint is of another model.
        """
        builder = self.builder
        self.out_dir = out_dir
        self.check_values()
        self.engine = builder.engine()
        if builder.resume is None:
            outline = builder.outline()
        else:
            self.start, outline = self._read_start(Path(str(builder.resume)))
        self.check_config(outline, self.engine.world_size, init_head)
        announce(f"data={builder.options['data']}: listing the files")
        self.open_data(self.engine, pictures=pictures)
        self.settings = builder.loop_settings(len(self.data_module.train))
        announce(f"Building the model, with backbone.weights={builder.value('backbone').get('weights')}")
        model = builder.model()
        announce("Checking the data")
        # one rank is enough: its measurements are cached, and its error ends all ranks
        sizes = self.check_data() if self.engine.is_main else None
        self.engine.wait()
        if has_initial(builder):
            load_initial_weights(builder, model, list(self.labels.classes), self.engine.broadcast)
        self.model = self.engine.place(model)
        self.loss = self.wrap_loss(builder.loss(self.labelled)).to(self.engine.device)
        if self.start is None and self.model.head.init is not None and init_head is not None:
            init_head(builder, self.model, self.labelled, self.engine)
        self.optimizer = builder.optimizer(self.model)
        self.checkpoints = self._open_checkpoints(sizes)
        self.schedule = builder.schedule()
        self.log_start()
        self.record_choices(self.cache_features())

    def check_values(self) -> None:
        """Refuse wrong values of the config, before anything that depends on the data: classes, widths, weights."""
        builder = self.builder
        builder.loop_settings(samples=1)
        builder.check_head_file()
        if builder.task.is_auto and builder.value("mode.choose_thresholds") is None:
            raise UserError("task.threshold=auto is not part of this installation. Set numbers.")
        # the parts themselves need the classes; what makes them refuses wrong values
        with torch.device("meta"):
            for key in _BUILT_LATE:
                builder.part(key)
        if builder.value("features") is not None:
            builder.part("features")
        score, names = builder.value("trainer.score"), self.find_score_names()
        if not selects_checkpoints(score, names):
            metrics = [] if self.on_clips else options_in([SHIPPED, *map(Path, builder.config_dirs)], METRIC)
            raise explain_score(score, names, metrics, dict(zip(builder.metric_nodes, builder.metrics, strict=True)))
        logger_factories(builder)  # refuses unknown loggers and their options
        config_description(builder)  # refuses what a checkpoint could not store

    def check_config(self, outline: SegmentationModel, world_size: int, init_head: object) -> None:
        """Refuse parts of the config that do not fit one another, before data or weights are read.

        Args:
            outline: the model on the meta device.
            world_size: number of ranks.
            init_head: see `setup`.
        """
        builder = self.builder
        if has_initial(builder):
            check_initial(builder, outline)
        self.check_parts(outline, world_size)
        with torch.device("meta"):
            optimizer = builder.optimizer(outline)
        has_rate = "lr" in builder.config["adapter"] or builder.value("optim.optimizer.lr") is not None
        if not has_rate and any(group.get("backbone") for group in optimizer.param_groups):
            raise UserError(
                f"adapter={builder.options['adapter']} trains the backbone and has no learning rate. Add "
                "`lr: 1.0e-4` to its YAML file, or set optim.optimizer.lr."
            )
        if self.start is None and outline.head.init is not None and init_head is None:
            raise UserError(f"head.init={outline.head.init} is not part of this installation. Leave it out.")

    def _read_start(self, path: Path) -> tuple[Checkpoint, SegmentationModel]:
        """Return the checkpoint to resume, and the outline of the model, after checking that they fit."""
        # tensors last: an untrusted file may describe more than fits in memory
        file = checkpoint.outline(path)
        check_classes(self.builder.labels, file.info, f"resume={file.path}")
        outline = self.builder.check_fits(file)
        check_resumable(file)
        return checkpoint.read(file.path), outline

    def _open_checkpoints(self, sizes: TrainedSizes | None) -> Checkpointer:
        """Return the checkpoints of the run, and record which images it trains on, and their `sizes`, if known."""
        info = run_description(self.builder, self.labels) | (sizes.as_info() if sizes else {})
        writes = self.engine.is_main
        if writes:
            write_split(self.out_dir, self.split)
        folder = self.out_dir / checkpoint.CHECKPOINT_FOLDER
        return Checkpointer(folder, info, self.start, writes, metric=self.builder.score_metric)

    @property
    def previous_choices(self) -> Mapping[str, str | None]:
        """Return the engine's choices in the run to resume, by key; empty for a new run."""
        return self.start.info.get(CHOICES_KEY, {}) if self.start else {}

    def record_choices(self, cached: Mapping[str, str]) -> None:
        """Store the engine's choices in the run's checkpoints, and warn if a resumed run changes them.

        Args:
            cached: where and in which type frozen features are cached, and the teacher of a student, as returned by
                `cache_features`.
        """
        then = self.previous_choices
        now = {"engine.precision": self.engine.precision, "engine.cache": "off", "features.dtype": None, **cached}
        self.checkpoints.info[CHOICES_KEY] = now
        other = [
            f"{key} was {format_override(then[key])} and is {format_override(now[key])}"
            for key in ("engine.precision", "features.dtype", "teacher")  # the cache's location changes no number
            if key in then.keys() & now.keys() and (then[key] or _EXACT) != (now[key] or _EXACT)
        ]
        if other:
            logger.warning(
                "This run resumes with other settings: %s. Set the earlier ones for the results of an uninterrupted "
                "run.",
                "; ".join(other),
            )

    def log_start(self) -> None:
        """Log where a training starts, its device, model, batch and data, and what the model does not suit."""
        builder, engine, settings = self.builder, self.engine, self.settings
        if self.start is not None:
            _log_resume(self.start, settings.steps)
        options, counts = builder.options, count_numbers(self.model.parameters())
        parts = " ".join(f"{group}={options[group]}" for group in ("backbone", "adapter", "head"))
        ranks = f", {engine.world_size} ranks" if engine.world_size > 1 else ""
        batches = f", {settings.accumulate} batches per step" if settings.accumulate > 1 else ""
        samples = builder.value("data.batch_size")
        train, val = len(self.data_module.train), len(self.data_module.val)
        logger.info("device:      %s, precision %s%s", engine.device, engine.precision, ranks)
        logger.info("model:       %s", parts)
        logger.info("parameters:  %s trained, %s in total", f"{counts['trainable']:,}", f"{counts['total']:,}")
        logger.info("training:    %d steps, batch of %d %s%s", settings.steps, samples, self.what, batches)
        logger.info("data:        %d training and %d validation %s", train, val, self.what)
        if builder.value("data.fold") is not None and settings.evaluate == "last":
            logger.info(
                "evaluation:  last weights, saved as best.safetensors; those of the best score on this fold are not "
                "saved (trainer.evaluate=best saves them)"
            )
        logger.info("run folder:  %s", self.out_dir)
        if engine.is_main:
            _warn_of_warmup(builder, self.optimizer, settings.steps)
            _warn_of_other_sizes(builder)
            channel_weights = builder.value("backbone.channel_weights")
            warn_of_unused_channels(self.model.backbone, channel_weights, options["adapter"])
            warning = self.model.head.length_warning(settings.steps)
            if warning:
                logger.warning("%s", warning)

    def open_log(self) -> RunLog:
        """Return the log of the run; the caller must close it."""
        progress = self.start.info["progress"] if self.start else {}
        log = RunLog(
            self.out_dir,
            logger_factories(self.builder),
            start_step=progress.get("step", 0),
            validation_pending=progress.get("validation_pending", False),
            visible=self.engine.is_main,
        )
        log.config(settings_of(self.builder))
        return log

    def loop_setup(self, log: RunLog) -> TrainingSetup:
        """Return what `fit` takes."""
        return TrainingSetup(
            self.model,
            self.loss,
            self.data_module,
            self.optimizer,
            self.schedule,
            self.engine,
            self.checkpoints,
            log,
            self.settings,
        )

    def finish(
        self,
        progress: Progress,
        log: RunLog,
        choose_thresholds: Callable[..., list[float]] | None = None,
        *,
        metrics_only: bool,
        report: bool,
    ) -> dict[str, Any]:
        """Score the best checkpoint, draw the curves, and print the paths of all results; return scores and cost.

        Args:
            progress: of the finished training.
            log: receives the scores and the checkpoint, and is closed.
            choose_thresholds: chooses thresholds for `task.threshold=auto`.
            metrics_only: write no figures of the evaluation.
            report: write its report.html.

        Raises:
            UserError: no validation by these settings has chosen a checkpoint.
        """
        if not progress.has_best:
            raise UserError(
                f"trainer.steps={self.settings.steps}: this run has done {progress.step}, without a validation by "
                "these settings, and its checkpoints are unchanged. Raise trainer.steps, or score it by mode=eval."
            )
        if self.engine.is_main:
            write_end(self.out_dir, progress.step)
        self.checkpoints.load_best(self.model)
        if self.builder.task.is_auto:
            assert choose_thresholds is not None, "`check_values` refuses it"
            chosen = choose_thresholds(self.model, self.data_module.val, self.engine, self.builder.part("inference"))
            self.model.task.use_thresholds(chosen, "val")
            if self.engine.is_main:
                self.checkpoints.store_thresholds(chosen)
        provenance = provenance_of(self.builder, self.out_dir, self.checkpoints.best)
        scores = self.evaluate(provenance, metrics_only=metrics_only, report=report)
        cost = cost_of(self.model, self.out_dir / "metrics.jsonl")
        result = {**scores, **cost, "best_step": progress.best_step, "run": str(self.out_dir)}
        if self.engine.is_main:
            from dinoseg.report.curves import draw_curves  # imports matplotlib, which no step needs

            curves = draw_curves(self.out_dir, self.settings.score, progress.best_step)
            print(f"curves:       {curves}")
            self.finish_log(log, scores)
            write_json(self.out_dir / COST, cost)
            print("\n".join(next_commands(self.out_dir, self.builder.config_dirs, on_clips=self.on_clips)))
            name = self.settings.score
            value = result.get(name, progress.best)
            is_lowest = name in self.data_module.lowest
            ranking = None if value is None else Ranking(name, value, is_lowest, self.builder.value("data.fold"))
            write_end(self.out_dir, progress.step, result, ranking)
        return result

    def finish_log(self, log: RunLog, scores: Mapping[str, Any]) -> None:
        """Log the scores and the best checkpoint of the run, and print the paths of all results."""
        log.scores(scores)
        log.checkpoint(self.checkpoints.best)
        log.close()
        for line in log.views:
            print(line)
        print(f"checkpoint:   {self.checkpoints.best}")
        list_skipped(self.skipped, self.out_dir)


def _log_resume(start: Checkpoint, steps: int) -> None:
    done = start.info["progress"]["step"]
    logger.info("resuming %s at step %d of %d", start.path, done, steps)
    if done >= steps:
        logger.warning(
            "This run has already done %d steps: only its evaluation is written. To train on, raise trainer.steps or "
            "trainer.epochs.",
            done,
        )


def _warn_of_warmup(builder: Builder, optimizer: Optimizer, steps: int) -> None:
    """Warn of warm-ups that are too long or without effect."""
    trains_backbone = any(group["backbone"] for group in optimizer.param_groups)
    backbone_warmup = builder.value("optim.schedule.backbone_warmup")
    if backbone_warmup is not None and not trains_backbone:
        logger.warning(
            "optim.schedule.backbone_warmup=%s has no effect: the backbone is not trained. Set it to null, or "
            "choose an adapter that trains the backbone.",
            backbone_warmup,
        )
        backbone_warmup = None
    warn_of_long_warmup(steps, builder.value("optim.schedule.warmup", 0), backbone_warmup or 0)


def _warn_of_other_sizes(builder: Builder) -> None:
    """Warn if training resizes images to a size to which inference does not resize them."""
    relative_to = builder.config["data"]["augment"].get("relative_to", "image")
    if relative_to != "image" and not builder.part("inference").resizes:
        logger.warning(
            "data.augment.relative_to=%s trains on resized images, but validation and inference do not resize. Set "
            "inference=windows inference.shortest=PIXELS, or data.augment.relative_to=image.",
            relative_to,
        )


def next_commands(run: Path, config_dirs: Sequence[str], *, on_clips: bool) -> list[str]:
    """Return a line for each command that uses a finished training, and for the one that advises on its data."""
    uses = ["mode=track {} input=VIDEO"] if on_clips else ["mode=predict {} input=PATH", "mode=export {} export=onnx"]
    resume = shlex.quote(f"resume={run}")
    own = shlex.join(folder_words(config_dirs))
    lines = ["next:", *(f"  python -m dinoseg {use.format(resume)} {own}".rstrip() for use in ("mode=eval {}", *uses))]
    if not on_clips:
        lines.append("data advice:  mode=doctor with the same data settings")
    return lines
