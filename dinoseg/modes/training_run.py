"""Training of one model, from its config to its scores: the inputs of the training loop and the use of its result."""

import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from dinoseg.checkpoints.trained import check_classes
from dinoseg.checkpoints.unread import warn_of_unused_channels, warn_unread
from dinoseg.config.composition import SHIPPED
from dinoseg.config.job import folder_words
from dinoseg.config.options import has_options
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.evaluation.images import list_skipped
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.initial import check_initial, has_initial
from dinoseg.experiment.loggers import logger_factories
from dinoseg.experiment.provenance import provenance_of
from dinoseg.experiment.recipe import run_description
from dinoseg.experiment.settings import settings_of
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.methods.method import TrainingMethod
from dinoseg.models.model import SegmentationModel
from dinoseg.report.curves import draw_curves
from dinoseg.report.log import LoggerFactory, RunLog
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.cost import COST, cost_of, count_numbers
from dinoseg.training.engine import Engine
from dinoseg.training.loading import Checkpoint, check_resumable
from dinoseg.training.optim import Schedule, warn_of_long_warmup
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.units import read_valid_note
from dinoseg.utils.wording import format_override, join_names

logger = logging.getLogger(__name__)
CHOICES_KEY = "engine"  # key of a checkpoint's description: choices of the engine, which also affect the numbers
_EXACT = "float32"  # features cached in this type give the same numbers as no cache


def write_split(out_dir: Path, split: Mapping[str, Sequence[str]]) -> None:
    """Write split.json; if the names differ from before, warn and save the former list as split_1.json and so on."""
    path = out_dir / "split.json"
    before = _read_split(path)
    if before is not None and before != split:
        former = next(name for name in map("split_{}.json".format, count(1)) if not (out_dir / name).exists())
        os.replace(path, out_dir / former)
        changes = "; ".join(_change(side, before.get(side, []), names) for side, names in split.items())
        logger.warning(
            "The data has changed since this run started (%s). The resumed run differs from an uninterrupted one, and "
            "scores on other validation data are not comparable. The previous list is saved in %s.",
            changes,
            out_dir / former,
        )
    write_json(path, split)


def _read_split(path: Path) -> dict[str, list[str]] | None:
    return read_valid_note(
        path,
        lambda path: forms.read_json(path, forms.table(forms.list_of(forms.text))),
        damaged="%s is damaged (%s): cannot check whether the data has changed since this run started.",
    )


def _change(side: str, before: Sequence[str], now: Sequence[str]) -> str:
    added, removed = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    if not added and not removed:
        return f"{side}: {'the same' if list(before) == list(now) else 'the same in another order'}"
    named = [
        f"{len(names)} {what} ({join_names(names, 3)})"
        for what, names in (("added", added), ("removed", removed))
        if names
    ]
    return f"{side}: {', '.join(named)}"


@dataclass
class TrainingRun:
    """A training in its run folder.

    Args:
        builder: of the whole config; `resume` names a checkpoint file to resume from, or is None.
        out_dir: the run folder.
        method: data and checks of the training method.
        engine: device and ranks.
        start: the checkpoint that is resumed; None: a new run.
        loggers: functions that open the loggers of the run, by name.
    """

    builder: Builder
    out_dir: Path
    method: TrainingMethod
    engine: Engine
    start: Checkpoint | None = None
    loggers: Mapping[str, LoggerFactory] = field(default_factory=dict)

    def check_model(self, model: SegmentationModel) -> None:
        """Refuse a model that loss, batch, optimizer or initial weights do not fit; it may be on the meta device.

        So is a backbone that is trained by an adapter without a learning rate.
        """
        if has_initial(self.builder):
            check_initial(self.builder, model)
        self.method.check_parts(model, self.engine.world_size)
        with torch.device("meta"):
            optimizer = self.builder.optimizer(model)
        has_rate = "lr" in self.builder.config["adapter"] or self.builder.value("optim.optimizer.lr") is not None
        if not has_rate and any(group.get("backbone") for group in optimizer.param_groups):
            raise UserError(
                f"adapter={self.builder.options['adapter']} trains the backbone and has no learning rate. Add "
                "`lr: 1.0e-4` to its YAML file, or set optim.optimizer.lr."
            )

    def build_schedule(self, steps: int, optimizer: Optimizer) -> Schedule:
        """Return the learning-rate schedule, and warn of warm-ups that are too long or without effect.

        Args:
            steps: length of the training.
            optimizer: whose parameter groups the schedule is for.
        """
        builder = self.builder
        if self.engine.is_main:
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
        return builder.schedule()

    def open_checkpoints(self, sizes: TrainedSizes | None) -> Checkpointer:
        """Return the checkpoints of the run, and record which images it trains on.

        Args:
            sizes: sizes of the training images, if they are known.
        """
        info = run_description(self.builder, self.method.labels) | (sizes.as_info() if sizes else {})
        writes = self.engine.is_main
        if writes:
            write_split(self.out_dir, self.method.split)
        folder = self.out_dir / checkpoint.CHECKPOINT_FOLDER
        return Checkpointer(folder, info, self.start, writes, metric=self.builder.score_metric)

    @property
    def previous_choices(self) -> Mapping[str, str | None]:
        """Return the engine's choices in the run to resume, by key; empty for a new run."""
        return self.start.info.get(CHOICES_KEY, {}) if self.start else {}

    def record_choices(self, checkpoints: Checkpointer, cached: Mapping[str, str]) -> None:
        """Store the engine's choices in the run's checkpoints, and warn if a resumed run changes them.

        Args:
            checkpoints: of the run.
            cached: where and in which type frozen features are cached, and the teacher of a student, as returned by
                `TrainingMethod.cache_features`.
        """
        then = self.previous_choices
        now = {"engine.precision": self.engine.precision, "engine.cache": "off", "features.dtype": None, **cached}
        checkpoints.info[CHOICES_KEY] = now
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

    def log_start(self, model: SegmentationModel, steps: int) -> None:
        """Log where a training starts, its device, model, batch and data, and what the model does not suit.

        Args:
            model: that is trained.
            steps: length of the training.
        """
        builder, method, engine = self.builder, self.method, self.engine
        if self.start is not None:
            _log_resume(self.start, steps)
        options, counts = builder.options, count_numbers(model.parameters())
        parts = " ".join(f"{group}={options[group]}" for group in ("backbone", "adapter", "head"))
        ranks = f", {engine.world_size} ranks" if engine.world_size > 1 else ""
        accumulate = builder.value("trainer.accumulate")
        batches = f", {accumulate} batches per step" if accumulate > 1 else ""
        samples = builder.value("data.batch_size")
        train, val = len(method.data_module.train), len(method.data_module.val)
        logger.info("device:      %s, precision %s%s", engine.device, engine.precision, ranks)
        logger.info("model:       %s", parts)
        logger.info("parameters:  %s trained, %s in total", f"{counts['trainable']:,}", f"{counts['total']:,}")
        logger.info("training:    %d steps, batch of %d %s%s", steps, samples, method.what, batches)
        logger.info("data:        %d training and %d validation %s", train, val, method.what)
        if builder.value("data.fold") is not None and builder.value("trainer.evaluate") == "last":
            logger.info(
                "evaluation:  last weights, saved as best.safetensors; those of the best score on this fold are not "
                "saved (trainer.evaluate=best saves them)"
            )
        logger.info("run folder:  %s", self.out_dir)
        if engine.is_main:
            _warn_of_other_sizes(builder)
            warn_of_unused_channels(model.backbone, builder.value("backbone.channel_weights"), options["adapter"])
            warning = model.head.length_warning(steps)
            if warning:
                logger.warning("%s", warning)

    def open_log(self) -> RunLog:
        """Return the log of the run; the caller must close it."""
        progress = self.start.info["progress"] if self.start else {}
        log = RunLog(
            self.out_dir,
            self.loggers,
            start_step=progress.get("step", 0),
            validation_pending=progress.get("validation_pending", False),
            visible=self.engine.is_main,
        )
        log.config(settings_of(self.builder))
        return log

    def choose_thresholds(self, model: SegmentationModel, checkpoints: Checkpointer, choose: Callable) -> None:
        """Choose the thresholds of the best checkpoint on the validation split by `choose`, and store them in it."""
        checkpoints.load_best(model)
        chosen = choose(model, self.method.data_module.val, self.engine, self.builder.part("inference"))
        model.task.use_thresholds(chosen, "val")
        if checkpoints.writes:
            checkpoints.store_thresholds(chosen)

    def finish(
        self, model: SegmentationModel, checkpoints: Checkpointer, log: RunLog, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score the best checkpoint, draw the curves, and print the paths of all results; return scores and cost.

        Args:
            model: receives the checkpoint's weights.
            checkpoints: of the finished training; it has a best score.
            log: receives the scores and the checkpoint, and is closed.
            metrics_only: write no figures of the evaluation.
            report: write its report.html.
        """
        checkpoints.load_best(model)
        provenance = provenance_of(self.builder, self.out_dir, checkpoints.best)
        scores = self.method.evaluate(model, self.engine, provenance, metrics_only=metrics_only, report=report)
        best_step = checkpoints.progress.best_step
        cost = cost_of(model, self.out_dir / "metrics.jsonl")
        if self.engine.is_main:
            curves = draw_curves(self.out_dir, self.builder.value("trainer.score"), best_step)
            print(f"curves:       {curves}")
            self.finish_log(log, scores, checkpoints)
            write_json(self.out_dir / COST, cost)
            print("\n".join(next_commands(self.out_dir, self.builder.config_dirs, on_clips=self.method.on_clips)))
        return {**scores, **cost, "best_step": best_step, "run": str(self.out_dir)}

    def finish_log(self, log: RunLog, scores: Mapping[str, Any], checkpoints: Checkpointer) -> None:
        """Log the scores and the best checkpoint of the run, and print the paths of all results."""
        log.scores(scores)
        log.checkpoint(checkpoints.best)
        log.close()
        for line in log.views:
            print(line)
        print(f"checkpoint:   {checkpoints.best}")
        list_skipped(self.method.skipped, self.out_dir)


def open_run(builder: Builder, out_dir: Path, method: TrainingMethod, engine: Engine) -> TrainingRun:
    """Return the training of a run folder, with the checkpoint that it resumes.

    Args:
        builder: of the whole config; `resume` names a checkpoint file to resume from, or is None.
        out_dir: the run folder.
        method: data and checks of the training method.
        engine: device and ranks.

    Raises:
        UserError: a part does not fit, or the checkpoint is of another model.
    """
    run = TrainingRun(builder, out_dir, method, engine)
    if builder.resume:
        run.start, outline = _read_start(builder, method.labels)
        run.check_model(outline)
    run.loggers = logger_factories(builder)  # refuses unknown options before a model is built
    if engine.is_main and method.unread:
        warn_unread(out_dir, method.unread, method.unread_because)
    return run


def _log_resume(start: Checkpoint, steps: int) -> None:
    done = start.info["progress"]["step"]
    logger.info("resuming %s at step %d of %d", start.path, done, steps)
    if done >= steps:
        logger.warning(
            "This run has already done %d steps: only its evaluation is written. To train on, raise trainer.steps or "
            "trainer.epochs.",
            done,
        )


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
    """Return a line for each command that uses a finished training, and for the one that advises on its data.

    Commands of extensions that are not installed are left out.
    """
    folders = [SHIPPED, *map(Path, config_dirs)]
    uses = ["mode=track {} input=VIDEO"] if on_clips else ["mode=predict {} input=PATH", "mode=export {} export=onnx"]
    resume = shlex.quote(f"resume={run}")
    own = shlex.join(folder_words(config_dirs))
    there = [use for use in ("mode=eval {}", *uses) if has_options(folders, use)]
    lines = ["next:", *(f"  python -m dinoseg {use.format(resume)} {own}".rstrip() for use in there)]
    if not on_clips and has_options(folders, "mode=doctor"):
        lines.append("data advice:  mode=doctor with the same data settings")
    return lines


def _read_start(builder: Builder, labels: SegmentationData | Labels) -> tuple[Checkpoint, SegmentationModel]:
    """Return the checkpoint that `resume` names, and the outline of the model, after checking that they fit."""
    # tensors last: an untrusted file may describe more than fits in memory
    file = checkpoint.outline(Path(str(builder.resume)))
    check_classes(labels, file.info, f"resume={file.path}")
    outline = builder.check_fits(file)
    check_resumable(file)
    return checkpoint.read(file.path), outline
