"""Multi-head training on one frozen backbone: a run folder for each head, and a leaderboard at the end."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.heads import head_description, solo_builders
from dinoseg.experiment.initial import has_initial
from dinoseg.experiment.models import build_multi_head
from dinoseg.experiment.past_runs import write_end
from dinoseg.experiment.recipe import run_description
from dinoseg.experiment.trained import check_classes
from dinoseg.modes.training_run import TrainingRun, build_schedule, check_data_on_rank0, log_start
from dinoseg.report.log import RunLog
from dinoseg.tasks.task import TrainingTask
from dinoseg.training import checkpoint
from dinoseg.training.engine import Engine
from dinoseg.training.head_training import HeadTraining
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.loading import Checkpoint, bounded
from dinoseg.training.multi_head import (
    MultiHeadCheckpoints,
    MultiHeadExperiment,
    MultiHeadSegmenter,
    join_optimizers,
)
from dinoseg.training.trainer import Settings, fit
from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)


TABLE = "leaderboard.csv"  # in the run folder
_SHOWN_NOTE = 50  # characters


@dataclass(frozen=True)
class Row:
    """Results of one head; None means unknown."""

    name: str
    rate: float | None = None  # highest base learning rate
    best: float | None = None  # best value of the score that selects checkpoints
    best_step: int | None = None
    miou: float | None = None  # of the final evaluation, 0..1, like `accuracy`
    accuracy: float | None = None
    parameters: int | None = None  # of the head
    note: str = ""
    run: str = ""  # run folder


def leaderboard(rows: Sequence[Row], out_dir: Path, score: str, lowest: Collection[str], *, visible: bool) -> str:
    """Print the heads, best first, and write them to leaderboard.csv; return the name of the best head.

    Args:
        rows: one per head, in any order.
        out_dir: folder of the table.
        score: name of the score in `best`.
        lowest: names of scores for which lower is better.
        visible: whether this rank prints and writes.
    """
    sign = 1 if score in lowest else -1
    ordered = sorted(rows, key=lambda row: (row.best is None, sign * (row.best or 0.0)))
    if visible:
        share = score not in lowest  # a loss is not a share
        headers = [
            *(
                "head",
                "learning rate",
                f"best val/{score}{' %' * share}",
                "at step",
                "mIoU %",
                "pixel accuracy %",
                "parameters",
            ),
            "note",
        ]
        shown = [_shown(row, share) for row in ordered]
        aligned = ("left", *["right"] * 6, "left")
        print(f"\n{tabulate(shown, headers=headers, disable_numparse=True, colalign=aligned)}")
        _write(out_dir / TABLE, ordered, f"val_{score}")
        print(f"\nleaderboard:  {out_dir / TABLE}")
    return ordered[0].name


def _shown(row: Row, share: bool) -> list[str]:
    note = row.note if len(row.note) <= _SHOWN_NOTE else f"{row.note[: _SHOWN_NOTE - 4]} ..."
    percent = ["" if value is None else f"{100 * value:.2f}" for value in (row.miou, row.accuracy)]
    score = row.best if row.best is None or not share else 100 * row.best
    rate, best, parameters = (
        "" if value is None else format(value, form)
        for value, form in ((row.rate, "g"), (score, ".2f" if share else ".4f"), (row.parameters, ","))
    )
    step = "" if row.best_step is None else str(row.best_step)
    return [row.name, rate, best, step, *percent, parameters, note]


def _write(path: Path, rows: Sequence[Row], score: str) -> None:
    names = {"name": "head", "rate": "learning_rate", "best": score}
    columns = [names.get(field.name, field.name) for field in fields(Row)]
    write_csv(path, [columns, *(astuple(replace(row, note=row.note.replace("\n", " "))) for row in rows)])


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
        shown: options of the evaluations, see `TrainingRun.finish`.

    Raises:
        UserError: no head has reached a validation.
    """
    _check_task(build, task, engine)
    start = _read_start(build, task)
    folder, jobs = out_dir / checkpoint.HEADS, {}
    with bounded(f"resume={build.resume}") if start else nullcontext():
        for name, builder in solo_builders(build).items():
            jobs[name] = TrainingRun(builder, folder / name, task, engine)
            if start is not None:
                jobs[name].start = Checkpoint(start.path, {}, head_description(start.info, name))
    sizes = check_data_on_rank0(task, engine)
    backbone, models = build_multi_head([job.build for job in jobs.values()], engine.device)
    with ExitStack() as stack:
        members: list[HeadTraining] = []
        optimizers = []
        for (name, job), model in zip(jobs.items(), models, strict=True):
            job.check_model(model)
            _, loss, optimizer, checkpoints = job.parts(model, sizes, settings.steps)
            job.note(checkpoints, {}, tells=not members)
            log = stack.enter_context(job.log())
            members.append(HeadTraining(model, loss, checkpoints, log, name=name))
            optimizers.append(optimizer)
        rates = [max(group["base_lr"] for group in optimizer.param_groups) for optimizer in optimizers]
        joined = join_optimizers(optimizers)
        schedule = build_schedule(build, engine, settings.steps, joined)
        where, heads = out_dir / checkpoint.FOLDER, count_of(jobs, "head")
        logger.info("%s on one backbone, each with a run folder in %s: %s", heads, folder, join_names([*jobs]))
        info = run_description(build, task.labels)
        checkpoints = MultiHeadCheckpoints(where, info, start, engine.is_main, members=members)
        whole = engine.place(MultiHeadSegmenter(backbone, members))
        log_start(build, whole, task, engine, out_dir, settings.steps)
        parts = (
            whole,
            members[0].criterion,
            task.data_module,
            joined,
            schedule,
            engine,
            checkpoints,
        )
        step = fit(MultiHeadExperiment(*parts, RunLog("", visible=False), settings, members)).step
        if engine.is_main:
            write_end(out_dir, step)
        rows, scores = [], {}
        for member, rate in zip(members, rates, strict=True):
            if member.progress.best is not None:
                scores[member.name] = jobs[member.name].finish(member.model, member.progress, member.log, **shown)
            rows.append(_row(member, rate, scores.get(member.name, {})))
    first = leaderboard(rows, out_dir, build.value("trainer.score"), task.data_module.lowest, visible=engine.is_main)
    if first not in scores:
        raise UserError(f"No head has reached a validation: {join_names([row.note for row in rows], 3)}")
    result = {**scores[first], "head": first}
    if engine.is_main:
        write_end(out_dir, step, result)
    return result


def _check_task(build: Builder, task: TrainingTask, engine: Engine) -> None:
    if type(task.data_module) is not ImageDataModule:
        raise UserError("trainer=multi_head trains on images and masks: leave trainer.task out.")
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
    start = checkpoint.read(Path(build.resume), finite=build.value("finite_weights"))
    check_classes(task.labels, start.info, f"resume={start.path}")
    return start


def _row(member: HeadTraining, rate: float, scores: Mapping[str, Any]) -> Row:
    progress = member.progress
    return Row(
        name=member.name,
        rate=rate,
        best=progress.best,
        best_step=progress.best_step if progress.best is not None else None,
        miou=scores.get("miou"),
        accuracy=scores.get("accuracy"),
        parameters=sum(parameter.numel() for parameter in member.model.head.parameters()),
        note="" if member.dropped is None else f"dropped. {member.dropped}",
        run=str(member.checkpoints.folder.parent),
    )
