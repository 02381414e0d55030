"""mode=train: training, and evaluation of the checkpoint that `trainer.evaluate` chooses."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.heads import SOLO, solo_builders
from dinoseg.experiment.initial import check_initial, has_initial, load_initial_weights
from dinoseg.experiment.log_file import announce
from dinoseg.experiment.loggers import logger_factories
from dinoseg.experiment.past_runs import write_end
from dinoseg.modes.train_heads import train_heads
from dinoseg.modes.training_run import TrainingRun, check_data_on_rank0
from dinoseg.training.trainer import Experiment, fit
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural


def train(
    cfg: DictConfig,
    *,
    out_dir: Path,
    metrics_only: bool = False,
    pictures: Natural = 4,
    report: bool = True,
) -> dict[str, Any]:
    """Train, then evaluate the best or last weights on the validation split; return the scores.

    Args:
        cfg: the whole config; `resume` names a checkpoint file to resume from, or is None.
        out_dir: the run folder.
        metrics_only: write no figures of the final evaluation.
        pictures: number of validation samples shown in a figure at each validation, always the same ones.
        report: write report.html of the final evaluation, and the files that mode=compare reads.
    """
    build = Builder(cfg)
    for each in (build, *solo_builders(build).values()):
        each.check_values()
    engine = build.engine()
    announce(f"data={cfg.choices.data}: listing the files")
    task = build.training_task()
    task.open(engine, pictures=pictures)
    length = build.lengths(len(task.data_module.train))
    settings = build.loop_settings(length._asdict())
    shown = {"metrics_only": metrics_only, "report": report}
    if SOLO in cfg:
        scores = train_heads(build, task, engine, out_dir, settings, **shown)
    else:
        job = TrainingRun(build, out_dir, task, engine)
        announce(f"Building the model, with backbone.weights={build.value('backbone').get('weights')}")
        made = build.model()
        job.check_model(made)
        announce("Checking the data")
        sizes = check_data_on_rank0(task, engine)
        if has_initial(build):
            load_initial_weights(build, made, list(task.labels.classes), engine.broadcast)
        model = engine.place(made)
        loss, optimizer, checkpoints = job.parts(model, sizes)
        schedule = job.build_schedule(length.steps, optimizer)
        job.log_start(model, length.steps)
        epochs = length.steps * cfg.trainer.accumulate / task.data_module.epoch
        cached = task.cache_features(model, engine, epochs, before=job.chosen_before)
        job.note(checkpoints, cached)
        with job.open_log() as log:
            parts = (model, loss, task.data_module, optimizer, schedule, engine, checkpoints, log)
            run = fit(Experiment(*parts, settings))
            if not run.has_best:
                raise UserError(
                    f"trainer.steps={length.steps}: this run has done {run.step}, without a validation by these "
                    "settings, and its checkpoints are unchanged. Raise trainer.steps, or score it by mode=eval."
                )
            if engine.is_main:
                write_end(out_dir, run.step)
            scores = job.finish(model, checkpoints, log, **shown)
        if engine.is_main:
            write_end(out_dir, run.step, scores)
    engine.close()
    return scores


def check(cfg: DictConfig) -> None:
    """Refuse a config whose parts do not fit together or are out of range, without reading weights or data."""
    build = Builder(cfg)
    build.check_values()
    task, model = build.training_task(), build.outline()
    if has_initial(build):
        check_initial(build, model)
    task.check_parts(model, 1)
    logger_factories(build)
    with torch.device("meta"):
        build.optimizer(model)
    task.check_sources()
