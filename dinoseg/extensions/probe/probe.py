"""Closed-form linear probe: solved from sums over one pass, with settings chosen on held-out images.

It is a baseline for training, and can initialise it. It does not rank backbones for fine-tuning: linear separability of
features hardly predicts how well they adapt (arXiv 2404.12172).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from dinoseg.core.geometry import concatenate, lattice, upsample, valid_share
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.data.splits import fraction_split, regex_group
from dinoseg.extensions.probe.sums import LinearMap, Sums, cell_labels, reads, solve
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.report.progress import Bar
from dinoseg.training.engine import Engine
from dinoseg.training.validation import eval_batches
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import NotNegative, OpenShare, Positive

_PIXELS = 4096  # evenly spaced pixels of an image that score the candidates
SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # candidate factors of the logits in a softmax


class Candidates:
    """Linear maps of the same features, each with a confusion matrix of its own.

    Args:
        maps: the candidates.
        ignore_index: label of pixels that are not counted.

    Attributes:
        counts: (candidates, K, K) int64.
        losses: (candidates, sharpness) float64, summed cross-entropy of the scores times each of `SHARPNESS`.
    """

    def __init__(self, maps: Sequence[LinearMap], ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.num_classes = len(maps[0].bias)
        self.weight = torch.cat([each.weight for each in maps]).float()  # (candidates * K, D)
        self.bias = torch.cat([each.bias for each in maps]).float()
        self.counts = torch.zeros(len(maps), self.num_classes, self.num_classes, dtype=torch.int64).to(self.bias.device)
        self.losses = torch.zeros(len(maps), len(SHARPNESS), dtype=torch.float64, device=self.bias.device)

    def add(self, features: Tensor, mask: Tensor, valid: tuple[float, float]) -> None:
        """Count the predictions from maps (B, D, h, w) against masks (B, H, W)."""
        size = (mask.shape[-2], mask.shape[-1])
        places = lattice(size, _PIXELS)
        rows, columns = (
            reads(length, cells, share)[indices].to(self.weight)
            for length, cells, share, indices in zip(size, features.shape[-2:], valid, places, strict=True)
        )
        scores = F.conv2d(features.to(self.weight), self.weight[..., None, None], self.bias)
        chosen = (rows @ scores @ columns.T).unflatten(1, (len(self.counts), -1))  # (B, candidates, K, rows, columns)
        labels = mask[:, places[0], places[1]].long().to(self.weight.device)
        known = labels != self.ignore_index
        labels, chosen = labels[known], chosen.movedim(2, -1).movedim(1, -2)[known]  # (P,), (P, candidates, K)
        first = torch.arange(len(self.counts), device=labels.device) * self.num_classes
        bins = (first + labels[:, None]) * self.num_classes + chosen.max(dim=-1).indices
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)
        for number, factor in enumerate(SHARPNESS):
            sharpened = factor * chosen
            right = sharpened.gather(-1, labels[:, None, None].expand(-1, len(self.counts), 1))[..., 0]
            self.losses[:, number] += (sharpened.logsumexp(dim=-1) - right).double().sum(dim=0)

    def best(self) -> "BestSetting":
        """Return the candidate with the highest mIoU, the first in case of ties."""
        scores = []
        for counts in self.counts:
            matrix = ConfusionMatrix(self.num_classes, self.ignore_index)
            matrix.matrix.copy_(counts)
            scores.append(matrix.compute()["miou"] or 0.0)
        number = max(range(len(scores)), key=scores.__getitem__)
        sharpest = int(self.losses[number].argmin())
        return BestSetting(number, scores[number], SHARPNESS[sharpest])


class BestSetting(NamedTuple):
    """Chosen candidate, with its mIoU and best sharpness."""

    number: int
    miou: float
    sharpness: float  # factor of its logits with the lowest cross-entropy


Readings = Mapping[str, Sequence[int]]  # name to the indices of the maps that are read together


@dataclass(frozen=True)
class Grid:
    """Settings to try, and how many images choose among them.

    Args:
        strengths: strengths of the ridge, on features of unit variance.
        balances: a pixel has weight 1 / (share of its class) ** balance: 0 weighs pixels equally, 1 weighs classes
            equally.
        held_out: share of the training images (of their groups) that choose; the chosen setting is solved on all
            images.
        group: regular expression; images whose names match it equally stay on one side.
        seed: decides which images are held out.
    """

    strengths: Sequence[Positive] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    balances: Sequence[NotNegative] = (0.0, 0.5, 1.0)
    held_out: OpenShare = 0.1
    group: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a grid without points.

        Raises:
            UserError: `strengths` or `balances` is empty.
        """
        for name in ("strengths", "balances"):
            if not getattr(self, name):
                raise UserError(f"{name}=[]: the list is empty. Give at least one number, such as {name}=[0.01].")


@dataclass
class Solution:
    """Solution for the maps that are read together."""

    name: str
    affine: LinearMap
    statistics: tuple[Tensor, Tensor]  # mean and variance of the features, as in BatchNorm
    strength: float
    balance: float
    choice: BestSetting
    scores: dict[str, Any] = field(default_factory=dict)  # from `ConfusionMatrix.compute`, once it is scored

    def start(self, head: Any, *, sharpened: bool = False) -> None:
        """Initialise a linear head with this solution, `sharpened` for a softmax."""
        factor = self.choice.sharpness if sharpened else 1.0
        head.start(factor * self.affine.weight, factor * self.affine.bias, *self.statistics)


class Probe:
    """Linear probe: one pass over training images, the solutions from it, and their scores.

    Args:
        model: a segmenter whose backbone returns the maps; its head is not used.
        data: the training images.
        counts: pixels of each class in it (K,).
        engine: device, precision and ranks.
        readings: names of the sets of maps that are read together.
        grid: of settings.
    """

    def __init__(
        self,
        model: SegmentationModel,
        data: SegmentationData,
        counts: Sequence[int],
        engine: Engine,
        readings: Readings,
        grid: Grid,
    ) -> None:
        self.model, self.data, self.engine, self.readings, self.grid = model.eval(), data, engine, readings, grid
        # MPS has no float64
        self.device = torch.device("cpu") if engine.device.type == "mps" else engine.device
        self.counts = list(counts)
        self.weightings = _weightings(counts, grid.balances).to(self.device)
        self.held_out = held_out(data.names, grid)
        self.rest = sorted({*range(len(data))} - {*self.held_out})
        widths = model.backbone.dim
        dims = [widths] * model.backbone.num_layers if isinstance(widths, int) else widths
        self.sums = {
            name: Sums(sum(dims[index] for index in places), self.weightings) for name, places in readings.items()
        }

    def fit(self) -> None:
        """Sum over the training images that are not held out."""
        images = self.rest or self.held_out
        bar = self._bar("summing up", len(images))
        for batch in self._batches(self.data, images, bar):
            self._add(batch, self._features(batch))
        bar.close()
        self._over_ranks()

    def choose(self) -> list[Solution]:
        """Choose settings on the held-out images, add these to the sums, and solve again."""
        strengths, ignored = self.grid.strengths, self.data.ignore_index
        candidates = {
            name: Candidates([each for way in solve(sums, strengths) for each in way], ignored)
            for name, sums in self.sums.items()
        }
        if self.engine.rank:  # the sums of rank 0 hold all
            for part in self._parts():
                part.zero_()
        for batch in self._batches(self.data, self.held_out, self._bar("choosing", len(self.held_out))):
            features = self._features(batch)
            for name, candidate in candidates.items():
                candidate.add(features[name], batch.mask, self._valid(batch))
            if self.rest:  # a single image is already in the sums
                self._add(batch, features)
        self._over_ranks()
        return [self._solution(name, found) for name, found in candidates.items()]

    def _solution(self, name: str, found: Candidates) -> Solution:
        found.counts, found.losses = self.engine.sum(found.counts), self.engine.sum(found.losses)
        choice = found.best()
        way, index = divmod(choice.number, len(self.grid.strengths))
        strength = self.grid.strengths[index]
        (affine,) = next(islice(solve(self.sums[name], [strength]), way, None))
        return Solution(name, affine, self.sums[name].statistics, strength, self.grid.balances[way], choice)

    def score(self, solutions: Sequence[Solution], data: SegmentationData) -> None:
        """Score solutions by one exact count over a dataset, upsampled like the scores of a linear head."""
        heads = {each.name: self._head(each) for each in solutions}
        counts = {name: ConfusionMatrix(len(data.classes), data.ignore_index) for name in heads}
        for batch in self._batches(data, range(len(data)), self._bar("scoring", len(data))):
            features = self._features(batch)
            size, valid = (batch.mask.shape[-2], batch.mask.shape[-1]), self._valid(batch)
            for name, head in heads.items():
                with torch.no_grad(), self.engine.autocast():
                    grid = head([features[name]])
                ids = upsample(grid, size, valid).max(dim=1).indices
                counts[name].update(ids.to(torch.uint8), batch.mask)
        for each in solutions:
            matrix = counts[each.name]
            matrix.counts = self.engine.sum(matrix.counts.to(self.engine.device))
            each.scores = matrix.compute()

    def _head(self, solution: Solution) -> LinearHead:
        head = LinearHead(len(solution.affine.weight[0]), 1, len(solution.affine.bias))
        solution.start(head)
        return head.to(self.engine.device).eval()

    def _bar(self, what: str, images: int) -> Bar:
        return Bar(desc=what, unit="image", total=images, disable=not self.engine.is_main)

    def _batches(self, data: SegmentationData, indices: Sequence[int], bar: Bar) -> Iterator[Batch]:
        """Yield this rank's share of the images, on the device."""
        engine = self.engine
        size, workers = engine.images_at_once, engine.workers
        part: Any = Subset(data, indices)  # type: ignore[arg-type]
        for batch in eval_batches(
            part, batch_size=size, workers=workers, rank=engine.rank, world_size=engine.world_size
        ):
            yield batch.to(engine.device)
            bar.update(len(batch.names) * engine.world_size)

    @torch.no_grad()
    def _features(self, batch: Batch) -> dict[str, Tensor]:
        """Return the features (B, D, h, w) of a batch for each reading."""
        with self.engine.autocast():
            maps = self.model.backbone(self.model.pixels(batch.image))
        return {name: concatenate([maps[index] for index in places]) for name, places in self.readings.items()}

    def _valid(self, batch: Batch) -> tuple[float, float]:
        size = self.model.input_size((batch.image.shape[-2], batch.image.shape[-1]))
        return valid_share(size, self.model.patch_size)

    def _add(self, batch: Batch, features: Mapping[str, Tensor]) -> None:
        labels = {}  # by grid size: a pyramid has several
        mask, ignored = batch.mask.to(self.device), self.data.ignore_index
        for name, maps in features.items():
            grid = (maps.shape[-2], maps.shape[-1])
            if grid not in labels:
                labels[grid] = cell_labels(mask, self.weightings, ignored, grid, self._valid(batch))
            self.sums[name].add(maps.to(self.device), labels[grid])

    def _over_ranks(self) -> None:
        for part in self._parts():
            part.copy_(self.engine.sum(part))

    def _parts(self) -> Iterator[Tensor]:
        for sums in self.sums.values():
            yield from sums.tensors().values()


def held_out(names: Sequence[str], grid: Grid) -> list[int]:
    """Return the indices of the held-out images: whole groups if there are several; a single image is held out, too."""
    if len(names) == 1:
        return [0]
    of = regex_group(grid.group, "data.group")
    group = of if len({of(name) for name in names}) > 1 else str
    chosen = {*fraction_split(names, val_fraction=grid.held_out, seed=grid.seed, group=group)["val"]}
    return [index for index, name in enumerate(names) if name in chosen]


def _weightings(counts: Sequence[int], balances: Sequence[float]) -> Tensor:
    """Return the weight of each class for each balance (S, K) float64; 0 for an absent class.

    Raises:
        UserError: no pixel is labelled, or a weight overflows.
    """
    share = torch.as_tensor(counts, dtype=torch.float64)
    if share.sum() <= 0:
        raise UserError("No pixel of the training masks is labelled, so there is nothing to solve. Check the masks.")
    share = share / share.sum()
    weights = torch.stack([torch.where(share > 0, share.clamp(min=1e-300) ** -balance, 0.0) for balance in balances])
    if not weights.sum(dim=1).isfinite().all():
        raise UserError(
            f"balances={list(balances)}: the weight of the rarest class overflows. Give 0 (all pixels equal) to 1 (all "
            "classes equal)."
        )
    return weights
