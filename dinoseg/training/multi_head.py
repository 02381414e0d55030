"""Several heads that share one pass of a frozen backbone, as an experiment of the training loop."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.shapes import Batch, FeatureBatch, FrozenFeatures, Prediction
from dinoseg.inference.memory import is_shortage
from dinoseg.inference.policy import Autocast, Policy
from dinoseg.inference.whole import Whole
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import Checkpointer, Progress, comparable
from dinoseg.training.data_module import Validation
from dinoseg.training.head_training import DROPPED, HeadTraining
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.loading import frozen_fingerprint
from dinoseg.training.trainer import Experiment
from dinoseg.utils.devices import empty_cache
from dinoseg.utils.errors import UserError


class MultiHead(Head):
    """Heads of one model."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def set_progress(self, step: int, steps: int) -> None:
        """Receive the 0-based step and the length of the training."""
        for head in self.heads:
            head.set_progress(step, steps)  # type: ignore[operator]


class MultiHeadSegmenter(SegmentationModel):
    """Map images (B, 3, H, W) to a list of predictions, one per head, from one pass of the backbone.

    Args:
        backbone: frozen; reads every block that any of the heads reads, in order.
        members: heads in training, which are given their own blocks; heads that run the backbone in a way of their
            own are given images.
    """

    def __init__(self, backbone: Backbone, members: Sequence[HeadTraining]) -> None:
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
            inputs = images if features is None or not member.reads_maps else self.select(features, member)
            with member.drawing():
                predictions.append(member.model(inputs, reduce=reduce) if member.is_active else None)
            if features is not None and versions != [tensor._version for tensor in features.tensors]:
                raise UserError(
                    f"{member.name} modified its input features in place, but the other heads share them. Let it work "
                    "on a copy, or train it separately: head=NAME trainer=supervised."
                )
        return predictions

    def inputs(
        self, members: Sequence[HeadTraining], policy: Policy, autocast: Autocast, batch: Batch
    ) -> Iterator[Batch]:
        """Yield the batch for each of some heads: with features of the images if it predicts them whole."""
        size = (batch.image.shape[-2], batch.image.shape[-1])
        shared = [
            member for member in members if member.reads_maps and policy.is_single_pass(member.model, size, autocast)
        ]
        features = self._features(batch.image, autocast) if shared else None
        for member in members:
            if features is None or member not in shared:
                yield batch
                continue
            yield FeatureBatch(self.select(features, member), batch.mask, batch.names)

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

    def select(self, features: FrozenFeatures, member: HeadTraining) -> FrozenFeatures:
        """Return those features that a head reads."""
        at = [self.backbone.layers.index(layer) for layer in sorted({*member.model.backbone.layers})]
        return replace(features, tensors=[features.tensors[index] for index in at])


@dataclass
class MultiHeadCheckpoints(Checkpointer):
    """Checkpoints of a run of several heads: `last` holds all of them at one step.

    Args:
        members: heads in training; their own checkpoints save `best` only.
    """

    members: Sequence[HeadTraining] = ()

    def restore(self, model: SegmentationModel, *state: Any) -> Progress:
        """Load the training state of all heads; those that had ended stay so."""
        progress = super().restore(model, *state)
        for member in self.members:
            checkpoints = member.checkpoints
            checkpoints.info["frozen"] = frozen_fingerprint(member.model)
            if self.start is not None:
                entry = self.start.info["heads"][member.name]
                checkpoints.progress = comparable(Progress(**entry["progress"]), self.start.info, self.info)
                member.dropped = entry["dropped"]
                # of a fault after the step from which the run resumes
                if member.dropped is None and checkpoints.writes:
                    (checkpoints.folder.parent / DROPPED).unlink(missing_ok=True)
                member.is_active = member.dropped is None and checkpoints.progress.step == progress.step
        return progress

    def save(self, *state: Any) -> None:
        """Save `last`: the state of all heads, their progress, and the part of the config that is their own."""
        whole = self.info["config"]
        self.info["heads"] = {
            member.name: {
                "progress": asdict(member.progress),
                "dropped": member.dropped,
                "config": {key: value for key, value in info["config"].items() if value != whole.get(key)},
                "choices": info["choices"],
                "targets": info["targets"],
            }
            for member in self.members
            for info in [member.checkpoints.info]
        }
        super().save(*state)


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


@dataclass(frozen=True)
class MultiHeadExperiment(Experiment):
    """All parts of a training of several heads.

    Args:
        members: the heads.
    """

    members: Sequence[HeadTraining] = ()

    @cached_property
    def heads(self) -> Sequence[HeadTraining]:
        """Return the heads in training."""
        return self.members

    def validate(self, heads: Sequence[HeadTraining]) -> list[Validation]:
        """Return the scores of some heads from one pass over the data."""
        assert isinstance(self.data, ImageDataModule) and isinstance(self.model, MultiHeadSegmenter)
        scored = [self.data.scored(head.model, head.criterion, self.engine) for head in heads]
        inputs = partial(self.model.inputs, heads, self.data.policy or Whole(), self.engine.autocast)
        return self.data.validate_each(scored, self.engine, inputs=inputs)
