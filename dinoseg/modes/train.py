"""mode=train: build everything, fit, and score the best checkpoint."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg import build
from dinoseg.config.nodes import instantiate
from dinoseg.data.classes.labels import Labels
from dinoseg.errors import UserError
from dinoseg.evaluation.images import list_skipped
from dinoseg.model import Segmenter
from dinoseg.ranges import Natural
from dinoseg.regimes.choice import regime_of
from dinoseg.report.curves import draw_curves
from dinoseg.report.log import RunLog, read_rows, write_settings
from dinoseg.runs.recipe import run_description
from dinoseg.runs.settings import settings_of
from dinoseg.runs.split_record import write_split
from dinoseg.runs.trained import check_classes
from dinoseg.shapes import SegmentationData
from dinoseg.training import checkpoint
from dinoseg.training.cost import cost_of
from dinoseg.training.loading import Checkpoint
from dinoseg.training.optim import warn_of_long_warmup

logger = logging.getLogger(__name__)


def train(
    cfg: DictConfig, *, out_dir: Path, metrics_only: bool = False, pictures: Natural = 4, report: bool = True
) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on the validation split; return its scores.

    Args:
        cfg: the whole config; `resume` names a checkpoint file to go on from, or nothing.
        out_dir: the run folder.
        metrics_only: write no pictures of the final evaluation.
        pictures: validation samples of which each validation keeps a picture, the same ones every time.
        report: write report.html of the final evaluation, and what mode=compare needs.
    """
    engine = instantiate(cfg.engine)
    out_dir = Path(engine.share(str(out_dir)))
    # under torchrun each rank has looked for itself, and another run may have been saved in between
    if engine.share(cfg.resume) != cfg.resume:
        raise UserError("resume=auto: the ranks found different runs. Name the one to go on with: resume=RUN_FOLDER.")
    regime = regime_of(cfg)(cfg, engine, pictures=pictures)
    feed = regime.feed
    length = build.lengths(cfg, len(feed.train))
    fit = instantiate(cfg.trainer, without=("feed", "epochs"), instead=length._asdict())
    start, outline = _start(cfg, regime.labels) if cfg.resume else (None, build.outline(cfg))
    regime.check_parts(cfg, outline, engine.world)
    # one rank is enough: what it measures is kept in the cache, and what it refuses ends all
    sizes = regime.check_data() if engine.is_main else None
    engine.wait()
    loss = build.loss(cfg, regime.labelled).to(engine.device)
    model = regime.started(engine.place(build.model(cfg, outlined=True)), engine, new=start is None)
    optimizer = build.optimizer(cfg, model)
    schedule = instantiate(cfg.optim.schedule)
    info = run_description(cfg, regime.labels) | (sizes.as_info() if sizes else {})
    checkpoints = checkpoint.Checkpoints(out_dir / checkpoint.FOLDER, info, start, writes=engine.is_main)
    if engine.is_main:
        warn_of_long_warmup(schedule, length.steps)
        write_split(out_dir, regime.split)
    logger.info("%d training and %d validation %s; run folder %s", len(feed.train), len(feed.val), regime.what, out_dir)
    first_step = start.info["progress"]["step"] if start else 0
    if start is not None:
        logger.info("going on with %s at step %d of %d", start.path, first_step, length.steps)
    regime.keep_features(model, loss, engine, length.steps * cfg.trainer.accumulate / feed.epoch)
    with RunLog(out_dir, start_step=first_step, visible=engine.is_main) as log:
        run = fit(model, loss, feed, optimizer, engine, checkpoints, log, schedule=schedule)
    if first_step >= length.steps:
        logger.warning("This run had already done %d steps: give more trainer.steps or trainer.epochs.", first_step)
    if run.best is None:
        raise UserError(f"trainer.steps={length.steps}: this run has done {run.step}, and was never validated.")
    rows = out_dir / "metrics.jsonl"
    curves = draw_curves(read_rows(rows), out_dir, regime.plots) if engine.is_main else []
    # read back, not kept in memory: what is scored here is what mode=eval will score
    best = checkpoint.find(out_dir, "best")
    checkpoint.load_weights(model, checkpoint.read(best, finite=cfg.finite_weights))
    scores = regime.evaluate(model, engine, best, metrics_only=metrics_only, report=report)
    if engine.is_main:
        print(f"curves:       {out_dir}/{', '.join(path.name for path in curves)}")
        write_settings(out_dir, settings_of(cfg), scores)
        print(f"TensorBoard:  tensorboard --logdir {out_dir / 'tensorboard'}")
        print(f"checkpoint:   {best} (step {run.best_step})")
        list_skipped(regime.skipped, out_dir)
    engine.close()
    return {**scores, **cost_of(model, rows), "best_step": run.best_step, "run": str(out_dir)}


def _start(cfg: DictConfig, labels: SegmentationData | Labels) -> tuple[Checkpoint, Segmenter]:
    """Return the checkpoint that `resume` names, and the outline of the model, which it is known to fit."""
    # its tensors last: a foreign file may describe more than this machine holds
    file = checkpoint.outline(Path(cfg.resume))
    check_classes(labels, file.info, f"resume={file.path}")
    outline = build.check_fits(cfg, file)
    return checkpoint.read(file.path, finite=cfg.finite_weights), outline


def check(cfg: DictConfig) -> None:
    """Refuse a config whose parts cannot be put together or are out of range; reads neither weights nor data."""
    regime, model = regime_of(cfg), build.outline(cfg)
    regime.check_parts(cfg, model, 1)
    with torch.device("meta"):
        build.optimizer(cfg, model)
    instantiate(cfg.optim.schedule)
    for node in regime.data_nodes(cfg):
        instantiate(node)
