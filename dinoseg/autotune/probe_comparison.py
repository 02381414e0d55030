"""Report of the comparison with the linear-probe baseline, and its file in the run folder."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoseg.autotune.probe_baseline import BELOW, ProbeComparison, TrainedRun, compare, score_linear_probe
from dinoseg.core.contracts import Loss
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.inference.memory import is_shortage, reason_of
from dinoseg.inference.windows import Windows
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.optim import ScheduleState, set_learning_rates, tensors_of
from dinoseg.training.validation import evaluate
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, join_names

logger = logging.getLogger(__name__)
NAME = "floor.json"  # in the run folder
_CAUSES = 3.0  # time limit for the search of causes, as a multiple of the comparison's limit


COLOURS = {  # RGB means and standard deviations of published weights
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 for each channel": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_FAR = 1.25  # ratio of image side to crop side from which the sizes are too different
_STEPS = 8  # from the best checkpoint on, at each learning rate
_FACTORS = (1.0, 0.1, 10.0, 0.01, 100.0)  # of the learning rate; the unchanged one first
_EARLY = 0.5  # share of the steps; if the best score came earlier, more steps did not help
_CLEAR = 0.98  # factor; a loss has to be below this share of another one to count as lower
Cause = Callable[[ProbeComparison], str | None]


def compare_with_linear_probe(run: TrainedRun, out_dir: Path, *, seconds: float) -> dict[str, Any] | None:
    """Compare a run with the linear probe, report scores and causes, and return the content of `floor.json`.

    Args:
        run: the training.
        out_dir: the run folder.
        seconds: time limit of the comparison; no further cause is tested after three times that.
    """
    engine = run.engine
    if engine.is_main:
        (out_dir / NAME).unlink(missing_ok=True)  # outdated, if the run was resumed since
    try:
        comparison = compare(run, seconds=seconds)
        until = time.monotonic() + _CAUSES * seconds
        causes = causes_of(replace(comparison, until=until)) if comparison else []
    except (MemoryError, RuntimeError, UserError) as error:
        if engine.world_size > 1 or not (isinstance(error, UserError) or is_shortage(error)):
            raise  # other ranks would wait
        logger.warning("The run is complete, but its comparison with the linear probe failed: %s", reason_of(error))
        return None
    if comparison is None:
        return None
    found = {
        "run_miou": comparison.scores["miou"],
        "floor_miou": comparison.probe["miou"],
        "train_images": len(comparison.train),
        "val_images": len(comparison.val),
        "below": comparison.is_below,
        "causes": causes,
    }
    if engine.is_main:
        write_json(out_dir / NAME, found)
        print(f"linear probe: {comparison.summary}")
        if comparison.is_below:
            why = "".join(f"\n- {cause}." for cause in causes) or " No likely cause was found."
            logger.warning("This run scores below the linear probe on the same backbone before training.%s", why)
        for cause in () if comparison.is_below else causes:
            logger.warning("%s.", cause)
    return found


def absent_classes(comparison: ProbeComparison) -> str | None:
    """Return a message that names classes absent from the training masks, and their cost; None if there are none."""
    train = comparison.run.data_module.train
    seen = class_counts(train, comparison.run.cache_dir)
    rows = comparison.scores["classes"]
    gone = [row for row in rows if row["pixels"] and not seen[row["id"]]]
    if not gone:
        return None
    left = [row["iou"] for row in rows if row["iou"] is not None and row not in gone]
    names = join_names([str(train.classes[row["id"]]) for row in gone])
    return (
        f"No training mask has a pixel of {names}, but validation masks do: the IoU is 0 (mIoU of the other classes: "
        f"{sum(left) / max(1, len(left)):.4f}). Add training images of {names}, or remove it from data.classes"
    )


def other_colours(comparison: ProbeComparison) -> str | None:
    """Solve the linear probe with the normalisations of other published weights; return a message if one is better."""
    run, plain, current = comparison.run, comparison.plain, comparison.probe["miou"] or 0.0
    backbone = plain.backbone
    statistics = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
    found = {}
    try:
        for name, (mean, std) in COLOURS.items():
            if max(abs(a - b) for a, b in zip((*mean, *std), (*statistics[0], *statistics[1]), strict=True)) > BELOW:
                register_colours(backbone, mean, std)
                backbone.to(run.engine.device)
                scores = score_linear_probe(run, plain, comparison.train, comparison.val)
                found[name] = scores["miou"] or 0.0
    finally:
        register_colours(backbone, *statistics)
        backbone.to(run.engine.device)
    best = max(found, key=lambda name: found[name])
    if found[best] <= current + 2 * BELOW:
        return None
    means, deviations = map(format_override, COLOURS[best])
    return (
        f"The linear probe scores mIoU {found[best]:.4f} with another normalisation ({best}) and {current:.4f} with "
        "that of this run. Check which one the weights were trained with, and set it: "
        f"backbone.mean={means} backbone.std={deviations}"
    )


def far_crop(comparison: ProbeComparison) -> str | None:
    """Score the model in sliding windows of its training crop; return a message if that is better."""
    run, val = comparison.run, comparison.val
    masks = (val[index]["mask"] for index in range(len(val)))
    sizes = [run.model.input_size((mask.shape[0], mask.shape[1])) for mask in masks]
    if all(max(a / (run.model.scale * b) for a, b in zip(size, run.crop, strict=True)) < _FAR for size in sizes):
        return None
    scores = evaluate(run.model, val, run.engine, policy=Windows(run.crop))
    baseline = comparison.scores["miou"] or 0.0
    if (scores["miou"] or 0.0) <= baseline + BELOW:
        return None
    return (
        f"The model scores mIoU {scores['miou']:.4f} in windows of resolution.crop={format_override(list(run.crop))} "
        f"and {baseline:.4f} without: the validation images are too far from the training size. Set inference=windows, "
        "resolution.longest, or a resolution.crop as large as the images"
    )


def learning_rate(comparison: ProbeComparison) -> str | None:
    """Test for overfitting, too few steps and a bad learning rate; return a message on the first one found."""
    run = comparison.run
    train = evaluate(run.model, comparison.train, run.engine, policy=run.data_module.policy)
    probe = score_linear_probe(run, comparison.plain, comparison.train, comparison.train)
    if train["miou"] >= probe["miou"] - BELOW:
        return (
            f"Overfitting: the model scores mIoU {train['miou']:.4f} on its training images (linear probe: "
            f"{probe['miou']:.4f}). Set fewer trainer.steps, adapter=frozen or a larger "
            "optim.optimizer.weight_decay, or add training images"
        )
    if not run.is_supervised:  # the rates would be tried without the teacher
        return None
    before, after = _losses(comparison)
    best = min(after, key=lambda factor: after[factor])
    best = best if after[best] < _CLEAR * after[1.0] else 1.0
    if after[best] > _CLEAR * before:
        return None
    lower = f"the training loss falls from {before:.3g} to {after[best]:.3g} within {_STEPS} more steps"
    if best == 1 and run.best_step < _EARLY * run.steps:
        return (
            f"The best score came after step {run.best_step} of {run.steps}: more steps made it worse on the "
            "validation images. Set fewer trainer.steps or a larger optim.optimizer.weight_decay, or add training "
            "images"
        )
    if best == 1:
        return f"Too few steps: {lower}. Set more trainer.steps"
    is_low = best > 1
    times = f"{max(best, 1 / best):.0f} times {'higher' if is_low else 'lower'}"
    return (
        f"The learning rate is too {'low' if is_low else 'high'}: {lower} at a rate {times}, and to {after[1.0]:.3g} "
        f"at the current one. Set a {'higher' if is_low else 'lower'} optim.optimizer.lr"
    )


CAUSES: Sequence[Cause] = (absent_classes, other_colours, far_crop, learning_rate)


def causes_of(comparison: ProbeComparison) -> list[str]:
    """Return the causes found, each as a sentence or two without the last full stop.

    For a run above its baseline, only other normalisations are tested, if there is time: a wrong one lowers the
    baseline as much as the run.
    """
    tests = CAUSES if comparison.is_below else [other_colours] if comparison.has_time else []
    return [found for test in tests if not comparison.has_ended and (found := test(comparison))]


def _losses(comparison: ProbeComparison) -> tuple[float, dict[float, float]]:
    """Return the loss on the training images, and the losses after a few steps by factor of the learning rate."""
    run = comparison.run
    loss = run.loss().to(run.engine.device)
    batches = list(islice(run.data_module.train_batches(start=0), _STEPS))

    def measured() -> float:
        value = evaluate(run.model, comparison.train, run.engine, policy=run.data_module.policy, loss=loss)["loss"]
        return value if torch.tensor(value).isfinite() else float("inf")

    before, after = measured(), dict[float, float]()
    for factor in _FACTORS:
        if after and comparison.has_ended:
            break
        with _restored(run.model):
            _train(run, loss, batches, factor)
            after[factor] = measured()
    return before, after


def _train(run: TrainedRun, loss: Loss, batches: Sequence[Any], factor: float) -> None:
    optimizer = run.optimizer(run.model)
    set_learning_rates(optimizer, ScheduleState(lambda *_: factor, step=1, steps=1))  # delayed parameters, too
    run.model.train()
    for each in batches:
        batch = each.to(run.engine.device)
        with run.engine.autocast():
            prediction = run.model(batch.image)
            value, _ = loss(prediction, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(run.model.parameters()), run.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.model.eval()


@contextmanager
def _restored(model: SegmentationModel) -> Iterator[None]:
    """Restore the trained weights and the mode of a model after the block."""
    saved: dict[str, Tensor] = {name: value.detach().clone() for name, value in tensors_of(model, trained_names(model))}
    training = model.training
    try:
        yield
    finally:
        model.load_state_dict(saved, strict=False)
        model.train(training)
