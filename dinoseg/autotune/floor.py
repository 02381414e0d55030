"""A training held against its floor: the linear head that is solved in closed form, on the same images.

A floor is no more than that: it does not say which backbone is best to tune (arXiv 2404.12172).
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import mean
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from dinoseg.core.geometry import widths
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.core.sizes import evenly_spaced
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.data.splits import keep_evenly_spaced
from dinoseg.experiment import build
from dinoseg.inference.policy import Policy
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import Segmenter
from dinoseg.tasks.images import ImageRegime
from dinoseg.tasks.probing.probe import Grid, Probe
from dinoseg.tasks.regime import Regime
from dinoseg.training.engine import Engine
from dinoseg.training.validation import Scored, evaluate
from dinoseg.utils.devices import synchronize
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
FLOOR = "floor.json"  # in the run folder
BELOW = 0.01  # of mIoU: less is chance among so few images
_LEAST_SECONDS = 1.0  # below which nothing can be solved
_FEW, _MOST = 16, 64  # images of each split
_WIDEST = 1024  # numbers of a pixel; of more the last map alone is read, since solving takes their third power
_SOLVED = 3.0  # times what it takes to score an image by a closed form: sums, choosing, solving, and the score
_COLOURS = 3  # others, with which it is solved as well
_TIMED = 4  # images of each split, by which the time of one is told
_TIMING = 0.1  # of the time at most, or of fewer
_GRID = {"strengths": (1e-3, 1e-2, 1e-1), "balances": (0.0, 0.5), "held_out": 0.2}


@dataclass(frozen=True)
class Held:
    """A trained model, and the closed form on the same images.

    Attributes:
        cfg: the whole config.
        regime: its data.
        engine: device and ranks.
        model: as it was scored best.
        plain: the backbone as it came, below a head that is not used.
        train: images that the closed form is solved from.
        val: images that both are scored on.
        run: scores of the model on `val`.
        floor: of the closed form on `val`.
        has_time: for other colours, too, where the run is not below it.
        best_step: of the steps that were done, the one after which the model was scored so.
        steps: that were done.
        until: time of `time.monotonic` after which no further cause is looked for.
    """

    cfg: DictConfig
    regime: ImageRegime
    engine: Engine
    model: Segmenter
    plain: Segmenter
    train: SegmentationData
    val: SegmentationData
    run: Mapping[str, Any]
    floor: Mapping[str, Any]
    has_time: bool = False
    best_step: int = 0
    steps: int = 0
    until: float = math.inf

    @property
    def has_ended(self) -> bool:
        """Whether the time for causes is spent, by the first rank's clock."""
        return self.engine.decided(lambda: time.monotonic() >= self.until)

    @property
    def is_below(self) -> bool:
        """Whether the run has learnt less than the closed form."""
        return (self.run["miou"] or 0.0) < (self.floor["miou"] or 0.0) - BELOW


def held_against_floor(
    cfg: DictConfig, regime: Regime, engine: Engine, model: Segmenter, *, seconds: float
) -> Held | None:
    """Return a run beside its floor; None where there is no time for it, or no class head on images.

    Args:
        cfg: the whole config.
        regime: of the run.
        engine: of the run.
        model: with the best checkpoint's weights.
        seconds: that it may take: by them it is decided of how many images, at most 64 of each split.
    """
    if not isinstance(regime, ImageRegime) or engine.sharded:  # of clips the ranks have parted by now
        return None
    seconds = engine.share(seconds)  # of the first of several ranks, or one would go on without another
    if seconds < _LEAST_SECONDS:
        return None
    train, val = regime.feed.train, regime.feed.val
    if not isinstance(train, PairDataset) or not isinstance(val, PairDataset):
        return None
    began = time.perf_counter()
    plain = _plain(cfg).to(engine.device).eval()
    ways = _Way(model, regime.feed.policy), _Way(plain)
    images, has_time = engine.decided(
        lambda: _affordable(*ways, (train, val), engine, seconds - (time.perf_counter() - began))
    )
    if images < min(_FEW, len(train), len(val)):
        logger.debug("no floor: in %.1f s there are %d images", seconds, images)
        return None
    few, some = keep_evenly_spaced(train, images), keep_evenly_spaced(val, images)
    if not all(class_counts(each, cfg.cache_dir).any() for each in (few, some)):
        logger.debug("no floor: no pixel of %d evenly spaced images of a split is labelled", images)
        return None
    run = evaluate(model, some, engine, policy=regime.feed.policy)
    return Held(cfg, regime, engine, model, plain, few, some, run, solved(plain, few, some, cfg, engine), has_time)


def solved(
    plain: Segmenter, train: SegmentationData, val: SegmentationData, cfg: DictConfig, engine: Engine
) -> Mapping[str, Any]:
    """Return the scores on `val` of the linear head that is solved from `train`."""
    dims = widths(plain.backbone.dim, plain.backbone.num_layers)
    places = list(range(len(dims))) if sum(dims) <= _WIDEST else [len(dims) - 1]
    grid = Grid(**_GRID, group=cfg.data.group, seed=build.seed_of(cfg))  # type: ignore[arg-type]
    probe = Probe(plain, train, class_counts(train, cfg.cache_dir).tolist(), engine, {"floor": places}, grid)
    probe.fit()
    solutions = probe.choose()
    probe.score(solutions, val)
    return solutions[0].scores


def told(held: Held) -> str:
    """Return both scores in a sentence."""
    return (
        f"mIoU {held.run['miou']:.4f} on {count_of(len(held.val), 'validation image')}, where a linear head that is "
        f"solved from {count_of(len(held.train), 'training image')} has {held.floor['miou']:.4f}"
    )


def _plain(cfg: DictConfig) -> Segmenter:
    backbone = build.backbone(cfg)
    head = LinearHead(backbone.dim, backbone.num_layers, cfg.data.num_classes)
    return Segmenter(backbone, head, scale=cfg.resolution.scale, longest=cfg.resolution.longest)


def _affordable(
    run: "_Way", plain: "_Way", splits: Sequence[SegmentationData], engine: Engine, seconds: float
) -> tuple[int, bool]:
    """Return how many images of each split there is time for, by some of them; and whether for all there is.

    That is to solve the closed form with other colours, too. Images may be of many sizes: the first tells little.

    Args:
        run: scores images of val.
        plain: scores images of both splits, as a closed form does.
        splits: train and val.
        engine: of the run.
        seconds: for all.
    """
    began = time.perf_counter()
    train, val = ([(data, place) for place in evenly_spaced(len(data), _TIMED)] for data in splits)
    for way in (run, plain):
        _score(way, val[0], engine)  # the first takes longer
    of_run, of_plain = list[float](), list[float]()
    for one, other in zip_longest(train[::2] + train[1::2], val[::2] + val[1::2]):
        of_plain += [_score(plain, each, engine) for each in (one, other) if each]
        of_run += [_score(run, other, engine)] if other else []
        if sum(of_run) + sum(of_plain) > _TIMING * seconds:
            break
    left, each = seconds - (time.perf_counter() - began), _SOLVED * mean(of_plain)
    images, fewer = (int(left / (mean(of_run) + times * each)) for times in (1, 1 + _COLOURS))
    return (min(_MOST, fewer), True) if fewer >= _FEW else (min(_MOST, images), False)


class _Way(NamedTuple):
    """A model, and how it is asked; None: of whole images."""

    model: Segmenter
    policy: Policy | None = None


def _score(way: _Way, image: tuple[SegmentationData, int], engine: Engine) -> float:
    """Return the seconds in which an image is read and scored; ranks are not waited for, since one alone asks."""
    began = time.perf_counter()
    data, place = image
    scored = Scored(way.model, data, engine, policy=way.policy)
    with torch.no_grad(), scored.in_eval_mode():
        scored.add(Batch.stack([data[place]]).to(engine.device))
    synchronize(engine.device)
    return time.perf_counter() - began
