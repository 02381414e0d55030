"""mode=train: build everything, fit, and score the best checkpoint."""

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dinoseg import build
from dinoseg.config.nodes import instantiate
from dinoseg.config.values import plain
from dinoseg.errors import UserError
from dinoseg.ranges import Natural
from dinoseg.regimes.clips import TrainClips
from dinoseg.regimes.images import TrainImages
from dinoseg.report.curves import draw_curves
from dinoseg.report.log import RunLog, read_rows, write_settings
from dinoseg.runs.recipe import run_description
from dinoseg.runs.trained import check_classes
from dinoseg.storage import forms
from dinoseg.storage.atomic import write_json
from dinoseg.training import checkpoint
from dinoseg.training.description import CHOSEN, MODEL
from dinoseg.training.feed import Feed
from dinoseg.training.optim import warn_of_long_warmup
from dinoseg.wording import listed

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, *, out_dir: Path, metrics_only: bool = False, pictures: Natural = 4) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on the validation split; return its scores.

    Args:
        cfg: the whole config; `resume` names a checkpoint file to go on from, or nothing.
        out_dir: the run folder.
        metrics_only: write no pictures of the final evaluation.
        pictures: validation samples of which each validation keeps a picture, the same ones every time.
    """
    engine = instantiate(cfg.engine)
    out_dir = Path(engine.share(str(out_dir)))
    if engine.share(cfg.resume) != cfg.resume:
        raise UserError("resume=auto: the ranks found different runs. Name the one to go on with: resume=RUN_FOLDER.")
    feed = build.feed(cfg, engine, pictures=pictures)
    length = build.lengths(cfg, len(feed.train))
    fit = instantiate(cfg.trainer, without=("feed", "epochs"), instead=length._asdict())
    kind = TrainImages(cfg, feed) if isinstance(feed, Feed) else TrainClips(cfg, feed)
    start = checkpoint.outline(Path(cfg.resume)) if cfg.resume else None
    if start is not None:
        check_classes(kind.labels, start.info, f"resume={start.path}")
        build.check_fits(cfg, start)
        start = checkpoint.read(start.path, finite=cfg.finite_weights)
    kind.check_parts(cfg, engine.world)
    sizes = kind.check_data() if engine.is_main else None
    loss = build.loss(cfg, kind.labelled).to(engine.device)
    model = build.model(cfg).to(engine.device)
    optimizer = build.optimizer(cfg, model)
    schedule = instantiate(cfg.optim.schedule)
    if engine.is_main:
        warn_of_long_warmup(schedule, length.steps)
    info = run_description(cfg, kind.labels) | (sizes.as_info() if sizes else {})
    checkpoints = checkpoint.Checkpoints(out_dir / checkpoint.FOLDER, info, start, writes=engine.is_main)
    if engine.is_main:
        _write_split(out_dir, kind.split)
    logger.info("%d training and %d validation %s; run folder %s", len(feed.train), len(feed.val), kind.what, out_dir)
    first_step = start.info["progress"]["step"] if start else 0
    if start is not None:
        logger.info("going on with %s at step %d of %d", start.path, first_step, length.steps)
    with RunLog(out_dir, start_step=first_step, visible=engine.is_main) as log:
        run = fit(model, loss, feed, optimizer, engine, checkpoints, log, schedule=schedule)
    if first_step >= length.steps:
        logger.warning("This run had already done %d steps: give more trainer.steps or trainer.epochs.", first_step)
    if run.best is None:
        raise UserError(f"trainer.steps={length.steps}: this run has done {run.step}, and was never validated.")
    curves = draw_curves(read_rows(out_dir / "metrics.jsonl"), out_dir, kind.plots) if engine.is_main else []
    best = checkpoint.find(out_dir, "best")
    checkpoint.load_weights(model, checkpoint.read(best, finite=cfg.finite_weights))
    scores = kind.evaluate(model, engine, out_dir / "evaluation", metrics_only=metrics_only)
    if engine.is_main:
        print(f"curves:       {out_dir}/{', '.join(path.name for path in curves)}")
        write_settings(out_dir, _settings(cfg), scores)
        print(f"TensorBoard:  tensorboard --logdir {out_dir / 'tensorboard'}")
        print(f"checkpoint:   {best} (step {run.best_step})")
        kind.close(out_dir)
    engine.close()
    return {**scores, **_cost(model, out_dir), "best_step": run.best_step, "run": str(out_dir)}


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """Return what runs are told apart by, under full names: the choices, and the values of what is trained and how."""
    groups = {group: plain(cfg[group], resolve=True) for group in ("resolution", *MODEL)}
    choices = {group: cfg.choices[group] for group in CHOSEN}
    return _flat({"seed": cfg.seed, "choices": choices, "data": {"batch_size": cfg.data.batch_size}, **groups})


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            found[f"{prefix}{key}"] = value if isinstance(value, int | float) else str(value)
    return found


def check(cfg: DictConfig) -> None:
    """Refuse a config whose parts cannot be put together or are out of range; reads neither weights nor data."""
    kind = TrainClips if build.of_clips(cfg) else TrainImages
    kind.check_parts(cfg, 1)
    with torch.device("meta"):
        build.optimizer(cfg, build.model(cfg, untrained=True))
    instantiate(cfg.optim.schedule)
    for node in (cfg.data.clips, cfg.data.view) if kind is TrainClips else (cfg.data.reader, cfg.data.augment):
        instantiate(node)


def _write_split(out_dir: Path, split: Mapping[str, Sequence[str]]) -> None:
    """Write split.json; where the run began with other images, say so and keep their list as split_1.json and so on."""
    path = out_dir / "split.json"
    before = _read_split(path)
    if before is not None and before != split:
        kept = next(name for name in map("split_{}.json".format, count(1)) if not (out_dir / name).exists())
        os.replace(path, out_dir / kept)
        changes = "; ".join(_change(side, before.get(side, []), names) for side, names in split.items())
        logger.warning(
            "The data is no longer what this run began with (%s). From here on it takes others, or in another "
            "order, so it is not the run it would have been, and scores of other validation data do not compare. "
            "The list it had is kept in %s.",
            changes,
            out_dir / kept,
        )
    write_json(path, split)


def _read_split(path: Path) -> dict[str, list[str]] | None:
    try:
        return forms.read_json(path, forms.table(forms.listing(forms.text)))
    except FileNotFoundError:
        return None
    except (OSError, forms.Misshapen) as error:
        logger.warning("%s is damaged (%s): whether the data is what this run began with is not known.", path, error)
        return None


def _change(side: str, before: Sequence[str], now: Sequence[str]) -> str:
    added, removed = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    if not added and not removed:
        return f"{side}: {'the same' if list(before) == list(now) else 'the same in another order'}"
    named = [
        f"{len(names)} {what} ({listed(names, 3)})" for what, names in (("added", added), ("removed", removed)) if names
    ]
    return f"{side}: {', '.join(named)}"


def _cost(model: nn.Module, out_dir: Path) -> dict[str, Any]:
    """Return how large the model is, and how fast and with what peak memory the run was, as it logged it."""
    rows = [row for row in read_rows(out_dir / "metrics.jsonl") if "train/images_per_s" in row]
    parameters = list(model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "images_per_s": median(row["train/images_per_s"] for row in rows) if rows else None,
        "memory_gib": max((row["train/memory_gib"] for row in rows), default=None),
    }
