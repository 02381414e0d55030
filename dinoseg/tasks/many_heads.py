"""Multi-head training on one frozen backbone: a run folder for each head, and a leaderboard at the end."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.experiment import build
from dinoseg.experiment.heads import solo_configs
from dinoseg.experiment.initial import has_initial
from dinoseg.experiment.recipe import run_description
from dinoseg.report.leaderboard import Row, leaderboard
from dinoseg.tasks.job import Job, begin, looked_at
from dinoseg.tasks.task import TrainingTask
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Progress
from dinoseg.training.engine import Engine
from dinoseg.training.image_feed import ImageFeed
from dinoseg.training.many_heads import DROPPED, HeadParts, Outcome, fit_heads
from dinoseg.training.shared_features import SharingSegmenter
from dinoseg.training.trainer import Settings
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, listed

logger = logging.getLogger(__name__)
_NOTE = forms.holding(step=forms.whole(), reason=forms.text)


def train_heads(
    cfg: DictConfig,
    regime: TrainingTask,
    engine: Engine,
    out_dir: Path,
    settings: Settings,
    **shown: bool,
) -> dict[str, Any]:
    """Train the heads of a config, evaluate the best checkpoint of each, and return the scores of the best head.

    Args:
        cfg: the whole config, with that of each head's own run.
        regime: data of the training task.
        engine: device and ranks.
        out_dir: the run folder.
        settings: of the training loop.
        shown: options of the evaluations, see `Job.finish`.

    Raises:
        UserError: no head has reached a validation.
    """
    _check_feed(cfg, regime, engine)
    folder = out_dir / checkpoint.HEADS
    jobs = {name: Job(own, folder / name, regime, engine) for name, own in solo_configs(cfg).items()}
    sizes = looked_at(regime, engine)
    models = dict(zip(jobs, build.sharing([job.cfg for job in jobs.values()], engine.place), strict=True))
    dropped = _dropped(folder)
    with ExitStack() as stack:
        parts: list[HeadParts] = []
        for name, job in jobs.items():
            _, loss, optimizer, checkpoints = job.parts(models[name], sizes, settings.steps)
            job.note(checkpoints, {}, tells=not parts)
            log = stack.enter_context(job.log())
            parts.append(HeadParts(name, job.out_dir, models[name], loss, optimizer, checkpoints, log))
        keep = partial(_keep, cfg, regime, engine, out_dir, parts[0].model)
        schedule = begin(cfg, regime, engine, out_dir, settings.steps)
        logger.info(
            "%s on one backbone, each with a run folder in %s: %s", count_of(jobs, "head"), folder, listed([*jobs])
        )
        going = [part for part in parts if part.name not in dropped]
        assert isinstance(regime.feed, ImageFeed)  # see `_check_feed`
        ended = fit_heads(going, regime.feed, engine, keep, schedule, settings) if going else []
    outcomes = {part.name: outcome for part, outcome in zip(going, ended, strict=True)}
    rows, scores = [], {}
    for part in parts:
        outcome = outcomes.get(part.name) or Outcome(_progress(jobs[part.name]), None, dropped[part.name])
        if outcome.run.best is not None:
            scores[part.name] = jobs[part.name].finish(part.model, outcome.run, **shown)
        rows.append(_row(part, outcome, scores.get(part.name, {})))
    rows += [Row(name=name, note=f"dropped out. {reason}") for name, reason in dropped.items() if name not in jobs]
    first = leaderboard(rows, out_dir, cfg.trainer.score, regime.feed.lowest, visible=engine.is_main)
    if first not in scores:
        raise UserError(f"No head has come as far as a validation: {listed([row.note for row in rows], 3)}")
    return {**scores[first], "head": first}


def _check_feed(cfg: DictConfig, regime: TrainingTask, engine: Engine) -> None:
    if type(regime.feed) is not ImageFeed:
        raise UserError("trainer=many_heads trains on images and masks: leave trainer.feed out.")
    if engine.sharded or engine.cache in ("disk", "memory"):
        key = "sharding=fsdp" if engine.sharded else f"cache={engine.cache}"
        raise UserError(f"engine.{key} is for one head at a time. Leave it out with trainer=many_heads.")
    if has_initial(cfg):
        raise UserError(f"init={cfg.init} is for one head at a time. Leave it out with trainer=many_heads.")
    if cfg.data.get("feature_noise"):
        raise UserError(
            f"data.feature_noise={cfg.data.feature_noise} is for one head at a time. Set data.feature_noise=0 with "
            "trainer=many_heads."
        )


def _dropped(folder: Path) -> dict[str, str]:
    """Return why heads dropped out before this run resumed, by name.

    Raises:
        UserError: a file with the reason is damaged.
    """
    return {path.parent.name: _reason(path) for path in sorted(folder.glob(f"*/{DROPPED}"))}


def _reason(path: Path) -> str:
    try:
        return forms.read_json(path, _NOTE)["reason"]
    except forms.Misshapen as error:
        raise UserError(
            f"{path} is damaged ({error}). It says that this head has dropped out: remove it, and the head goes on."
        ) from None


def _progress(job: Job) -> Progress:
    return Progress(**job.start.info["progress"]) if job.start else Progress()


def _keep(
    cfg: DictConfig, regime: TrainingTask, engine: Engine, out_dir: Path, model: SharingSegmenter, step: int
) -> None:
    """Write the checkpoint that `resume` needs to find the run: its config, and a step from which all heads resume."""
    if engine.is_main:
        info = {**run_description(cfg, regime.labels), "progress": asdict(Progress(step=step))}
        frozen = {**checkpoint.frozen_fingerprint(model), "head": "several"}
        checkpoint.write(out_dir / checkpoint.FOLDER / "last.safetensors", {}, {**info, "frozen": frozen})


def _row(part: HeadParts, outcome: Outcome, scores: Mapping[str, Any]) -> Row:
    run = outcome.run
    return Row(
        name=part.name,
        rate=max(group["base_lr"] for group in part.optimizer.param_groups),
        best=run.best,
        best_step=run.best_step if run.best is not None else None,
        miou=scores.get("miou"),
        accuracy=scores.get("accuracy"),
        parameters=sum(parameter.numel() for parameter in part.model.head.parameters()),
        share=outcome.share,
        note="" if outcome.dropped is None else f"dropped out. {outcome.dropped}",
        run=str(part.folder),
    )
