"""mode=train: training, and evaluation of the checkpoint that `trainer.evaluate` chooses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.experiment.builder import Builder
from dinoseg.methods.training import Training
from dinoseg.training.trainer import fit
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
    training: Training = Builder(cfg).make_training()
    training.setup(out_dir, pictures=pictures, init_head=init_head)
    with training.open_log() as log:
        progress = fit(training.loop_setup(log))
        scores = training.finish(progress, log, choose_thresholds, metrics_only=metrics_only, report=report)
    training.engine.close()
    return scores


def check(cfg: DictConfig) -> None:
    """Refuse a config whose parts do not fit together or are out of range, without reading weights or data."""
    builder = Builder(cfg)
    training: Training = builder.make_training()
    training.check_values()
    training.check_config(builder.outline(), 1, builder.value("mode.init_head"))
    training.check_sources()
