"""Multi-head training on one frozen backbone: one run, a best checkpoint for each head, and a leaderboard."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone, Loss
from dinoseg.core.metric import INFINITE_IMAGES
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.heads import head_description, solo_builders
from dinoseg.experiment.initial import has_initial
from dinoseg.experiment.models import build_multi_head
from dinoseg.experiment.past_runs import write_end
from dinoseg.experiment.recipe import run_description
from dinoseg.experiment.trained import check_classes
from dinoseg.models.model import SegmentationModel
from dinoseg.modes.training_run import RunContext, TrainingRun, check_data_on_rank0, next_commands
from dinoseg.report.table import MEANS
from dinoseg.tasks.task import TrainingTask
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.cost import COST, cost_of
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.loading import Checkpoint, limit_model_size
from dinoseg.training.multi_head import (
    HeadClipping,
    MultiHeadCheckpointer,
    MultiHeadDataModule,
    MultiHeadLoss,
    MultiHeadSegmenter,
    join_optimizers,
    leaving_note,
)
from dinoseg.training.trainer import Experiment, Settings, fit
from dinoseg.utils.atomic import write_json
from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
TABLE = "leaderboard.csv"  # in the run folder


@dataclass
class HeadParts:
    """One of several heads: its run folder, its stand-alone model, and its best checkpoint."""

    run: TrainingRun
    model: SegmentationModel
    checkpoints: Checkpointer
    optimizer: Optimizer
    loss: Loss
    rate: float  # highest base learning rate


def train_heads(
    build: Builder, task: TrainingTask, engine: Engine, out_dir: Path, settings: Settings, **shown: bool
) -> dict[str, Any]:
    """Train the heads of a config, evaluate the best checkpoint of each, and return the scores of the best head.

    Args:
        build: of the whole config, with that of each head's own run.
        task: data of the training task.
        engine: device and ranks.
        out_dir: the run folder.
        settings: of the training loop.
        shown: options of the evaluations, see `TrainingTask.evaluate`.

    Raises:
        UserError: no head has reached a validation.
    """
    _check_task(build, task, engine)
    start = _read_start(build, task)
    job = RunContext(build, out_dir, task, engine, start)
    backbone, heads = _build_heads(build, task, engine, out_dir, start)
    model = MultiHeadSegmenter(backbone, {name: head.model for name, head in heads.items()})
    engine.place(model)
    optimizer = join_optimizers([head.optimizer for head in heads.values()])
    schedule = job.build_schedule(settings.steps, optimizer)
    logger.info("%s on one backbone: %s", count_of(heads, "head"), join_names([*heads]))
    job.log_start(model, settings.steps)
    checkpoints = MultiHeadCheckpointer(
        out_dir / checkpoint.FOLDER,
        run_description(build, task.labels),
        start,
        engine.is_main,
        metric=build.score_metric,
        heads={name: head.checkpoints for name, head in heads.items()},
    )
    assert isinstance(task.data_module, ImageDataModule)  # checked above
    with job.open_log() as log:
        experiment = Experiment(
            model,
            MultiHeadLoss(next(iter(heads.values())).loss),  # the config has one loss for all heads
            MultiHeadDataModule(**task.data_module.constructor_kwargs),
            optimizer,
            schedule,
            engine,
            checkpoints,
            log,
            settings,
            HeadClipping(model.head, settings.clip),
        )
        step = fit(experiment).step
        if engine.is_main:
            write_end(out_dir, step)
        scores = {}
        for name, head in heads.items():
            progress = head.checkpoints.progress
            if not progress.has_best:
                continue
            if engine.is_main:
                print(f"\nhead {name}, best checkpoint (step {progress.best_step}):\n")
            scores[name] = head.run.evaluate(head.model, head.checkpoints, **shown)
        rows = head_rows(heads, scores, model.left_heads(), settings.score, task.data_module.lowest)
        first = rows[0]["head"]
        if first not in scores:
            raise UserError(f"trainer.steps={settings.steps}: this run has done {step}, without validation.")
        if engine.is_main:
            job.finish_log(log, scores[first], heads[first].checkpoints)
            write_leaderboard(rows, out_dir)
            run = out_dir / checkpoint.HEADS / first
            print("\n".join(next_commands(run, job.build.config_dirs, on_clips=task.on_clips)))
    costs = {name: cost_of(head.model, out_dir / "metrics.jsonl") for name, head in heads.items()}
    best = {"best_step": heads[first].checkpoints.progress.best_step, "run": str(heads[first].run.out_dir)}
    result = {**scores[first], **costs[first], **best, "head": first}
    if engine.is_main:
        for name, cost in costs.items():
            write_json(heads[name].run.out_dir / COST, cost)
        write_end(out_dir, step, result)
    return result


def _build_heads(
    build: Builder, task: TrainingTask, engine: Engine, out_dir: Path, start: Checkpoint | None
) -> tuple[Backbone, dict[str, HeadParts]]:
    """Return the shared backbone and the heads by name, each with the parts of a run of its own."""
    runs = {}
    with limit_model_size(f"resume={build.resume}") if start else nullcontext():
        for name, builder in solo_builders(build).items():
            runs[name] = TrainingRun(builder, out_dir / checkpoint.HEADS / name, task, engine)
            if start is not None:
                runs[name].start = Checkpoint(start.path, {}, head_description(start.info, name))
    sizes = check_data_on_rank0(task, engine)
    backbone, models = build_multi_head([run.build for run in runs.values()], engine.device)
    heads: dict[str, HeadParts] = {}
    for (name, run), model in zip(runs.items(), models, strict=True):
        run.check_model(model)
        loss, optimizer, checkpoints = run.parts(model, sizes)
        run.note(checkpoints, {}, tells=not heads)
        rate = max(group["base_lr"] for group in optimizer.param_groups)
        heads[name] = HeadParts(run, model, checkpoints, optimizer, loss, rate)
    return backbone, heads


def head_rows(
    heads: Mapping[str, HeadParts],
    scores: Mapping[str, Mapping[str, Any]],
    left: Mapping[str, int],
    score: str,
    lowest: Collection[str],
) -> list[dict[str, Any]]:
    """Return a row of results for each head, the best head first and those without a score last.

    Args:
        heads: by name.
        scores: final scores of the heads that reached a validation.
        left: steps at which heads have left.
        score: name of the score that selects checkpoints.
        lowest: names of scores for which lower is better.
    """
    rows = []
    for name, head in heads.items():
        progress = head.checkpoints.progress
        row: dict[str, Any] = {"head": name}
        row["learning_rate"] = head.rate
        row[f"val_{score}"] = None if progress.best_infinite else progress.best
        if any(each.checkpoints.progress.best_infinite for each in heads.values()):
            row[f"val_{score}{INFINITE_IMAGES}"] = progress.best_infinite
        row["best_step"] = progress.best_step if progress.has_best else None
        row["miou"] = scores.get(name, {}).get("miou")
        row["accuracy"] = scores.get(name, {}).get("accuracy")
        row["parameters"] = sum(parameter.numel() for parameter in head.model.head.parameters())
        row["note"] = leaving_note(left[name]) if name in left else ""
        row["run"] = str(head.run.out_dir)
        rows.append(row)
    progresses = {name: head.checkpoints.progress for name, head in heads.items()}
    return sorted(rows, key=lambda row: progresses[row["head"]].rank(lowest=score in lowest))


def write_leaderboard(rows: Sequence[Mapping[str, Any]], out_dir: Path) -> None:
    """Print the rows of `head_rows` in percent, and write them with scores in 0..1 to leaderboard.csv in a folder."""
    shown = [dict(_leaderboard_cell(key, value) for key, value in row.items() if key != "run") for row in rows]
    print(f"\n{tabulate(shown, headers='keys', floatfmt='.4g', intfmt=',', disable_numparse=[0])}")  # 0: names
    write_csv_table(out_dir / TABLE, [*rows[0]], rows)
    print(f"\nleaderboard:  {out_dir / TABLE}")


def _leaderboard_cell(key: str, value: Any) -> tuple[str, Any]:
    """Return the heading and the printed value of an entry of `head_rows`."""
    label = MEANS.get(key.removeprefix("val_"))
    if label is None:
        return key.replace("_", " "), value
    return f"{'val ' if key.startswith('val_') else ''}{label} %", None if value is None else 100 * value


def _check_task(build: Builder, task: TrainingTask, engine: Engine) -> None:
    if type(task.data_module) is not ImageDataModule:
        raise UserError("trainer=multi_head trains on images and masks: leave trainer.method out.")
    if engine.sharded or engine.cache in ("disk", "memory"):
        key = "sharding=fsdp" if engine.sharded else f"cache={engine.cache}"
        raise UserError(f"engine.{key} is for one head at a time. Leave it out with trainer=multi_head.")
    if engine.loss_scale() is not None:
        raise UserError(
            "engine.precision=fp16 scales the loss of one head at a time. Set engine.precision=fp32 with "
            "trainer=multi_head, or bf16 where the device has it."
        )
    if (evaluate := build.value("trainer.evaluate")) == "last":
        raise UserError(
            f"trainer.evaluate={evaluate} is for one head at a time: the leaderboard ranks best scores. Set "
            "trainer.evaluate=best with trainer=multi_head."
        )
    if has_initial(build):
        raise UserError(f"init={build.value('init')} is for one head at a time. Leave it out with trainer=multi_head.")


def _read_start(build: Builder, task: TrainingTask) -> Checkpoint | None:
    """Return the checkpoint to resume from, which holds all heads; None for a new run."""
    if not build.resume:
        return None
    start = checkpoint.read(Path(build.resume))
    check_classes(task.labels, start.info, f"resume={start.path}")
    return start
