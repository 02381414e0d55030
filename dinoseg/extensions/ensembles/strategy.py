"""Inference with several models: each runs by its own strategy; class probabilities are averaged, objects fused."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import upsample
from dinoseg.core.objects import Objects
from dinoseg.core.shapes import FrozenFeatures, Prediction
from dinoseg.core.task import ObjectTask, SemanticTask
from dinoseg.inference.auto import Auto
from dinoseg.inference.objects import ObjectCollector
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.rows import Rows, align
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass, Place
from dinoseg.inference.windows import Whole, Windows
from dinoseg.models.model import SegmentationModel, Size, quantised_names

Group = tuple[int, ...]  # indices of members that run as one model
_KNOWN = (Whole, Windows, Auto)  # strategies that treat each class by itself, so that members can be merged


class StackedTask(SemanticTask):
    """The meaning of scores (B, M K, H, W) that are the probabilities of M members already."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities as given."""
        return logits

    def logits(self, probabilities: Tensor) -> Tensor:
        """Return the probabilities as given."""
        return probabilities


STACKED = StackedTask()


class StackedModel(SegmentationModel):
    """Models of one frozen backbone, which runs once for all of their heads; returns the probabilities of all."""

    def __init__(self, models: Sequence[SegmentationModel]) -> None:
        first = models[0]
        super().__init__(first.backbone, first.head, scale=first.scale, longest=first.longest, task=STACKED)
        self.models = nn.ModuleList(models)
        self.limit = first.longest_of

    def forward(self, images: Tensor | FrozenFeatures, *, reduce: bool = True) -> Prediction:
        """Return a prediction whose scores (B, M K, H, W) are the probabilities of each of the M models in turn."""
        assert isinstance(images, Tensor)
        pixels = self.pixels(images, reduce=reduce)
        sizes = [(each.shape[-2], each.shape[-1]) for each in (images, pixels)]
        features = FrozenFeatures(self.head.forward_frozen(self.backbone, pixels), *sizes)
        return stack([model(features) for model in self.models])


@dataclass
class FusedPrediction(Prediction):
    """Class probabilities of whole images, and the objects of each that several models have found together."""

    outputs: Tensor
    found: Sequence[Objects] = ()

    def objects(self, size: Size | None = None) -> list[Objects]:
        """Return the objects of each image, at the size of the images."""
        return [*self.found]

    def of_images(self, images: slice) -> "FusedPrediction":
        """Return the prediction for some of the images."""
        return replace(self, outputs=self.outputs[images], found=self.found[images])


class AveragedStrategy(InferenceStrategy):
    """Mean of the class probabilities of several members with equal weights, after the strategy of each.

    Instances of members are fused by their task (`ObjectTask.fuse_objects`).

    A frozen backbone that members share is held once, and runs once for all of them.

    Args:
        members: models with their strategies and precisions, in eval mode.
        offload: whether only the model that runs is on the device; the others are in main memory.

    Attributes:
        active: indices of the members that predict; all by default.
        ids: by member, the class ids of the bands of the last images; None: they are not stored.
        found: by member, the objects of the last images, if `ids` are stored and objects are fused.
    """

    def __init__(self, members: Sequence[Predictor], *, offload: bool = False) -> None:
        self.members, self.offload = members, offload
        self.active: Sequence[int] = range(len(members))
        self.ids: dict[int, list[Tensor]] | None = None
        self.found: dict[int, list[Objects]] = {}
        self._owners: list[int] = []  # by member, the first one that has the same backbone
        self._merged: dict[Group, Predictor] = {}
        for number, member in enumerate(members):
            alike = (owner for owner in dict.fromkeys(self._owners) if shares_backbone(members[owner], member))
            self._owners.append(next(alike, number))
            member.model.backbone = members[self._owners[-1]].model.backbone

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield the mean over the members as mixtures.

        The callback `on_pass` gets the passes of a single member, or one with the fused objects of several. `model` and
        `autocast` are those of the members.
        """
        if self.ids is not None:  # also after an attempt that ran out of memory
            self.ids = {}
        if on_pass is not None and len(self.active) > 1:
            prediction = self._fuse(rows, size)
            places = [Place(image, 0, 0) for image in range(rows.count)]
            on_pass(prediction, prediction.outputs, places, prediction.size)
            yield prediction
            return
        if on_pass is not None:
            (number,) = self.active
            member = self.members[number]
            member.model.to(member.device)
            try:
                yield from member.strategy.bands(member.model, rows, member.autocast, size=size, on_pass=on_pass)
            finally:  # also if it runs out of memory
                if self.offload:
                    member.model.to("cpu")
            return
        groups = self.groups_of(rows.size)
        streams = [_probabilities(member, rows, size) for member in groups.values()]
        if self.offload:
            yield self._as_prediction(self._sum_one_at_a_time(groups, streams))
            return
        for bands in align(streams):
            sums = [self._sum(group, band) for group, band in zip(groups, bands, strict=True)]
            yield self._as_prediction(torch.stack(sums).sum(dim=0))

    def reduce_memory(self, model: SegmentationModel, rows: Rows, *, size: Size | None = None) -> bool:
        """Handle an out-of-memory error of any member; return whether a retry would use less memory."""
        members = self.groups_of(rows.size).values()
        return any([member.strategy.reduce_memory(member.model, rows, size=size) for member in members])

    def groups_of(self, size: Size) -> dict[Group, Predictor]:
        """Return the models to run for images of a size (H, W), by the members that each stands for."""
        found: dict[tuple[int, int | None], Group] = {}
        for number in self.active:
            # members that were trained on images of other sizes may reduce a large image to other resolutions
            key = (self._owners[number], self.members[number].model.longest_of(size))
            found[key] = (*found.get(key, ()), number)
        for group in found.values():
            if group not in self._merged:
                self._merged[group] = _merge([self.members[number] for number in group])
        return {group: self._merged[group] for group in found.values()}

    def _sum_one_at_a_time(self, groups: dict[Group, Predictor], streams: Sequence[Iterator[Tensor]]) -> Tensor:
        """Return the summed probabilities (B, K, H, W), with one model at a time on the device."""
        total = torch.zeros(())
        for (group, member), stream in zip(groups.items(), streams, strict=True):
            member.model.to(member.device)
            try:
                sums = [self._sum(group, band) for band in stream]
            finally:  # also if it runs out of memory
                member.model.to("cpu")
            total = total + torch.cat(sums, dim=2)
        return total

    def _fuse(self, rows: Rows, size: Size | None) -> "FusedPrediction":
        """Return the mean of the probabilities and the fused objects of members, which run one after another."""
        found: dict[int, list[Objects]] = {}
        sums = []
        for number in self.active:
            member = self.members[number]
            collector = ObjectCollector(member.model.task, rows.count, size or rows.size)
            member.model.to(member.device)
            try:
                bands = member.strategy.bands(member.model, rows, member.autocast, size=size, on_pass=collector)
                sums.append(torch.cat([self._sum([number], band.probabilities()) for band in bands], dim=2))
            finally:  # also if it runs out of memory
                if self.offload:
                    member.model.to("cpu")
            found[number] = collector.objects()
        mean = self._as_prediction(torch.stack(sums).sum(dim=0))
        assert isinstance(mean.task, ObjectTask)
        if self.ids is not None:
            self.found = found
        fused = [mean.task.fuse_objects(each) for each in zip(*found.values(), strict=True)]
        return FusedPrediction(**vars(mean), found=fused)

    def _sum(self, members: Sequence[int], stacked: Tensor) -> Tensor:
        """Return the sum (B, K, r, W) of the probabilities (B, M K, r, W) of members, and store the ids of each."""
        parts = stacked.unflatten(1, (len(members), -1))
        if self.ids is not None:
            for number, part in zip(members, parts.unbind(1), strict=True):
                self.ids.setdefault(number, []).append(self.members[number].model.task.decide(part))
        return parts.sum(dim=1)

    def _as_prediction(self, total: Tensor) -> Prediction:
        band = total / len(self.active)
        task = self.members[0].model.task
        return Prediction(band, (band.shape[2], band.shape[3]), (1.0, 1.0), upsample, mixture=True, task=task)


class AveragedModel(SegmentationModel):
    """Mean of the class probabilities of several models in one pass over whole images.

    Its backbone, resolution and padding are those of the first member.

    Args:
        strategy: the members; their inference strategies are not used.
    """

    def __init__(self, strategy: AveragedStrategy) -> None:
        first = strategy.members[0].model
        super().__init__(first.backbone, first.head, scale=first.scale, longest=first.longest, task=first.task)
        self.models = nn.ModuleList([member.model for member in strategy.members])
        self._strategy = strategy

    def forward(self, images: Tensor | FrozenFeatures, *, reduce: bool = True) -> Prediction:
        """Return the prediction of the averaged probabilities, as a mixture."""
        assert isinstance(images, Tensor)
        predictions = []
        for member in self._strategy.groups_of((images.shape[-2], images.shape[-1])).values():
            with torch.autocast(member.device.type, enabled=False), member.autocast():
                predictions.append(member.model(images, reduce=reduce))
        stacked = stack(predictions)
        return Prediction(stacked, stacked.size, stacked.valid, self._mean_pixels, mixture=True, task=self.task)

    def _mean_pixels(self, stacked: Prediction, size: Size, valid: tuple[float, float]) -> Tensor:
        return stacked.scores(size).unflatten(1, (len(self.models), -1)).mean(dim=1)


def stack(predictions: Sequence[Prediction]) -> Prediction:
    """Return one prediction with the class probabilities of several, one after another."""
    first = predictions[0]
    return Prediction(predictions, first.size, first.valid, _stacked_pixels, task=STACKED)


def _stacked_pixels(predictions: Sequence[Prediction], size: Size, valid: tuple[float, float]) -> Tensor:
    return torch.cat([prediction.probabilities(size) for prediction in predictions], dim=1)


def _probabilities(member: Predictor, rows: Rows, size: Size | None) -> Iterator[Tensor]:
    """Yield bands (B, M K, r, W) of the probabilities of a member, or of M merged ones."""
    for band in member.strategy.bands(member.model, rows, member.autocast, size=size):
        yield band.probabilities()


def _merge(members: Sequence[Predictor]) -> Predictor:
    """Return one model for members that share a backbone; a single one stays unchanged."""
    first = members[0]
    if len(members) == 1:
        return first
    model = StackedModel([member.model for member in members]).eval()
    # a copy, since a strategy may store what it measures of its model
    return Predictor(model, first.device, first.autocast, copy.deepcopy(first.strategy))


def shares_backbone(first: Predictor, other: Predictor) -> bool:
    """Return whether two members get the same features from equal frozen backbones, and are run in the same way.

    Heads that run the blocks themselves, and strategies that average scores, are never merged.
    """
    if not (_can_share(first) and _can_share(other)) or _describe(first) != _describe(other):
        return False
    tensors, others = (
        [*member.model.backbone.named_parameters(), *member.model.backbone.named_buffers()] for member in (first, other)
    )
    return len(tensors) == len(others) and all(
        name == other_name and value.dtype == other_value.dtype and torch.equal(value, other_value.to(value.device))
        for (name, value), (other_name, other_value) in zip(tensors, others, strict=True)
    )


def _can_share(member: Predictor) -> bool:
    model, strategy = member.model, member.strategy
    return (
        not any(parameter.requires_grad for parameter in model.backbone.parameters())
        and not quantised_names(model)
        and type(model.head).run is Head.run
        and type(strategy) in _KNOWN
        and getattr(strategy, "average", "probabilities") == "probabilities"
    )


def _describe(member: Predictor) -> list[Any]:
    """Return what the features of a member and their averages depend on besides the tensors of the backbone."""
    backbone, kind = member.model.backbone, member.device.type
    with member.autocast():
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    plain = {
        name: value
        for name, value in vars(backbone).items()
        if name != "weights" and isinstance(value, bool | int | float | str | tuple | list | None)
    }
    resolution = (member.model.scale, member.model.longest)
    return [dtype, resolution, type(backbone), repr(backbone), plain, _settings(member.strategy)]


def _settings(strategy: Any) -> Any:
    """Return the type and the public attributes of a strategy; other values as they are."""
    if type(strategy) not in _KNOWN:
        return strategy
    public = {name: _settings(value) for name, value in vars(strategy).items() if not name.startswith("_")}
    return [type(strategy), public]
