"""Diagnosis of runs below their linear-probe baseline: each likely cause is tested on the same images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dinoseg.autotune.floor import BELOW, Held, solved
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.experiment import build, criteria
from dinoseg.inference.windows import Windows
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.models.model import Segmenter, trained_names
from dinoseg.tasks.images import ImageTask
from dinoseg.training.optim import ScheduleState, set_learning_rates, tensors_of
from dinoseg.training.validation import evaluate
from dinoseg.utils.wording import listed, typed

COLOURS = {  # RGB means and standard deviations of published weights
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 throughout": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none at all": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_FAR = 1.25  # ratio of image side to crop side from which the sizes are too different
_STEPS = 8  # from the best checkpoint on, at each learning rate
_FACTORS = (1.0, 0.1, 10.0, 0.01, 100.0)  # of the learning rate; the unchanged one first
_EARLY = 0.5  # share of the steps; if the best score came earlier, more steps did not help
_CLEAR = 0.98  # factor; a loss has to be below this share of another one to count as lower
Cause = Callable[[Held], str | None]


def absent_classes(held: Held) -> str | None:
    """Return a message that names classes absent from the training masks, and their cost; None if there are none."""
    train = held.regime.feed.train
    seen = class_counts(train, held.cfg.cache_dir)
    rows = held.run["classes"]
    gone = [row for row in rows if row["pixels"] and not seen[row["id"]]]
    if not gone:
        return None
    left = [row["iou"] for row in rows if row["iou"] is not None and row not in gone]
    names = listed([str(train.classes[row["id"]]) for row in gone])
    return (
        f"No training mask has a pixel of {names}, which validation images show: their IoU is 0 whatever is learnt, "
        f"and mIoU without them {sum(left) / max(1, len(left)):.4f}. Add images that show them, or leave them out of "
        "data.classes"
    )


def other_colours(held: Held) -> str | None:
    """Solve the linear probe with the normalisations of other published weights; return a message if one is better."""
    backbone = held.plain.backbone
    own = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
    floors = {}
    try:
        for name, (mean, std) in COLOURS.items():
            if max(abs(a - b) for a, b in zip((*mean, *std), (*own[0], *own[1]), strict=True)) > BELOW:
                register_colours(backbone, mean, std)
                backbone.to(held.engine.device)
                scores = solved(held.plain, held.train, held.val, held.cfg, held.engine)
                floors[name] = scores["miou"] or 0.0
    finally:
        register_colours(backbone, *own)
        backbone.to(held.engine.device)
    best = max(floors, key=lambda name: floors[name])
    if floors[best] <= (held.floor["miou"] or 0.0) + 2 * BELOW:
        return None
    means, deviations = map(typed, COLOURS[best])
    return (
        f"With another normalisation, {best}, the closed form has {floors[best]:.4f} in place of "
        f"{held.floor['miou']:.4f}. Either the weights were trained with that, or they see these images better so: "
        f"look up what they were trained with, or try backbone.mean={means} backbone.std={deviations}"
    )


def far_crop(held: Held) -> str | None:
    """Score the model in sliding windows of its training crop; return a message if that is better."""
    crop = [int(side) for side in held.cfg.resolution.crop]
    masks = (held.val[place]["mask"] for place in range(len(held.val)))
    sizes = [held.model.seen_size((mask.shape[0], mask.shape[1])) for mask in masks]
    scale = held.cfg.resolution.scale
    if all(max(a / (scale * b) for a, b in zip(size, crop, strict=True)) < _FAR for size in sizes):
        return None
    scores = evaluate(held.model, held.val, held.engine, policy=Windows(crop))
    if (scores["miou"] or 0.0) <= (held.run["miou"] or 0.0) + BELOW:
        return None
    return (
        f"Asked in windows of its resolution.crop={typed(crop)}, the model has {scores['miou']:.4f} in place of "
        f"{held.run['miou']:.4f}: the images that it is validated on are too far from that size. Give "
        "inference=windows, a crop as large as the images, or resolution.longest"
    )


def learning_rate(held: Held) -> str | None:
    """Test for overfitting, too few steps and a bad learning rate; return a message on the first one found."""
    train = evaluate(held.model, held.train, held.engine, policy=held.regime.feed.policy)
    floor = solved(held.plain, held.train, held.train, held.cfg, held.engine)
    if train["miou"] >= floor["miou"] - BELOW:
        return (
            f"It knows the images that it was trained on ({train['miou']:.4f}, the closed form {floor['miou']:.4f}), "
            "not the others: it is fitted to them. Give fewer trainer.steps, more images, adapter=frozen, or a larger "
            "optim.optimizer.weight_decay"
        )
    if type(held.regime) is not ImageTask:  # other regimes also learn from a teacher
        return None
    before, after = _losses(held)
    best = min(after, key=lambda factor: after[factor])
    best = best if after[best] < _CLEAR * after[1.0] else 1.0
    if after[best] > _CLEAR * before:
        return None
    lower = f"the loss falls from {before:.3g} to {after[best]:.3g} within {_STEPS} more steps"
    if best == 1 and held.best_step < _EARLY * held.steps:
        return (
            f"It was scored best after step {held.best_step} of {held.steps}, and more steps made it worse on the "
            "validation images. Give fewer trainer.steps, more images, or a larger optim.optimizer.weight_decay"
        )
    if best == 1:
        return f"It was still learning: {lower}. Give more trainer.steps"
    way = "higher" if best > 1 else "lower"
    times = f"{max(best, 1 / best):.0f} times {way}"
    return f"At a learning rate {times} {lower}, at its own to {after[1.0]:.3g}: give a {way} one"


CAUSES: Sequence[Cause] = (absent_classes, other_colours, far_crop, learning_rate)


def causes_of(held: Held) -> list[str]:
    """Return the causes found, each as a sentence or two without the last full stop.

    For a run above its baseline, only other normalisations are tested, if there is time: a wrong one lowers the
    baseline as much as the run.
    """
    tried = CAUSES if held.is_below else [other_colours] if held.has_time else []
    return [found for cause in tried if not held.has_ended and (found := cause(held))]


def _losses(held: Held) -> tuple[float, dict[float, float]]:
    """Return the loss on the training images, and the losses after a few steps by factor of the learning rate."""
    model, engine, feed = held.model, held.engine, held.regime.feed
    loss = criteria.loss(held.cfg, held.regime.labelled).to(engine.device)
    batches = list(islice(feed.train_batches(start=0), _STEPS))

    def measured() -> float:
        value = evaluate(model, held.train, engine, policy=feed.policy, loss=loss)["loss"]
        return value if torch.tensor(value).isfinite() else float("inf")

    before, after = measured(), dict[float, float]()
    for factor in _FACTORS:
        if after and held.has_ended:
            break
        with _restored(model):
            _train(held, loss, batches, factor)
            after[factor] = measured()
    return before, after


def _train(held: Held, loss: Any, batches: Sequence[Any], factor: float) -> None:
    optimizer = build.optimizer(held.cfg, held.model)
    set_learning_rates(optimizer, ScheduleState(lambda *_: factor, step=1, steps=1))  # delayed parameters, too
    held.model.train()
    for drawn in batches:
        batch = drawn.to(held.engine.device)
        with held.engine.autocast():
            prediction = held.model(batch.image)
            value, _ = loss(prediction, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(held.model.parameters()), held.cfg.trainer.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    held.model.eval()


@contextmanager
def _restored(model: Segmenter) -> Iterator[None]:
    """Restore the trained weights and the mode of a model after the block."""
    kept: dict[str, Tensor] = {name: value.detach().clone() for name, value in tensors_of(model, trained_names(model))}
    training = model.training
    try:
        yield
    finally:
        model.load_state_dict(kept, strict=False)
        model.train(training)
