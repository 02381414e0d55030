"""Comparison of a training with its baseline, a linear probe that is solved in closed form on the same images.

The probe is only a baseline: it does not show which backbone is best to tune (arXiv 2404.12172).
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone, Loss
from dinoseg.core.geometry import widths
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.core.sizes import Size, evenly_spaced
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.data.splits import evenly_spaced_subset
from dinoseg.inference.policy import Policy
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.tasks.probing.probe import Grid, Probe
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.validation import ScoredModel, evaluate
from dinoseg.utils.devices import synchronize
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
BELOW = 0.01  # mIoU; smaller differences are chance with so few images
_MIN_SECONDS = 1.0  # with less time nothing can be solved
_FEW, _MAX = 16, 64  # minimum and maximum number of images per split
_WIDEST = 1024  # features per pixel; with more, only the last feature map is read, since solving is cubic in them
_SOLVED = 3.0  # cost of the probe per image, as a multiple of scoring it: sums, selection, solving and the score
_COLOURS = 3  # number of other normalisations to solve the probe with
_TIMED = 4  # images per split that are timed to estimate the cost of one
_TIMING = 0.1  # maximum share of the time spent on this estimate
_GRID = {"strengths": (1e-3, 1e-2, 1e-1), "balances": (0.0, 0.5), "held_out": 0.2}


@dataclass(frozen=True)
class TrainedRun:
    """A finished training with a class head on images.

    Attributes:
        model: with the weights of the best checkpoint.
        engine: device and ranks.
        data_module: the data.
        backbone: returns the pretrained backbone, frozen.
        loss: returns the training loss.
        optimizer: returns the optimizer of a model.
        is_supervised: whether masks are all that the model is trained with.
        crop: (H, W) of the training images.
        clip: maximum norm of the gradient; None: no limit.
        cache_dir: folder of all caches.
        group: regular expression of the group in a sample's name; None: each sample is its own group.
        best_step: step with the best score.
        steps: number of training steps done.
    """

    model: SegmentationModel
    engine: Engine
    data_module: ImageDataModule
    backbone: Callable[[], Backbone]
    loss: Callable[[], Loss]
    optimizer: Callable[[SegmentationModel], Optimizer]
    is_supervised: bool
    crop: Size
    clip: float | None
    cache_dir: str
    group: str | None
    best_step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class ProbeComparison:
    """A training and its linear-probe baseline, scored on the same images.

    Attributes:
        run: the training.
        plain: the pretrained backbone below an unused head.
        train: images that the probe is solved from.
        val: images that both are scored on.
        scores: of the run on `val`.
        probe: scores of the linear probe on `val`.
        has_time: whether there is time to try other normalisations even if the run beats the probe.
        until: deadline for the search of causes, on the clock of `time.monotonic`.
    """

    run: TrainedRun
    plain: SegmentationModel
    train: SegmentationData
    val: SegmentationData
    scores: Mapping[str, Any]
    probe: Mapping[str, Any]
    has_time: bool = False
    until: float = math.inf

    @property
    def has_ended(self) -> bool:
        """Return whether the time for causes is up, by rank 0's clock."""
        return self.run.engine.run_on_rank0(lambda: time.monotonic() >= self.until)

    @property
    def is_below(self) -> bool:
        """Return whether the run scores below the linear probe."""
        return (self.scores["miou"] or 0.0) < (self.probe["miou"] or 0.0) - BELOW

    @property
    def summary(self) -> str:
        """Return both scores in words."""
        return (
            f"mIoU {self.probe['miou']:.4f}, solved from {count_of(len(self.train), 'training image')}; this run "
            f"{self.scores['miou']:.4f} on the same {count_of(len(self.val), 'validation image')}"
        )


def compare(run: TrainedRun, *, seconds: float) -> ProbeComparison | None:
    """Score a run and its linear-probe baseline; return None if there is too little time.

    None is also returned with sharded weights, with data that are no image files, or if no pixel of the selected images
    is labelled.

    Args:
        run: the training.
        seconds: time limit; it decides the number of images, at most 64 per split.
    """
    engine, data_module = run.engine, run.data_module
    if engine.sharded:
        return None
    seconds = engine.broadcast(seconds)  # rank 0's value, or ranks would decide differently and wait for one another
    if seconds < _MIN_SECONDS:
        return None
    train, val = data_module.train, data_module.val
    if not isinstance(train, PairDataset) or not isinstance(val, PairDataset):
        return None
    began = time.perf_counter()
    plain = _plain(run).to(engine.device).eval()
    scored = _ScoredModel(run.model, data_module.policy), _ScoredModel(plain)
    images, has_time = engine.run_on_rank0(
        lambda: _affordable(*scored, (train, val), engine, seconds - (time.perf_counter() - began))
    )
    if images < min(_FEW, len(train), len(val)):
        logger.debug("no linear-probe baseline: %.1f s are enough for %d images only", seconds, images)
        return None
    few, some = evenly_spaced_subset(train, images), evenly_spaced_subset(val, images)
    if not all(class_counts(each, run.cache_dir).any() for each in (few, some)):
        logger.debug("no linear-probe baseline: no pixel of %d evenly spaced images of a split is labelled", images)
        return None
    scores = evaluate(run.model, some, engine, policy=data_module.policy)
    return ProbeComparison(run, plain, few, some, scores, score_linear_probe(run, plain, few, some), has_time)


def score_linear_probe(
    run: TrainedRun, plain: SegmentationModel, train: SegmentationData, val: SegmentationData
) -> Mapping[str, Any]:
    """Return the scores on `val` of a linear head that is solved in closed form from `train`."""
    dims = widths(plain.backbone.dim, plain.backbone.num_layers)
    places = list(range(len(dims))) if sum(dims) <= _WIDEST else [len(dims) - 1]
    grid = Grid(**_GRID, group=run.group, seed=run.data_module.seed)  # type: ignore[arg-type]
    counts = class_counts(train, run.cache_dir).tolist()
    probe = Probe(plain, train, counts, run.engine, {"baseline": places}, grid)
    probe.fit()
    solutions = probe.choose()
    probe.score(solutions, val)
    return solutions[0].scores


def _plain(run: TrainedRun) -> SegmentationModel:
    backbone = run.backbone()
    head = LinearHead(backbone.dim, backbone.num_layers, len(run.data_module.train.classes))
    return SegmentationModel(backbone, head, scale=run.model.scale, longest=run.model.longest)


def _affordable(
    run: "_ScoredModel", plain: "_ScoredModel", splits: Sequence[SegmentationData], engine: Engine, seconds: float
) -> tuple[int, bool]:
    """Return how many images per split there is time for, and whether that includes other normalisations.

    Images may differ in size, so the estimate averages over several.

    Args:
        run: scores validation images.
        plain: scores images of both splits, as the probe does.
        splits: train and val.
        engine: of the run.
        seconds: time limit for everything.
    """
    began = time.perf_counter()
    train, val = ([(data, index) for index in evenly_spaced(len(data), _TIMED)] for data in splits)
    for way in (run, plain):
        _score(way, val[0], engine)  # the first call takes longer
    of_run, of_plain = list[float](), list[float]()
    for one, other in zip_longest(train[::2] + train[1::2], val[::2] + val[1::2]):
        of_plain += [_score(plain, each, engine) for each in (one, other) if each]
        of_run += [_score(run, other, engine)] if other else []
        if sum(of_run) + sum(of_plain) > _TIMING * seconds:
            break
    left, each = seconds - (time.perf_counter() - began), _SOLVED * mean(of_plain)
    images, fewer = (int(left / (mean(of_run) + times * each)) for times in (1, 1 + _COLOURS))
    return (min(_MAX, fewer), True) if fewer >= _FEW else (min(_MAX, images), False)


class _ScoredModel(NamedTuple):
    """A model and its inference strategy; None: whole images."""

    model: SegmentationModel
    policy: Policy | None = None


def _score(way: _ScoredModel, image: tuple[SegmentationData, int], engine: Engine) -> float:
    """Return the seconds to read and score an image; ranks are not synchronised, since only rank 0 calls this."""
    began = time.perf_counter()
    data, index = image
    scored = ScoredModel(way.model, data, engine, policy=way.policy)
    with torch.no_grad(), scored.in_eval_mode():
        scored.add(Batch.stack([data[index]]).to(engine.device))
    synchronize(engine.device)
    return time.perf_counter() - began
