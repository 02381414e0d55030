"""Several heads that share one pass of a frozen backbone, as an experiment of the training loop."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone, Head, Loss
from dinoseg.core.shapes import Batch, FeatureBatch, FrozenFeatures, Prediction
from dinoseg.inference.policy import Autocast, Policy
from dinoseg.inference.whole import Whole
from dinoseg.models.model import Segmenter
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints, Progress, comparable
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Validation
from dinoseg.training.head_training import HeadTraining, NonFiniteLoss
from dinoseg.training.image_feed import ImageFeed
from dinoseg.training.loading import frozen_fingerprint
from dinoseg.training.trainer import Experiment
from dinoseg.training.validation import Draws
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
DROPPED = "dropped.json"  # reason, in the folder of a head that has dropped out


class SharedHead(HeadTraining):
    """One of several heads, which draws random numbers and ends as if it were trained alone.

    Args:
        model: a segmenter whose backbone shares its tensors with those of the other heads.
        criterion: see `HeadTraining`.
        checkpoints: see `HeadTraining`.
        log: see `HeadTraining`.
        name: of the head.
        engine: device and ranks.

    Attributes:
        dropped: why its training was abandoned; None if it was not.
    """

    dropped: str | None = None

    def __init__(
        self, model: Segmenter, criterion: Loss, checkpoints: Checkpoints, log: RunLog, *, name: str, engine: Engine
    ) -> None:
        super().__init__(model, criterion, checkpoints, log, name=name)
        self._engine = engine
        self.start_draws()

    @property
    def reads_maps(self) -> bool:
        """Return whether the head takes feature maps, and does not run the backbone in a way of its own."""
        kind = type(self.model.head)
        return kind.run is Head.run and kind.until is Head.until

    def drop(self, error: NonFiniteLoss) -> None:
        """End its training, and write the reason to `dropped.json` in its run folder."""
        self.is_active, self.dropped = False, str(error)
        logger.warning("%s drops out, and the others go on. %s", self.name, error)
        if self._engine.is_main:
            reason = {"step": self.progress.step, "reason": self.dropped}
            write_json(self.checkpoints.folder.parent / DROPPED, reason)

    def start_draws(self) -> None:
        """Let its random draws of a step start from the current state of the generators."""
        self._draws = Draws(self._engine.device)

    def drawing(self) -> AbstractContextManager:
        """Return a context in which it continues its random draws."""
        return self._draws.going_on()


class MultiHead(Head):
    """Heads of one model."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    @property
    def own_blocks(self) -> Sequence[nn.Module]:
        """Return the copies of blocks of all heads."""
        return [block for head in self.heads for block in head.own_blocks]  # type: ignore[union-attr]

    def set_progress(self, share: float) -> None:
        """Receive the share of the training that is done."""
        for head in self.heads:
            head.set_progress(share)  # type: ignore[operator]


class MultiHeadSegmenter(Segmenter):
    """Map images (B, 3, H, W) to a list of predictions, one per head, from one pass of the backbone.

    Args:
        backbone: frozen; reads every block that any of the heads reads, in order.
        members: heads in training, which are given their own blocks; heads that run the backbone in a way of their
            own are given images.
    """

    def __init__(self, backbone: Backbone, members: Sequence[SharedHead]) -> None:
        first = members[0].model
        heads = MultiHead([member.model.head for member in members])
        super().__init__(backbone, heads, scale=first.scale, longest=first.longest)
        self._members = members

    def forward(  # type: ignore[override]
        self, images: Tensor, *, reduce: bool = True
    ) -> list[Prediction | None]:
        """Return the prediction of each head, and None for heads whose training has ended."""
        features, versions = None, []
        if any(member.is_active and member.reads_maps for member in self._members):
            features = self.frozen(images, reduce=reduce)
            versions = [tensor._version for tensor in features.tensors]
        predictions: list[Prediction | None] = []
        for member in self._members:
            own = images if features is None or not member.reads_maps else self.select(features, member)
            with member.drawing():
                predictions.append(member.model(own, reduce=reduce) if member.is_active else None)
            if features is not None and versions != [tensor._version for tensor in features.tensors]:
                raise UserError(
                    f"{member.name} has changed the features it was given in place, and the other heads are given the "
                    f"same ones. Let it work on a copy, or train it by itself: head=NAME trainer=supervised."
                )
        return predictions

    def inputs(
        self, members: Sequence[SharedHead], policy: Policy, autocast: Autocast, batch: Batch
    ) -> Iterator[Batch]:
        """Yield the batch for each of some heads: with features of the images if it predicts them whole."""
        features, size = None, (batch.image.shape[-2], batch.image.shape[-1])
        for member in members:
            if not member.reads_maps or not policy.sees_whole(member.model, size, autocast):
                yield batch
                continue
            if features is None:
                with autocast():
                    features = self.frozen(batch.image)
            yield FeatureBatch(self.select(features, member), batch.mask, batch.names)

    def select(self, features: FrozenFeatures, member: SharedHead) -> FrozenFeatures:
        """Return those features that a head reads."""
        at = [self.backbone.layers.index(layer) for layer in sorted({*member.model.backbone.layers})]
        return replace(features, tensors=[features.tensors[place] for place in at])


@dataclass
class MultiHeadCheckpoints(Checkpoints):
    """Checkpoints of a run of several heads: `last` holds all of them at one step.

    Args:
        members: heads in training; their own checkpoints save `best` only.
    """

    members: Sequence[SharedHead] = ()

    def restore(self, model: Segmenter, *state: Any) -> Progress:
        """Load the training state of all heads; those that had ended stay so."""
        progress = super().restore(model, *state)
        for member in self.members:
            own = member.checkpoints
            own.info["frozen"] = frozen_fingerprint(member.model)
            if self.start is not None:
                entry = self.start.info["heads"][member.name]
                own.progress = comparable(Progress(**entry["progress"]), self.start.info, self.info)
                member.dropped = entry["dropped"]
                member.is_active = member.dropped is None and own.progress.step == progress.step
        return progress

    def save(self, *state: Any) -> None:
        """Save `last`: the state of all heads, their progress, and the part of the config that is their own."""
        whole = self.info["config"]
        self.info["heads"] = {
            member.name: {
                "progress": asdict(member.progress),
                "dropped": member.dropped,
                "config": {key: value for key, value in own["config"].items() if value != whole.get(key)},
                "choices": own["choices"],
            }
            for member in self.members
            for own in [member.checkpoints.info]
        }
        super().save(*state)


def join_optimizers(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return one optimizer over the parameter groups of all heads, each group with the number of its head."""
    whole = optimizers[0]
    for number, own in enumerate(optimizers):
        for group in own.param_groups:
            group["head"] = number
            group["names"] = [f"head.heads.{number}.{name.removeprefix('head.')}" for name in group["names"]]
            if own is not whole:
                whole.add_param_group(group)
    return whole


@dataclass(frozen=True)
class MultiHeadExperiment(Experiment):
    """All parts of a training of several heads.

    Args:
        members: the heads.
    """

    members: Sequence[SharedHead] = ()

    @cached_property
    def heads(self) -> Sequence[HeadTraining]:
        """Return the heads in training."""
        return self.members

    def validate(self, heads: Sequence[HeadTraining]) -> list[Validation]:
        """Return the scores of some heads from one pass over the data."""
        assert isinstance(self.data, ImageFeed) and isinstance(self.model, MultiHeadSegmenter)
        scored = [self.data.scored(head.model, head.criterion, self.engine) for head in heads]
        members = [member for member in self.members if member in heads]
        inputs = partial(self.model.inputs, members, self.data.policy or Whole(), self.engine.autocast)
        return self.data.validate_each(scored, self.engine, inputs=inputs)
