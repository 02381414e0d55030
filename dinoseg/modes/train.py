"""mode=train: build everything, fit, and score the best checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg import build
from dinoseg.errors import UserError
from dinoseg.modes.evaluate import score
from dinoseg.report.curves import draw_curves
from dinoseg.report.log import NoLog, RunLog, read_rows
from dinoseg.resume import description
from dinoseg.training import checkpoint

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, *, out_dir: Path, metrics_only: bool = False) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on the validation split; return its scores.

    Args:
        cfg: the whole config; `resume` names a checkpoint file to go on from, or nothing.
        out_dir: the run folder.
        metrics_only: write no pictures of the final evaluation.
    """
    engine = build.instantiate(cfg.engine)
    out_dir = Path(engine.share(str(out_dir)))
    feed = build.feed(cfg, engine)
    loss = build.loss(cfg, feed.train).to(engine.device)
    model = build.model(cfg).to(engine.device)
    optimizer = build.optimizer(cfg, model)
    start = checkpoint.read(Path(cfg.resume)) if cfg.resume else None
    checkpoints = checkpoint.Checkpoints(
        out_dir / checkpoint.FOLDER, description(cfg, feed.train), start, writes=engine.is_main
    )
    first_step = start.info["progress"]["step"] if start else 0
    log = RunLog(out_dir, start_step=first_step) if engine.is_main else NoLog()
    if engine.is_main:
        (out_dir / "split.json").write_text(
            json.dumps({"train": list(feed.train.names), "val": list(feed.val.names)}, indent=1)
        )
    logger.info("%d training and %d validation images; run folder %s", len(feed.train), len(feed.val), out_dir)
    try:
        run = build.instantiate(cfg.trainer)(
            model,
            loss,
            feed,
            optimizer,
            engine,
            checkpoints,
            log,
            schedule=build.instantiate(cfg.optim.schedule),
        )
    finally:
        log.close()
    if engine.is_main:
        draw_curves(read_rows(out_dir / "metrics.jsonl"), out_dir)
    if run.best is None:
        raise UserError(f"trainer.steps={cfg.trainer.steps}: this run has already done {run.step}. Give more steps.")
    best = checkpoint.read(checkpoint.find(out_dir, "best"))
    checkpoint.load_weights(model, best)
    scores = score(model, feed.val, engine, out_dir / "evaluation", metrics_only=metrics_only)
    return {**scores, "best_step": run.best_step, "run": str(out_dir)}
