"""Whether what the frozen part of a model gives is kept, and where: asked once before training, and told."""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dinoseg.core.contracts import Head, Loss
from dinoseg.core.shapes import Batch, FeatureBatch
from dinoseg.core.sizes import Size
from dinoseg.inference.memory import free_bytes
from dinoseg.models.model import Segmenter, frozen_tensors
from dinoseg.training.engine import CACHES, Engine
from dinoseg.training.feature_cache.cache import FeatureCache
from dinoseg.training.feature_cache.form import KEY_LENGTH, TYPES, Stored, described, size_of
from dinoseg.training.feature_cache.key import code_hash, hash_of, origin, weights_hash
from dinoseg.training.feature_cache.store import DiskStore, FeatureStore, MemoryStore, NoStore, cap_of
from dinoseg.training.image_feed import ImageFeed
from dinoseg.utils.devices import synchronize
from dinoseg.utils.disk_speed import seconds_on_disk
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import NotNegative, Positive
from dinoseg.utils.wording import count_of, in_bytes

T = TypeVar("T")
_BACKWARD = 2  # times as long as the forward pass


class Cost(NamedTuple):
    """Seconds and bytes of one view of an image."""

    frozen: float  # seconds of the frozen part
    rest: float  # of a step without it
    write: float
    read: float
    bytes: int
    pixels: int  # that the backbone saw
    shapes: str = ""  # of its features, see `described`
    size: Size = (0, 0)  # (H, W) of the view

    def gain(self, epochs: float, views: int, *, disk: bool) -> float:
        """Return how many times faster so many epochs train with features that are kept."""
        if disk and math.isinf(self.write):
            return 0.0
        computed = min(epochs, views)
        write, read = (self.write, self.read) if disk else (0.0, 0.0)
        kept = computed * (self.frozen + write) + (epochs - computed) * read
        return epochs * (self.frozen + self.rest) / (kept + epochs * self.rest)


def measured(feed: ImageFeed, model: Segmenter, loss: Loss, engine: Engine, root: Path, stored: Stored) -> Cost:
    """Return what the first view of the first image costs; the model stays as it is.

    Args:
        feed: whose image that is.
        model: on its device.
        loss: of a step.
        engine: device and precision.
        root: the folder where features are kept.
        stored: the type that they are kept in.

    Raises:
        UserError: the model cannot be cut, or its features cannot be kept.
    """
    training = model.training
    batch = Batch.stack([feed.drawn.read(0, 0)]).to(engine.device)
    try:
        with torch.no_grad(), engine.autocast():
            model.train()  # which a head may give more in; what is frozen stays in eval mode
            frozen, seconds = _timed(lambda: model.frozen(batch.image), engine)
            model.eval()  # no running means change
            given = FeatureBatch(frozen, batch.mask, batch.names)
            _, rest = _timed(lambda: loss(model(frozen), given), engine)
    finally:
        model.train(training)
    rows = [part[0] for part in frozen.tensors]
    write, read = _disk_seconds(root, stored, rows)
    pixels, shapes = math.prod(frozen.seen), described(rows)
    return Cost(seconds, (1 + _BACKWARD) * rest, write, read, size_of(rows, stored), pixels, shapes, frozen.size)


def _timed(work: Callable[[], T], engine: Engine) -> tuple[T, float]:
    """Return what `work` gives, and the seconds of the quicker of two calls."""
    least = math.inf
    for _ in range(2):
        start = time.perf_counter()
        result = work()
        synchronize(engine.device)
        least = min(least, time.perf_counter() - start)
    return result, least


def _disk_seconds(root: Path, stored: Stored, rows: list[Tensor]) -> tuple[float, float]:
    """Return the seconds that the features of an image take to be written, and to be read from the disk itself."""
    store, key = DiskStore(root, f"measured-{os.getpid()}", stored), "0" * KEY_LENGTH
    try:
        return seconds_on_disk(store.path(key), partial(store.put, key, rows), partial(store.get, key))
    except OSError:  # the folder or the file could not be made
        return math.inf, math.inf
    finally:
        shutil.rmtree(store.folder, ignore_errors=True)


logger = logging.getLogger(__name__)

_FOLDER = "features"
_LEAST_GAIN = 1.2  # times faster, below which estimates of seconds decide nothing
_OF_MEMORY = 0.5  # share of what is free


@dataclass(frozen=True)
class Plan:
    """What is to be decided on.

    Args:
        cache_dir: where features are kept.
        epochs: of the whole training.
        drawing: settings that decide, beside its draw, how a view of an image is made.
        parts: settings that features depend on beside weights and code, by what a user calls them; those of `head`
            count where features are of its own making.
        noise: see `FeatureCache`.
        dtype: the type that features are kept in.
        gib: GiB that are kept at most; None: what leaves 1 GiB of the disk, or half of the free memory.
        before: what a run that goes on has chosen, which `auto` chooses again: off, disk or memory; None: unknown.

    Raises:
        UserError: another type.
    """

    cache_dir: Path
    epochs: float
    drawing: str
    parts: Mapping[str, str]
    noise: NotNegative = 0.0
    dtype: Stored = "float16"
    gib: Positive | None = None
    before: str | None = None

    def __post_init__(self) -> None:
        """Refuse another type."""
        if self.dtype not in TYPES:
            raise UserError(f"features.dtype={self.dtype} is unknown. Choose one of {', '.join(TYPES)}, or auto.")


def stored_as(asked: Any, before: Mapping[str, str | None]) -> Any:
    """Return the type that `features.dtype` asks for: `auto` is that of a run that goes on, or float16.

    One that has kept none goes on in float32, which gives the same numbers.
    """
    if asked != "auto":
        return asked
    return before.get("features.dtype") or ("float32" if before.get("engine.cache") == "off" else "float16")


class _Live(UserError):
    """Why no features can be kept, or why that does not pay."""


def feature_cache(feed: ImageFeed, model: Segmenter, loss: Loss, engine: Engine, plan: Plan) -> FeatureCache | None:
    """Return where features of a training are kept, as `engine.cache` says; None: it is trained on images.

    Raises:
        UserError: they are to be kept and cannot be, or are to be changed by noise and are not to be had apart.
    """
    wanted = plan.before if engine.cache == "auto" and plan.before in CACHES else engine.cache
    chosen, reason = None, "This run was begun without: name disk or memory for another choice."
    if wanted != "off":
        chosen, reason = engine.decided(lambda: _chosen_or_why_not(wanted, feed, model, loss, engine, plan))
    if chosen is None:
        if engine.cache in ("disk", "memory"):
            raise UserError(f"engine.cache={engine.cache}: {reason}")
        if engine.cache == "auto" and engine.is_main:
            logger.info("engine.cache=auto: no features are kept. %s", reason)
        if not plan.noise:
            return None
        if feed.class_mix:
            raise UserError(
                f"data.feature_noise={plan.noise} with data.class_mix={feed.class_mix}: noise is added to features of "
                "an image as it is drawn, without classes of another. Set one of them to 0."
            )
        _check_cut(feed, model, engine, plan.noise)
        return FeatureCache(model, engine.autocast, NoStore, plan.drawing, feed.views, plan.noise)
    place, cost = chosen
    opened = partial(_opened, place == "memory", feed, model, engine, plan)
    shapes = {(cost.size, True): cost.shapes} if cost.shapes else {}
    return FeatureCache(model, engine.autocast, opened, plan.drawing, feed.views, plan.noise, place, shapes)


def _check_cut(feed: ImageFeed, model: Segmenter, engine: Engine, noise: float) -> None:
    """Refuse noise where what is frozen cannot be had apart."""
    sample = feed.val[0]["image"][None].to(engine.device)
    try:
        if not engine.sharded:
            with engine.autocast():
                model.frozen(sample)
            return
    except UserError:  # whose remedy is that of a cache
        pass
    raise UserError(
        f"data.feature_noise={noise} is added to what the frozen part of a model gives, and of this one that cannot be "
        "had apart. Choose adapter=frozen or adapter=last_blocks with a head that reads maps, such as head=linear, "
        "engine.sharding=none, or data.feature_noise=0."
    )


def _chosen_or_why_not(wanted: str, *parts: Any) -> tuple[tuple[str, Cost] | None, str]:
    """Return what `_chosen` does; or None, and the reason."""
    try:
        return _chosen(wanted, *parts), ""
    except _Live as error:
        return None, str(error)


def _chosen(wanted: str, feed: ImageFeed, model: Segmenter, loss: Loss, engine: Engine, plan: Plan) -> tuple[str, Cost]:
    """Return `disk` or `memory`, whichever is `wanted`, and what an image costs; tell what is to be kept there.

    Raises:
        _Live: neither is possible, or `auto` finds that neither pays.
    """
    forced = wanted if wanted in ("disk", "memory") else None
    if feed.views is None:
        raise _Live(
            "Each epoch draws new views of the images, so that no features come twice. data.views=4 draws each image "
            "in 4 views, again and again."
        )
    if feed.class_mix:
        raise _Live(
            f"With data.class_mix={feed.class_mix} classes are pasted on images anew in each epoch, so that no "
            "features come twice, and features cannot be pasted. Set data.class_mix=0."
        )
    if engine.sharded:
        raise _Live("The weights are shared out over the ranks (engine.sharding=fsdp).")
    logger.info("engine.cache=%s: timing steps with and without cached features ...", engine.cache)
    try:
        cost = measured(feed, model, loss, engine, _root(plan), plan.dtype)
    except UserError as error:  # it cannot be cut
        raise _Live(str(error)) from None
    count = len(feed.train) * min(feed.views, math.ceil(plan.epochs))
    size = cost.bytes * count + _val_bytes(feed, model, cost)
    rooms = {"disk": _disk_room(plan), "memory": _memory_room(plan, engine)}
    gains = {kind: cost.gain(plan.epochs, feed.views, disk=kind == "disk") for kind in rooms}
    paying = [kind for kind in rooms if size <= rooms[kind] and gains[kind] >= _LEAST_GAIN]
    read = f"{cost.read:.2g} s to read back, " if math.isfinite(cost.read) else ""  # else no file could be written
    facts = (
        f"The features of {count_of(len(feed.train), 'image')} in {count_of(feed.views, 'view')} and of "
        f"{count_of(len(feed.val), 'validation image')} take about {in_bytes(size)} as {plan.dtype}; an "
        f"image takes {cost.frozen:.2g} s to compute, {read}and the rest of its step {cost.rest:.2g} s"
    )
    if not (forced or paying):
        raise _Live(f"{facts}. {_why_not(plan, feed.views, size, rooms, gains)}")
    kind = forced or paying[0]
    logger.info(
        "engine.cache=%s: features are kept %s%s. %s: estimated %.1f times as fast over %.1f epochs.",
        engine.cache,
        f"in {_root(plan)}" if kind == "disk" else "in memory",
        ", as this run was begun" if wanted != engine.cache else "",
        facts,
        gains[kind],
        plan.epochs,
    )
    if size > rooms[kind]:
        logger.warning("There is room for %s: what does not fit is computed in each epoch.", in_bytes(rooms[kind]))
    return kind, cost


def _why_not(plan: Plan, views: int, size: int, rooms: Mapping[str, int], gains: Mapping[str, float]) -> str:
    if plan.epochs <= views:
        return (
            f"{plan.epochs:.1f} epochs of data.views={views} draw hardly a view twice. Give fewer views, or "
            "engine.cache=disk where another run uses the same."
        )
    if max(gains.values()) < _LEAST_GAIN:
        return f"Training would be {max(gains.values()):.2f} times as fast, which does not pay."
    if size > max(rooms.values()):
        room = " and ".join(
            f"{in_bytes(there)} in {'memory' if kind == 'memory' else 'files'}" for kind, there in rooms.items()
        )
        return f"There is room for {room}. Make room, give fewer data.views, features.dtype=int8, or another cache_dir."
    return f"This disk is too slow: training would be {gains['disk']:.2f} times as fast; and they do not fit in memory."


def _val_bytes(feed: ImageFeed, model: Segmenter, cost: Cost) -> int:
    """Return about how many bytes features of the validation images take, if they are as large as the first."""
    height, width = feed.val[0]["mask"].shape
    return round(cost.bytes * math.prod(model.seen_size((height, width))) / cost.pixels) * len(feed.val)


def _root(plan: Plan) -> Path:
    return plan.cache_dir / _FOLDER


def _disk_room(plan: Plan) -> int:
    return DiskStore(_root(plan), "", plan.dtype, cap_of(plan.gib)).room()


def _memory_room(plan: Plan, engine: Engine) -> int:
    room = int(free_bytes(torch.device("cpu")) * _OF_MEMORY / engine.world)
    cap = cap_of(plan.gib)
    return room if cap is None else min(room, cap)


def _opened(memory: bool, feed: ImageFeed, model: Segmenter, engine: Engine, plan: Plan) -> FeatureStore:
    """Return the store of the features of a model as it is."""
    if memory:
        return MemoryStore(plan.dtype, _memory_room(plan, engine))
    maps_alone = type(model.head).until is Head.until  # which all such heads share
    parts = {
        **{name: part for name, part in plan.parts.items() if name != "head" or not maps_alone},
        "weights": weights_hash(frozen_tensors(model)),
        "code": code_hash([model.backbone, model.head], feed.augment),
        "sizes": hash_of(model.scale, model.longest),
        "cut": hash_of(model.backbone.first_trained, maps_alone),
        "precision": hash_of(engine.precision, engine.tf32, engine.device.type, plan.dtype, engine.compile),
    }
    return DiskStore(_root(plan), origin(_root(plan), parts), plan.dtype, cap_of(plan.gib))
