"""mode=train: training, and evaluation of the checkpoint that `trainer.evaluate` chooses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.initial import check_initial, has_initial, load_initial_weights
from dinoseg.experiment.loggers import logger_factories
from dinoseg.models.model import SegmentationModel
from dinoseg.modes.training_run import open_run
from dinoseg.runs.log_file import announce
from dinoseg.training.end_record import Ranking, write_end
from dinoseg.training.trainer import TrainingSetup, fit
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural


def train(
    cfg: DictConfig,
    *,
    out_dir: Path,
    metrics_only: bool = False,
    pictures: Natural = 4,
    report: bool = True,
    init_head: Callable[..., None] | None = None,
    choose_thresholds: Callable[..., list[float]] | None = None,
) -> dict[str, Any]:
    """Train, then evaluate the best or last weights on the validation split; return the scores.

    Args:
        cfg: the whole config; `resume` names a checkpoint file to resume from, or is None.
        out_dir: the run folder.
        metrics_only: write no figures of the final evaluation.
        pictures: number of validation samples shown in a figure at each validation, always the same ones.
        report: write report.html of the final evaluation, and the files that mode=compare reads.
        init_head: initialises the head of a model by `head.init`, such as `init_head` of `cfg/head/_probe.yaml`;
            None: that is refused.
        choose_thresholds: chooses thresholds for `task.threshold=auto`; None: that is refused.
    """
    builder = Builder(cfg)
    builder.check_values()
    engine = builder.engine()
    announce(f"data={cfg.choices.data}: listing the files")
    method = builder.training_method
    method.open(engine, pictures=pictures)
    settings = builder.loop_settings(len(method.data_module.train))
    run = open_run(builder, out_dir, method, engine)
    if run.start is None:  # a resumed run has checked the model's outline
        outline = builder.outline()  # before weights are downloaded
        run.check_model(outline)
        _check_head_init(outline, init_head)
    announce(f"Building the model, with backbone.weights={builder.value('backbone').get('weights')}")
    model = builder.model()
    announce("Checking the data")
    # one rank is enough: its measurements are cached, and its error ends all ranks
    sizes = method.check_data() if engine.is_main else None
    engine.wait()
    if has_initial(builder):
        load_initial_weights(builder, model, list(method.labels.classes), engine.broadcast)
    model = engine.place(model)
    loss = method.wrap_loss(builder.loss(method.labelled)).to(engine.device)
    if run.start is None and model.head.init is not None and init_head is not None:
        init_head(builder, model, method.labelled, engine)
    optimizer = builder.optimizer(model)
    checkpoints = run.open_checkpoints(sizes)
    schedule = run.build_schedule(settings.steps, optimizer)
    run.log_start(model, settings.steps)
    epochs = settings.steps * settings.accumulate / method.data_module.epoch
    cached = method.cache_features(model, engine, epochs, previous_choices=run.previous_choices)
    run.record_choices(checkpoints, cached)
    with run.open_log() as log:
        progress = fit(
            TrainingSetup(model, loss, method.data_module, optimizer, schedule, engine, checkpoints, log, settings)
        )
        if not progress.has_best:
            raise UserError(
                f"trainer.steps={settings.steps}: this run has done {progress.step}, without a validation by these "
                "settings, and its checkpoints are unchanged. Raise trainer.steps, or score it by mode=eval."
            )
        if engine.is_main:
            write_end(out_dir, progress.step)
        if builder.task.is_auto:
            assert choose_thresholds is not None, "`check_values` refuses it"
            run.choose_thresholds(model, checkpoints, choose_thresholds)
        scores = run.finish(model, checkpoints, log, metrics_only=metrics_only, report=report)
    if engine.is_main:
        name = settings.score
        value = scores.get(name, progress.best)
        is_lowest = name in method.data_module.lowest
        ranking = None if value is None else Ranking(name, value, is_lowest, builder.value("data.fold"))
        write_end(out_dir, progress.step, scores, ranking)
    engine.close()
    return scores


def check(cfg: DictConfig) -> None:
    """Refuse a config whose parts do not fit together or are out of range, without reading weights or data."""
    builder = Builder(cfg)
    builder.check_values()
    method, model = builder.training_method, builder.outline()
    if has_initial(builder):
        check_initial(builder, model)
    method.check_parts(model, 1)
    _check_head_init(model, builder.value("mode.init_head"))
    logger_factories(builder)
    with torch.device("meta"):
        builder.optimizer(model)
    method.check_sources()


def _check_head_init(model: SegmentationModel, init_head: object) -> None:
    if model.head.init is not None and init_head is None:
        raise UserError(f"head.init={model.head.init} is not part of this installation. Leave it out.")
