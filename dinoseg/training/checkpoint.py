"""Self-describing checkpoints: one safetensors file each, read without unpickling anything.

A file holds tensors under `model/`; `last` also has `optimizer/`, `ema/` and `loss_scale/`. The header holds one JSON
object with the step, the scores, the unresolved config, classes, palette and versions. A run resumes from `last`;
`best` holds the weights with the best validation score, or with `trainer.evaluate=last` those of the last validation.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from dinoseg.core.metric import split_infinite
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.description import (
    FORMAT,
    IDLE,
    THRESHOLDS,
    changed_prediction,
    locate_weights,
    read_description,
    resolve_evaluate,
    resolve_score,
)
from dinoseg.training.end_record import describe_sweep
from dinoseg.training.loading import (
    CASTS,
    Checkpoint,
    check_fits,
    copy_trained,
    frozen_fingerprint,
    load_average,
    load_optimizer,
    load_weights,
    parameters_without_state,
)
from dinoseg.training.loss_scale import LossScale
from dinoseg.training.optim import MovingAverage, tensors_of
from dinoseg.training.sharding import gather_tensors, is_shared
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import RUN_REMEDY, check_exists, expand_path, is_sweep_folder
from dinoseg.utils.interrupt import Interrupted
from dinoseg.utils.tensor_files import check_openable, is_finite, meta_tensor, read_tensor_file, write_tensors
from dinoseg.utils.wording import count_of, format_text

logger = logging.getLogger(__name__)
CHECKPOINT_FOLDER = "checkpoints"
ONE_FILE = "model"  # stem of the file that mode=export writes
_MAX_TENSORS = 50_000  # ten times those of the largest backbone with its training state


def write(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: the file cannot be written; an older file of that name stays unchanged.
    """
    write_tensors(path, tensors, {"dinoseg": json.dumps({"format": FORMAT, **info})})


def read(path: Path, *, only: Container[str] | None = None, key: str = "resume") -> Checkpoint:
    """Read a checkpoint file; nothing in it is executed.

    Args:
        path: the file.
        only: names of the tensors to read; None: all.
        key: of the config, which names the file in messages.

    Raises:
        UserError: the file is missing, truncated, not finite, of another format, or not a checkpoint of dinoseg.
    """
    file = _read(path, key, _tensor, only)
    check_finite(file.tensors, file.where)
    return file


def _tensor(file: Any, key: str) -> Tensor:
    value = file.get_tensor(key)
    return value.clone() if sys.platform == "win32" else value  # Windows cannot replace a memory-mapped file


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        tensors: by name.
        where: start of the error message.

    Raises:
        UserError: some do.
    """
    odd = [key for key, value in tensors.items() if value.dtype in CASTS and not is_finite(value)]
    if odd:
        raise UserError(
            f"{where}: {len(odd)} of its tensors hold NaN or infinity (such as {format_text(odd[0])}), so its "
            "predictions are meaningless. Choose an earlier checkpoint."
        )


def outline(path: Path, *, key: str = "resume") -> Checkpoint:
    """Read a checkpoint's description, and the names, shapes and dtypes of its tensors (on the meta device).

    Raises:
        UserError: see `read`; `key` names the file there.
    """
    return _read(path, key, meta_tensor)


def describe(path: Path, *, key: str = "resume") -> dict[str, Any]:
    """Read a checkpoint's description without its tensors.

    Raises:
        UserError: see `read`; `key` names the file there.
    """
    return _read(path, key, None).info


def _read(
    path: Path, key: str, value_of: Callable[[Any, str], Tensor] | None, only: Container[str] | None = None
) -> Checkpoint:
    where = f"{key}={path}"
    try:
        check_openable(path)
        with safe_open(path, framework="pt") as file:
            info = read_description((file.metadata() or {}).get("dinoseg"), where)
            info["config"] = locate_weights(info["config"], path.parent / info["folder"])
            names = file.keys() if value_of else ()
            if len(names) > _MAX_TENSORS:
                raise UserError(
                    f"{where}: it holds {len(names)} tensors; the limit is {_MAX_TENSORS}. Choose another one."
                )
            wanted = [name for name in names if only is None or name in only]
            return Checkpoint(path, {name: value_of(file, name) for name in wanted if value_of}, info, key)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:  # TypeError: a dimension exceeds 64 bits
        raise UserError(f"{where}: not a readable checkpoint ({error}). Choose another one.") from error


def find(target: str | Path, prefer: str, *, key: str = "resume") -> Path:
    """Return the checkpoint file of a run folder or of an export folder, or the given file itself.

    Args:
        target: the folder or file.
        prefer: `best` or `last`; the other one is the fallback.
        key: of the config, which names the file in messages.

    Raises:
        UserError: there is no checkpoint.
    """
    path = expand_path(target, ".safetensors")
    if path.is_file():
        return path
    other = {"best": "last", "last": "best"}[prefer]
    for name in (prefer, other, ONE_FILE):
        for folder in (path / CHECKPOINT_FOLDER, path):
            if (folder / f"{name}.safetensors").is_file():
                return folder / f"{name}.safetensors"
    check_exists(target, key, RUN_REMEDY, suffix=".safetensors")
    if is_sweep_folder(path):
        raise UserError(f"{describe_sweep(Path(target), key=key)}.")
    names = [f"{CHECKPOINT_FOLDER}/best", f"{CHECKPOINT_FOLDER}/last", ONE_FILE]
    reason = f"it holds neither {' nor '.join(f'{name}.safetensors' for name in names)}"
    raise UserError(f"{key}={target}: {reason}. Give a run folder of a training, an export or a checkpoint file.")


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0  # optimizer steps done
    # best validation score so far: the mean of the finite images if `best_infinite` others have an infinite value
    best: float | None = None
    best_infinite: int = 0
    best_step: int = 0
    stale: int = 0  # validations since the best one
    validation_pending: bool = False  # whether a validation is pending at this step: a resumed run starts with it

    @property
    def has_best(self) -> bool:
        """Return whether a validation has selected a checkpoint."""
        return self.best is not None or self.best_infinite > 0

    def rank(self, *, lowest: bool) -> tuple[float, float]:
        """Return the sort key of the best score: fewer infinite images first, then the better mean of the others."""
        if self.best is None:
            return self.best_infinite or math.inf, math.inf
        return self.best_infinite, self.best if lowest else -self.best

    def after_validation(self, score: float | None, infinite: int = 0, *, lowest: bool) -> "Progress":
        """Return the progress after a validation.

        Args:
            score: of the images of finite value; None if there are none.
            infinite: number of images of infinite value.
            lowest: whether the lowest score is the best.
        """
        # `stale` and `validation_pending` begin at their defaults again
        found = Progress(self.step, best=score, best_infinite=infinite, best_step=self.step)
        if found.rank(lowest=lowest) < self.rank(lowest=lowest):
            return found
        return replace(self, stale=self.stale + 1, validation_pending=False)


@dataclass
class Checkpointer:
    """Checkpoints of one run: saves `last` and `best`, restores `last`.

    Args:
        folder: folder of the checkpoint files.
        info: constant part of the description: config, classes, palette, versions.
        start: the checkpoint to resume from, or None for a new run.
        writes: whether this rank writes files.
        progress: progress of the run.
        metric: option of `metric` that computes the score which selects the best checkpoint; None: that of its name.
    """

    folder: Path
    info: dict[str, Any]
    start: Checkpoint | None = None
    writes: bool = True
    progress: Progress = field(default_factory=Progress)
    metric: str | None = None

    def restore(
        self, model: SegmentationModel, optimizer: Optimizer, ema: MovingAverage | None, scale: LossScale | None = None
    ) -> Progress:
        """Load the whole training state of the checkpoint to resume from, if any; return the progress of the run.

        The best score is discarded if another score selects the best now, see `drop_incomparable_score`.
        """
        # a hash of the frozen weights, which the file does not hold: it refuses to load on others
        self.info = {**self.info, "frozen": frozen_fingerprint(model)}
        if self.start is not None:
            load_weights(model, self.start)
            load_optimizer(optimizer, self.start)
            load_average(ema, self.start)
            if scale is not None:
                scale.restore(self.start.part("loss_scale"), next(model.parameters()).device)
            self.progress = drop_incomparable_score(
                Progress(**self.start.info["progress"]), self.start.info, self.info, self.metric
            )
        return self.progress

    def save(
        self, model: SegmentationModel, optimizer: Optimizer, ema: MovingAverage | None, scale: LossScale | None = None
    ) -> None:
        """Save `last`: the weights and all state that an exact resume needs."""
        tensors = {f"model/{name}": value for name, value in _trained_state(model).items()}
        state = _optimizer_state(optimizer)
        tensors |= {f"optimizer/{key}": value for key, value in state.items()}
        tensors |= {f"ema/{name}": value for name, value in (ema.average if ema else {}).items()}
        tensors |= {f"loss_scale/{name}": value for name, value in (scale.state() if scale else {}).items()}
        self._write("last", tensors, self.progress, {IDLE: len(parameters_without_state(optimizer, state))})

    def save_if_best(
        self,
        model: SegmentationModel,
        scores: Mapping[str, Any],
        name: str = "miou",
        *,
        lowest: bool = False,
        evaluate: str = "best",
    ) -> Progress:
        """Save `best` if a score beats all previous ones; the model must hold the weights that were scored.

        Args:
            model: holds the weights.
            scores: of the validation.
            name: of the score that selects the best checkpoint.
            lowest: whether the lowest score is the best.
            evaluate: `last` saves `best` after each validation, whatever its score.

        Returns:
            The updated progress, which `commit` sets once the rest of the validation is saved.
        """
        infinite, score = split_infinite(scores, name)
        now = self.progress.after_validation(score, infinite, lowest=lowest)
        # the score is not committed yet: if writing fails, the resumed run repeats the validation
        if now.best_step == now.step or evaluate == "last":
            self._write("best", {f"model/{name}": value for name, value in _trained_state(model).items()}, now)
        return now

    @property
    def best(self) -> Path:
        """The file of `best`; that of `last` if a run that started elsewhere has not beaten its score from there."""
        best, last = (self.folder / f"{name}.safetensors" for name in ("best", "last"))
        # resumed in another folder, which has no `best` until a score beats that of the old one
        is_elsewhere = self.start is not None and self.start.path.resolve().parent != self.folder.resolve()
        return last if is_elsewhere and not best.is_file() else best

    def load_best(self, model: SegmentationModel) -> None:
        """Load the weights of `best` into the model that this run trains.

        The description in the file is not read: the run has it.

        Args:
            model: of this run.

        Raises:
            UserError: the file is missing or of another model.
        """
        saved = Checkpoint(self.best, dict(read_tensor_file(self.best, "resume")), self.info)
        check_fits(model, saved)
        copy_trained(model, saved.part("model"))

    def store_thresholds(self, thresholds: Sequence[float]) -> None:
        """Add the thresholds that were chosen for the weights in the file of `best` to its description."""
        file = read(self.best)
        write(self.best, file.tensors, {**file.info, THRESHOLDS: [*thresholds]})

    def commit(self, progress: Progress) -> None:
        """Set the progress that `save_if_best` returned."""
        vars(self.progress).update(vars(progress))

    def _write(self, name: str, tensors: Mapping[str, Tensor], progress: Progress, more: Any = None) -> None:
        held = gather_tensors(tensors.items(), keep=self.writes)
        if self.writes:
            info = {**self.info, "progress": asdict(progress), **(more or {})}
            write(self.folder / f"{name}.safetensors", held, info)


class EmergencyCheckpoint:
    """Context manager that saves `last` in the state after the newest update if an error or a signal ends its block.

    Of what a checkpoint holds, a step changes only buffers (running means) before its update, so copies of these are
    stored. An error within `mark_update`, such as a non-finite loss, leaves no completed step, and nothing is saved. On
    CUDA the loss may not have been read yet, so `are_finite` returns whether all updates were finite. Nothing is saved
    either if weights are sharded and one rank fails, since its shard is lost.
    """

    def __init__(
        self,
        checkpoints: Checkpointer,
        model: SegmentationModel,
        optimizer: Optimizer,
        average: MovingAverage | None,
        scale: LossScale | None,
        are_finite: Callable[[], bool],
    ) -> None:
        self._checkpoints, self._state, self._are_finite = checkpoints, (model, optimizer, average, scale), are_finite
        parameters = {name for name, _ in model.named_parameters()}
        self._buffers = [buffer for _, buffer in tensors_of(model, trained_names(model) - parameters)]
        self._start = checkpoints.progress.step
        self._copy_buffers()

    @contextmanager
    def mark_update(self) -> Iterator[None]:
        """Mark the block in which weights, optimizer, average and progress change together."""
        self._is_complete = False
        yield
        self._copy_buffers()

    def undo(self) -> None:
        """Revert what a step has changed before its update: gradients and buffers."""
        self._state[1].zero_grad(set_to_none=True)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def __enter__(self) -> "EmergencyCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._save(error)

    def _save(self, error: BaseException) -> None:
        """Save the newest complete step after an error or a first signal."""
        first = isinstance(error, Interrupted) and not error.again
        step = self._checkpoints.progress.step
        if not (first or isinstance(error, Exception)) or not self._is_complete or step == self._start:
            return
        if not self._are_finite():
            return
        if is_shared(self._state[0]) and not first:  # on a signal, all ranks stop at the same step
            logger.error("Training stopped after step %d, which is not saved: a rank failed to write its part.", step)
            return
        # running means are those of the step that failed; the file stands for the last complete one
        self.undo()
        try:
            self._checkpoints.save(*self._state)
        except Exception as second:  # report the first error
            logger.error("Training stopped after step %d, which could not be saved: %s", step, second)
        else:
            if self._checkpoints.writes:
                logger.warning("Training stopped after step %d, and that step is saved.", step)

    def _copy_buffers(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]
        self._is_complete = True


def drop_incomparable_score(
    progress: Progress, before: Mapping[str, Any], now: Mapping[str, Any], metric: str | None = None
) -> Progress:
    """Return the progress of a resumed run, without its best score if another score selects the best one now.

    Args:
        progress: of the run.
        before: description of the checkpoint.
        now: description of the resumed run.
        metric: see `Checkpointer`.
    """
    old, new = _chosen_by(before, now, metric), _chosen_by(now, before, metric)
    if not progress.has_best or old == new:
        return progress
    logger.warning("Checkpoint selection changed to %s from %s; the previous best score is discarded.", new, old)
    return replace(progress, best=None, best_infinite=0, best_step=0, stale=0)


def _chosen_by(info: Mapping[str, Any], other: Mapping[str, Any], metric: str | None) -> str:
    """Return what selects a run's `best`: a score, its settings and its number of images, or the last validation.

    The score counts with `trainer.evaluate=last`, too: early stopping compares it.
    """
    config = info.get("config", {})
    trainer = config.get("trainer", {})
    score, images = resolve_score(config), trainer.get("val_images")
    settings = (config.get("metric") or {}).get(metric or score) or {}
    changed = changed_prediction(info, other, score)
    options = "".join(f" {key}={value}" for key, value in [*changed.items(), *settings.items()])
    chosen = f"{score}{options} of {'all images' if images is None else count_of(images, 'image')}"
    evaluate = resolve_evaluate(trainer.get("evaluate"), config.get("data", {}).get("fold"))
    return f"the last validation ({chosen})" if evaluate == "last" else chosen


def _trained_state(model: SegmentationModel) -> dict[str, Tensor]:
    names = trained_names(model)
    return {name: value for name, value in model.state_dict().items() if name in names}


def _optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name, so that it does not depend on the order of groups."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }
