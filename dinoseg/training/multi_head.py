"""Several heads on one frozen backbone as one model with one loss, for the same training loop as a single head.

A head whose loss or gradient is not finite leaves: its gradients are zero from then on, and it is no longer scored.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone, Head, Loss
from dinoseg.core.metric import FINITE_MEAN, INFINITE_IMAGES, split_infinite
from dinoseg.core.shapes import Batch, FrozenFeatures, Prediction
from dinoseg.inference.memory import is_shortage
from dinoseg.inference.policy import Autocast, Policy
from dinoseg.inference.whole import Whole
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import Checkpointer, comparable
from dinoseg.training.data_module import Validation
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.loading import frozen_fingerprint
from dinoseg.training.optim import clip_norm
from dinoseg.training.progress import Progress
from dinoseg.training.step import NonFiniteLoss
from dinoseg.utils.devices import empty_cache
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class MultiPrediction:
    """Predictions of several heads.

    Attributes:
        heads: prediction of each head, by name.
        active: whether each head is still trained, (N,) bool.
    """

    heads: dict[str, Prediction]
    active: Tensor


class MultiHead(Head):
    """Heads of one model.

    Attributes:
        left_at: step at which each head has left, (N,); -1: it is still trained. A buffer, so that no step waits for
            the device, and checkpoints hold it.
    """

    left_at: Tensor

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.min_batch_size = max(head.min_batch_size for head in heads)
        self.register_buffer("left_at", torch.full((len(heads),), -1))
        self._step = 0

    @property
    def active(self) -> Tensor:
        """Return whether each head is still trained, (N,) bool."""
        return self.left_at < 0

    def remove(self, lost: Tensor) -> None:
        """Record that some heads, (N,) bool, leave at the current step, unless they have left before."""
        self.left_at.masked_fill_(self.active & lost, self._step)  # in place: other parts hold the tensor

    def set_progress(self, step: int, steps: int) -> None:
        """Receive the 0-based step and the length of the training."""
        self._step = step
        for head in self.heads:
            head.set_progress(step, steps)  # type: ignore[operator]


class MultiHeadSegmenter(SegmentationModel):
    """Map images (B, 3, H, W) to a prediction per head, from one pass of the backbone.

    Args:
        backbone: frozen; reads every block that any of the heads reads, in order.
        models: stand-alone model of each head, by name, which shares the backbone's tensors. Heads that run the
            backbone in a way of their own are given images, all others the features of their own blocks.
    """

    head: MultiHead

    def __init__(self, backbone: Backbone, models: Mapping[str, SegmentationModel]) -> None:
        first = next(iter(models.values()))
        heads = MultiHead([model.head for model in models.values()])
        super().__init__(backbone, heads, scale=first.scale, longest=first.longest)
        self.models = dict(models)  # in a dict: registered as modules, their tensors would be saved twice

    def forward(self, images: Tensor, *, reduce: bool = True) -> MultiPrediction:  # type: ignore[override]
        """Return the prediction of each head."""
        features, versions = None, []
        if any(map(reads_maps, self.models.values())):
            features = self.frozen(images, reduce=reduce)
            versions = [tensor._version for tensor in features.tensors]
        predictions = {}
        for name, model in self.models.items():
            inputs = images if features is None or not reads_maps(model) else self.select(features, model)
            predictions[name] = model(inputs, reduce=reduce)
            if features is not None and versions != [tensor._version for tensor in features.tensors]:
                raise UserError(
                    f"{name} modified its input features in place, but the other heads share them. Let it work on a "
                    "copy, or train it separately: head=NAME trainer=supervised."
                )
        return MultiPrediction(predictions, self.head.active)

    def left_heads(self) -> dict[str, int]:
        """Return the heads that have left, by name, with their steps."""
        steps = self.head.left_at.tolist()
        return {name: step for name, step in zip(self.models, steps, strict=True) if step >= 0}

    def inputs(
        self, models: Sequence[SegmentationModel], policy: Policy, autocast: Autocast, batch: Batch
    ) -> Iterator[Batch]:
        """Yield the batch for each of some models: with features of the images if it predicts them whole."""
        size = (batch.image.shape[-2], batch.image.shape[-1])
        shared = [reads_maps(model) and policy.is_single_pass(model, size, autocast) for model in models]
        features = self._features(batch.image, autocast) if any(shared) else None
        for model, shares in zip(models, shared, strict=True):
            if features is None or not shares:
                yield batch
            else:
                yield batch.with_features(self.select(features, model))

    def _features(self, images: Tensor, autocast: Autocast) -> FrozenFeatures | None:
        """Return the features of images; None if memory does not suffice, where heads may cut windows instead."""
        try:
            with autocast():
                return self.frozen(images)
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
        empty_cache(images.device)
        return None

    def select(self, features: FrozenFeatures, model: SegmentationModel) -> FrozenFeatures:
        """Return those features that the head of a model reads."""
        at = [self.backbone.layers.index(layer) for layer in sorted({*model.backbone.layers})]
        return replace(features, tensors=[features.tensors[index] for index in at])


def reads_maps(model: SegmentationModel) -> bool:
    """Return whether the head of a model takes feature maps, and does not run the backbone in a way of its own."""
    kind = type(model.head)
    return kind.run is Head.run and kind.forward_frozen is Head.forward_frozen


class MultiHeadLoss(Loss):
    """Sum of one loss over all heads that are still trained.

    A loss that is not finite counts as 0, and its gradients are NaN, by which `HeadClipping` notices it on every rank.

    Args:
        loss: of each head.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.sums_over_batch, self.num_divisors, self.divisor = loss.sums_over_batch, loss.num_divisors, loss.divisor

    def forward(self, prediction: MultiPrediction, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """Return the sum, and `NAME/loss` and the other parts of each head; NaN for heads that have left."""
        found = {name: self.loss(each, batch) for name, each in prediction.heads.items()}
        value, counted = add_finite([value for value, _ in found.values()], prediction.active)
        named = name_parts(found, prediction.active)
        weights = [parts["weight"] for _, parts in found.values() if "weight" in parts]
        if weights:  # equal, as the labels are, except that of a head whose scores are not finite
            named["weight"] = torch.where(counted | ~counted.any(), torch.stack(weights), 0.0).max()
        return value, named

    def divisors(self, batch: Any) -> Tensor:
        """Return what a batch's labels add to the divisors (D,)."""
        return self.loss.divisors(batch)

    def step_loss(  # type: ignore[override]
        self, prediction: MultiPrediction, batch: Any, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's part of the step's loss, the loss of the batch alone, and its parts by name."""
        found = {name: self.loss.step_loss(each, batch, divisors) for name, each in prediction.heads.items()}
        total, _ = add_finite([part for part, _, _ in found.values()], prediction.active)
        value, _ = add_finite([value for _, value, _ in found.values()], prediction.active)
        return total, value, name_parts({name: each[1:] for name, each in found.items()}, prediction.active)


def add_finite(values: Sequence[Tensor], active: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the finite losses of active heads, NaN if there are none, and which these are, (N,) bool."""
    losses = torch.stack(list(values))
    counted = losses.isfinite() & active
    if losses.requires_grad:
        losses.register_hook(lambda gradient: gradient.masked_fill(~counted, torch.nan))
    total = torch.where(counted, losses, 0.0).sum()
    return torch.where(counted.any(), total, torch.nan), counted


def name_parts(found: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]], active: Tensor) -> dict[str, Tensor]:
    """Return the loss and its parts of each head as `NAME/loss` and `NAME/PART`; NaN for heads that are not active."""
    named: dict[str, Tensor] = {}
    for (name, (value, parts)), stays in zip(found.items(), active, strict=True):
        each = {"loss": value, **{key: part for key, part in parts.items() if key != "weight"}}
        named |= {f"{name}/{key}": torch.where(stays, part.detach(), torch.nan) for key, part in each.items()}
    return named


class HeadClipping:
    """Clip the gradients of each head by themselves; a head whose norm is not finite leaves.

    Args:
        head: of the model.
        max_norm: maximum gradient norm of a head, or None.
    """

    def __init__(self, head: MultiHead, max_norm: float | None) -> None:
        self._head, self._max_norm = head, max_norm

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer) -> Tensor:
        """Clip, and return the norm () over all heads that are still trained; NaN if none is."""
        heads: list[list[Tensor]] = [[] for _ in self._head.heads]
        for group in optimizer.param_groups:
            heads[group["head"]] += group["params"]
        norms = torch.stack([clip_norm(parameters, self._max_norm) for parameters in heads])
        self._head.remove(~norms.isfinite().to(self._head.left_at.device))
        active = self._head.active.to(norms.device)
        for parameters, stays in zip(heads, active, strict=True):
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = torch.where(stays, parameter.grad, 0.0)
        norm = torch.where(active, norms, 0.0).square().sum().sqrt()
        return torch.where(active.any(), norm, torch.nan)


def join_optimizers(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return one optimizer over the parameter groups of all heads, each group with the number of its head."""
    whole = optimizers[0]
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            group["head"] = number
            group["names"] = [f"head.heads.{number}.{name.removeprefix('head.')}" for name in group["names"]]
            if optimizer is not whole:
                whole.add_param_group(group)
    return whole


@dataclass
class MultiHeadDataModule(ImageDataModule):
    """Batches of images and masks, and validation of several heads in one pass."""

    reported: set[str] = field(init=False, default_factory=set)  # heads that have left

    def tally(self, engine: Engine) -> None:  # type: ignore[override]
        """Return None: training scores are not counted for each head."""

    def validate(self, model: SegmentationModel, loss: Loss, engine: Engine) -> Validation:
        """Return `NAME/miou` and the other scores of each head that is still trained, and as `miou` the best of them.

        Heads that have left are reported once.

        Raises:
            NonFiniteLoss: all heads have left.
        """
        assert isinstance(model, MultiHeadSegmenter) and isinstance(loss, MultiHeadLoss)
        self._report_left(model)
        left = model.left_heads()
        models = {name: each for name, each in model.models.items() if name not in left}
        if not models:
            raise NonFiniteLoss("All heads have left the training, see above. Set a lower optim.optimizer.lr.")
        inputs = partial(model.inputs, [*models.values()], self.policy or Whole(), engine.autocast)
        scored = [self.wrap_for_validation(each, loss.loss, engine) for each in models.values()]
        found = dict(zip(models, self.validate_each(scored, engine, inputs=inputs), strict=True))
        scores = {f"{name}/{key}": score for name, each in found.items() for key, score in each.scores.items()}
        pictures = {f"{name}/{sample}": rgb for name, each in found.items() for sample, rgb in each.pictures.items()}
        for key in self.score_names:
            # `KEY_infinite_images` and `KEY_finite_mean` are those of the same head, set with `KEY`
            if key not in scores:
                best = best_of([each.scores for each in found.values()], key, lowest=key in self.lowest)
                keys = (key, f"{key}{INFINITE_IMAGES}", f"{key}{FINITE_MEAN}")
                scores |= {name: best[name] for name in keys if name in best}
        return Validation(scores, pictures)

    def _report_left(self, model: MultiHeadSegmenter) -> None:
        for name, step in model.left_heads().items():
            if name not in self.reported:
                logger.warning("%s: %s. The other heads continue.", name, leaving_note(step))
                self.reported.add(name)


def leaving_note(step: int) -> str:
    """Return a text that states why a head has left and at which step: given from 0, stated from 1 as in log rows."""
    return f"left the training at step {step + 1}, where its loss or gradient was not finite"


def best_of(heads: Sequence[Mapping[str, Any]], name: str, *, lowest: bool) -> Mapping[str, Any]:
    """Return the scores of the head that is best by one of them; NaN is worse than numbers, and None than NaN."""

    def rank(scores: Mapping[str, Any]) -> tuple[float, ...]:
        infinite, value = split_infinite(scores, name)
        finite = value if value is not None and math.isfinite(value) else None
        return *Progress(best=finite, best_infinite=infinite).rank(lowest=lowest), value is None

    return min(heads, key=rank)


@dataclass
class MultiHeadCheckpointer(Checkpointer):
    """Checkpoints of a run of several heads: `last` holds all of them, and each head has a `best` of its own.

    Args:
        heads: checkpoints of each head, by name; `best` is the stand-alone model of the head.
    """

    heads: Mapping[str, Checkpointer] = field(default_factory=dict)

    def restore(self, model: SegmentationModel, *state: Any) -> Progress:
        """Load the training state of all heads, and their best scores."""
        progress = super().restore(model, *state)
        assert isinstance(model, MultiHeadSegmenter)
        for name, head in self.heads.items():
            head.info["frozen"] = frozen_fingerprint(model.models[name])
            if self.start is not None:
                saved = Progress(**self.start.info["heads"][name]["progress"])
                head.progress = comparable(saved, self.start.info, self.info, self.metric)
        return progress

    def save(self, model: SegmentationModel, *state: Any) -> None:
        """Save `last`: the state of all heads, their progress, and the part of the config that is their own."""
        whole = self.info["config"]
        self.info["heads"] = {
            name: {
                "progress": asdict(head.progress),
                "config": {key: value for key, value in head.info["config"].items() if value != whole.get(key)},
                "choices": head.info["choices"],
                "targets": head.info["targets"],
            }
            for name, head in self.heads.items()
        }
        super().save(model, *state)

    def save_if_best(
        self, model: SegmentationModel, scores: Mapping[str, Any], name: str = "miou", *, lowest: bool = False, **_: Any
    ) -> Progress:
        """Save `best` of each head whose `HEAD/NAME` beats all its previous ones; return the progress of the run."""
        assert isinstance(model, MultiHeadSegmenter)
        for head, checkpoints in self.heads.items():
            own = {key.removeprefix(f"{head}/"): score for key, score in scores.items() if key.startswith(f"{head}/")}
            infinite, score = split_infinite(own, name) if own else (0, None)  # without scores, it has left
            if infinite if score is None else math.isfinite(score):
                checkpoints.progress.step = self.progress.step
                checkpoints.commit(checkpoints.save_if_best(model.models[head], own, name, lowest=lowest))
        infinite, score = split_infinite(scores, name)
        return self.progress.after_validation(score, infinite, lowest=lowest)
