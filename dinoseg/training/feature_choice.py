"""Decision before training whether, and where, the outputs of a model's frozen part are cached."""

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
from dinoseg.models.model import SegmentationModel, frozen_tensors
from dinoseg.training.engine import CACHES, Engine
from dinoseg.training.feature_cache.cache import FeatureCache
from dinoseg.training.feature_cache.form import KEY_LENGTH, TYPES, Stored, described, size_of
from dinoseg.training.feature_cache.key import code_hash, hash_of, origin, weights_hash
from dinoseg.training.feature_cache.store import DiskStore, FeatureStore, MemoryStore, cap_of
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.devices import synchronize
from dinoseg.utils.disk_speed import seconds_on_disk
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.wording import count_of, in_bytes

T = TypeVar("T")
_BACKWARD = 2  # duration of a backward pass, in forward passes


class Cost(NamedTuple):
    """Cost of one view of an image, in seconds and bytes."""

    frozen: float  # seconds of the frozen forward pass
    rest: float  # seconds of a training step without it
    write: float
    read: float
    bytes: int
    pixels: int  # as the backbone sees them
    shapes: str = ""  # of the features, see `described`
    size: Size = (0, 0)  # (H, W) of the view

    def gain(self, epochs: float, views: int, *, disk: bool) -> float:
        """Return the speed-up of training so long with cached features, on disk or in memory.

        Args:
            epochs: length of the training.
            views: fixed views of each image.
            disk: whether features are cached on disk, not in memory.
        """
        if disk and math.isinf(self.write):
            return 0.0
        computed = min(epochs, views)
        write, read = (self.write, self.read) if disk else (0.0, 0.0)
        cached = computed * (self.frozen + write) + (epochs - computed) * read
        return epochs * (self.frozen + self.rest) / (cached + epochs * self.rest)


def measured(
    data_module: ImageDataModule, model: SegmentationModel, loss: Loss, engine: Engine, root: Path, stored: Stored
) -> Cost:
    """Measure the cost of the first view of the first training image; the model stays unchanged.

    Args:
        data_module: training images and their views.
        model: a segmenter on its device.
        loss: loss of a training step.
        engine: device and precision.
        root: folder of the cached features.
        stored: type in which features are cached.

    Raises:
        UserError: the model cannot be split behind its frozen part, or its features cannot be cached.
    """
    training = model.training
    batch = Batch.stack([data_module.drawn.read(0, 0)]).to(engine.device)
    try:
        with torch.no_grad(), engine.autocast():
            model.train()  # a head may use more features in train mode; frozen parts stay in eval
            frozen, seconds = _timed(lambda: model.frozen(batch.image), engine)
            model.eval()  # leaves running means unchanged
            given = FeatureBatch(frozen, batch.mask, batch.names)
            _, rest = _timed(lambda: loss(model(frozen), given), engine)
    finally:
        model.train(training)
    rows = [part[0] for part in frozen.tensors]
    write, read = _disk_seconds(root, stored, rows)
    pixels, shapes = math.prod(frozen.seen), described(rows)
    return Cost(seconds, (1 + _BACKWARD) * rest, write, read, size_of(rows, stored), pixels, shapes, frozen.size)


def _timed(work: Callable[[], T], engine: Engine) -> tuple[T, float]:
    """Return the result of `work`, and the duration in seconds of the faster of two calls."""
    least = math.inf
    for _ in range(2):
        start = time.perf_counter()
        result = work()
        synchronize(engine.device)
        least = min(least, time.perf_counter() - start)
    return result, least


def _disk_seconds(root: Path, stored: Stored, rows: list[Tensor]) -> tuple[float, float]:
    """Return the seconds to write an image's features, and to read them from the disk itself; infinite on failure."""
    store, key = DiskStore(root, f"measured-{os.getpid()}", stored), "0" * KEY_LENGTH
    try:
        return seconds_on_disk(store.path(key), partial(store.put, key, rows), partial(store.get, key))
    except OSError:  # folder or file could not be created
        return math.inf, math.inf
    finally:
        shutil.rmtree(store.folder, ignore_errors=True)


logger = logging.getLogger(__name__)

_FOLDER = "features"
_MIN_GAIN = 1.2  # speed-up; smaller estimates are too uncertain to decide
_OF_MEMORY = 0.5  # share of the free memory


@dataclass(frozen=True)
class CacheOptions:
    """Inputs of the decision whether features are cached.

    Args:
        cache_dir: folder of the cache.
        epochs: length of the whole training.
        drawing: settings that determine a view of an image, together with its random draw.
        parts: settings, by their names for users, on which features depend besides weights and code. `head` counts only
            if the head computes its features itself.
        dtype: type in which features are cached.
        gib: maximum size in GiB; None: all of the free disk but 1 GiB, or half of the free memory.
        before: choice of the run that is resumed, which `auto` repeats: off, disk or memory; None: unknown.

    Raises:
        UserError: `dtype` is unknown.
    """

    cache_dir: Path
    epochs: float
    drawing: str
    parts: Mapping[str, str]
    dtype: Stored = "float16"
    gib: Positive | None = None
    before: str | None = None

    def __post_init__(self) -> None:
        """Validate the type."""
        if self.dtype not in TYPES:
            raise UserError(f"features.dtype={self.dtype} is unknown. Choose one of {', '.join(TYPES)}, or auto.")


def stored_as(requested: Any, before: Mapping[str, str | None]) -> Any:
    """Resolve `features.dtype`: `auto` is the type of the run that is resumed, or float16.

    A resumed run that has cached no features uses float32, which gives the same numbers.
    """
    if requested != "auto":
        return requested
    return before.get("features.dtype") or ("float32" if before.get("engine.cache") == "off" else "float16")


class _Live(UserError):
    """Raised when features cannot be cached, or caching does not pay off; its message is the reason."""


def feature_cache(
    data_module: ImageDataModule, model: SegmentationModel, loss: Loss, engine: Engine, plan: CacheOptions
) -> FeatureCache | None:
    """Return the feature cache that `engine.cache` selects; None: the model is trained on images.

    Raises:
        UserError: caching is requested but impossible.
    """
    wanted = plan.before if engine.cache == "auto" and plan.before in CACHES else engine.cache
    chosen, reason = None, "This run started without a cache: set engine.cache=disk or memory to use one."
    if wanted != "off":
        chosen, reason = engine.run_on_rank0(lambda: _chosen_or_why_not(wanted, data_module, model, loss, engine, plan))
    if chosen is None:
        if engine.cache in ("disk", "memory"):
            raise UserError(f"engine.cache={engine.cache}: {reason}")
        if engine.cache == "auto" and engine.is_main:
            logger.info("Feature cache: off (engine.cache=auto). %s", reason)
        return None
    assert data_module.views is not None  # without fixed views nothing is cached
    location, size, described_shapes = chosen
    opened = partial(_opened, location == "memory", data_module, model, engine, plan)
    shapes = {(size, True): described_shapes} if described_shapes else {}
    return FeatureCache(model, engine.autocast, opened, plan.drawing, data_module.views, location, shapes)


def _chosen_or_why_not(wanted: str, *parts: Any) -> tuple[tuple[str, Size, str] | None, str]:
    """Return the location, and the size and shapes of `Cost`, as values that ranks exchange; or None and the reason."""
    try:
        location, cost = _chosen(wanted, *parts)
        height, width = cost.size
        return (location, (height, width), cost.shapes), ""
    except _Live as error:
        return None, str(error)


def _chosen(
    wanted: str, data_module: ImageDataModule, model: SegmentationModel, loss: Loss, engine: Engine, plan: CacheOptions
) -> tuple[str, Cost]:
    """Return `disk` or `memory`, as `wanted` or whichever pays off, and the cost of an image; log the choice.

    Raises:
        _Live: neither is possible, or `auto` finds that neither pays off.
    """
    forced = wanted if wanted in ("disk", "memory") else None
    if data_module.views is None:
        raise _Live(
            "Random augmentation makes every view unique. Set data.views=4 to cache 4 fixed augmentations per image."
        )
    if engine.sharded:
        raise _Live("The weights are sharded over the ranks (engine.sharding=fsdp).")
    logger.info("engine.cache=%s: timing steps with and without cached features ...", engine.cache)
    try:
        cost = measured(data_module, model, loss, engine, _root(plan), plan.dtype)
    except UserError as error:  # the model cannot be split
        raise _Live(str(error)) from None
    count = len(data_module.train) * min(data_module.views, math.ceil(plan.epochs))
    size = cost.bytes * count + _val_bytes(data_module, model, cost)
    rooms = {"disk": _disk_room(plan), "memory": _memory_room(plan, engine)}
    gains = {kind: cost.gain(plan.epochs, data_module.views, disk=kind == "disk") for kind in rooms}
    paying = [kind for kind in rooms if size <= rooms[kind] and gains[kind] >= _MIN_GAIN]
    read = f"{cost.read:.2g} s to read back, " if math.isfinite(cost.read) else ""  # inf: write failed
    facts = (
        f"The features of {count_of(len(data_module.train), 'image')} in {count_of(data_module.views, 'view')} and of "
        f"{count_of(len(data_module.val), 'validation image')} take about {in_bytes(size)} as {plan.dtype}; an "
        f"image takes {cost.frozen:.2g} s to compute, {read}and the rest of its step {cost.rest:.2g} s"
    )
    if not (forced or paying):
        raise _Live(f"{facts}. {_why_not(plan, data_module.views, size, rooms, gains)}")
    kind = forced or paying[0]
    logger.info(
        "Feature cache: on (engine.cache=%s), %s%s. %s: estimated speed-up %.1f over %.1f epochs.",
        engine.cache,
        f"in {_root(plan)}" if kind == "disk" else "in memory",
        ", as at the start of this run" if wanted != engine.cache else "",
        facts,
        gains[kind],
        plan.epochs,
    )
    if size > rooms[kind]:
        logger.warning("Free space for %s only: other features are computed in each epoch.", in_bytes(rooms[kind]))
    return kind, cost


def _why_not(plan: CacheOptions, views: int, size: int, rooms: Mapping[str, int], gains: Mapping[str, float]) -> str:
    if plan.epochs <= views:
        return (
            f"{plan.epochs:.1f} epochs with data.views={views} hardly repeat a view. Set fewer views, or "
            "engine.cache=disk if another run uses the same features."
        )
    if max(gains.values()) < _MIN_GAIN:
        return f"The estimated speed-up of {max(gains.values()):.2f} is too small."
    if size > max(rooms.values()):
        room = " and ".join(
            f"{in_bytes(there)} in {'memory' if kind == 'memory' else 'files'}" for kind, there in rooms.items()
        )
        return (
            f"Free space: {room}. Free some more, or set fewer data.views, features.dtype=int8, or another cache_dir."
        )
    return f"The disk is too slow (estimated speed-up {gains['disk']:.2f}), and the features do not fit into memory."


def _val_bytes(data_module: ImageDataModule, model: SegmentationModel, cost: Cost) -> int:
    """Estimate the bytes of the validation images' features, as if all these images had the size of the first."""
    height, width = data_module.val[0]["mask"].shape
    return round(cost.bytes * math.prod(model.input_size((height, width))) / cost.pixels) * len(data_module.val)


def _root(plan: CacheOptions) -> Path:
    return plan.cache_dir / _FOLDER


def _disk_room(plan: CacheOptions) -> int:
    return DiskStore(_root(plan), "", plan.dtype, cap_of(plan.gib)).room()


def _memory_room(plan: CacheOptions, engine: Engine) -> int:
    room = int(free_bytes(torch.device("cpu")) * _OF_MEMORY / engine.world_size)
    cap = cap_of(plan.gib)
    return room if cap is None else min(room, cap)


def _opened(
    memory: bool, data_module: ImageDataModule, model: SegmentationModel, engine: Engine, plan: CacheOptions
) -> FeatureStore:
    """Return the feature store for the model's current weights."""
    if memory:
        return MemoryStore(plan.dtype, _memory_room(plan, engine))
    maps_alone = type(model.head).forward_frozen is Head.forward_frozen  # features that do not depend on the head
    parts = {
        **{name: part for name, part in plan.parts.items() if name != "head" or not maps_alone},
        "weights": weights_hash(frozen_tensors(model)),
        "code": code_hash([model.backbone, model.head], data_module.augment),
        "sizes": hash_of(model.scale, model.longest),
        "cut": hash_of(model.backbone.first_trained, maps_alone),
        "precision": hash_of(engine.precision, engine.tf32, engine.device.type, plan.dtype, engine.compile),
    }
    return DiskStore(_root(plan), origin(_root(plan), parts), plan.dtype, cap_of(plan.gib))
