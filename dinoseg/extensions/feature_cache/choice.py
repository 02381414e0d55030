"""Decision before training whether, and where, the outputs of a model's frozen part are cached."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinoseg.core.contracts import Head
from dinoseg.core.shapes import Batch
from dinoseg.extensions.feature_cache.cache import FeatureCache
from dinoseg.extensions.feature_cache.form import TYPES, Stored, size_of
from dinoseg.extensions.feature_cache.key import code_hash, origin, weights_hash
from dinoseg.extensions.feature_cache.store import DiskStore, FeatureStore, MemoryStore, cap_of
from dinoseg.inference.memory import free_bytes
from dinoseg.models.model import SegmentationModel, frozen_tensors
from dinoseg.training.engine import CACHES, Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.units import hash_of
from dinoseg.utils.wording import count_of, in_bytes

logger = logging.getLogger(__name__)
_FOLDER = "features"
_OF_MEMORY = 0.5  # share of the free memory


class FeatureSize(NamedTuple):
    """Size of the features of one view of an image."""

    bytes: int
    pixels: int  # of the view, as the backbone sees it


def measure_features(
    data_module: ImageDataModule, model: SegmentationModel, engine: Engine, stored: Stored
) -> FeatureSize:
    """Return the size of the features of the first view of the first training image.

    Args:
        data_module: training images and their views.
        model: a segmenter on its device; it stays unchanged.
        engine: device and precision.
        stored: type in which features are cached.

    Raises:
        UserError: the model cannot be split behind its frozen part, or its features cannot be cached.
    """
    training = model.training
    batch = Batch.stack([data_module.train_views.read(0, 0)]).to(engine.device)
    try:
        with torch.no_grad(), engine.autocast():
            # a head may use more features in train mode; frozen parts stay in eval
            frozen = model.train().frozen(batch.image)
    finally:
        model.train(training)
    rows = [part[0] for part in frozen.tensors]
    return FeatureSize(size_of(rows, stored), math.prod(frozen.seen))


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
        previous: choice of the run that is resumed, which `auto` repeats: off, disk or memory; None: unknown.

    Raises:
        UserError: `dtype` is unknown.
    """

    cache_dir: Path
    epochs: float
    drawing: str
    parts: Mapping[str, str]
    dtype: Stored = "float16"
    gib: Positive | None = None
    previous: str | None = None

    def __post_init__(self) -> None:
        """Validate the type."""
        if self.dtype not in TYPES:
            raise UserError(f"features.dtype={self.dtype} is unknown. Choose one of {', '.join(TYPES)}, or auto.")


def stored_as(requested: Any, previous_choices: Mapping[str, str | None]) -> Any:
    """Resolve `features.dtype`: `auto` is the type of the run that is resumed, or float16.

    A resumed run that has cached no features uses float32, which gives the same numbers.
    """
    if requested != "auto":
        return requested
    is_uncached = previous_choices.get("engine.cache") == "off"
    return previous_choices.get("features.dtype") or ("float32" if is_uncached else "float16")


class _Uncached(UserError):
    """Raised when features cannot be cached, or caching saves nothing; its message is the reason."""


def has_frozen_part(model: SegmentationModel, engine: Engine) -> bool:
    """Return whether the first blocks of a model are frozen, so that their features may be cached; if not, log it.

    Raises:
        UserError: `engine.cache` requests a cache, and the first block is trained.
    """
    if model.backbone.first_trained != 0:
        return True
    _decline(
        engine,
        "The first block is trained, so no features repeat. To cache features, set adapter=frozen or last_blocks, "
        "or train LoRA in the last blocks only (adapter.blocks=4).",
    )
    return False


def feature_cache(
    data_module: ImageDataModule, model: SegmentationModel, engine: Engine, plan: CacheOptions
) -> FeatureCache | None:
    """Return the feature cache that `engine.cache` selects; None: the model is trained on images.

    The model has a frozen part, see `has_frozen_part`.

    Raises:
        UserError: caching is requested but impossible.
    """
    wanted = plan.previous if engine.cache == "auto" and plan.previous in CACHES else engine.cache
    chosen, reason = None, "This run started without a cache: set engine.cache=disk or memory to use one."
    if wanted != "off":
        chosen, reason = engine.run_on_rank0(lambda: _choose_or_explain(wanted, data_module, model, engine, plan))
    if chosen is None:
        _decline(engine, reason)
        return None
    assert data_module.views is not None  # without fixed views nothing is cached
    opened = partial(_open_store, chosen == "memory", data_module, model, engine, plan)
    return FeatureCache(model, engine.autocast, opened, plan.drawing, data_module.views, chosen)


def _decline(engine: Engine, reason: str) -> None:
    """Log why features are not cached, or raise it if `engine.cache` requests a cache."""
    if engine.cache in ("disk", "memory"):
        raise UserError(f"engine.cache={engine.cache}: {reason}")
    if engine.cache == "auto" and engine.is_main:
        logger.info("Feature cache: off (engine.cache=auto). %s", reason)


def _choose_or_explain(wanted: str, *parts: Any) -> tuple[str | None, str]:
    """Return the location of the cache; or None and the reason."""
    try:
        return _choose_location(wanted, *parts), ""
    except _Uncached as error:
        return None, str(error)


def _choose_location(
    wanted: str, data_module: ImageDataModule, model: SegmentationModel, engine: Engine, plan: CacheOptions
) -> str:
    """Return `memory` if all features fit there, else `disk`, or the wanted one; log the choice.

    Raises:
        _Uncached: neither is possible, or no view repeats.
    """
    if data_module.views is None:
        raise _Uncached(
            "Random augmentation makes every view unique. Set data.views=4 to cache 4 fixed augmentations per image."
        )
    if engine.sharded:
        raise _Uncached("The weights are sharded over the ranks (engine.sharding=fsdp).")
    is_forced = wanted in ("disk", "memory")
    if not is_forced and plan.epochs <= data_module.views:
        raise _Uncached(
            f"{plan.epochs:.1f} epochs with data.views={data_module.views} repeat no view. Set fewer views, or "
            "engine.cache=disk if another run uses the same features."
        )
    try:
        measured = measure_features(data_module, model, engine, plan.dtype)
    except UserError as error:  # the model cannot be split
        raise _Uncached(str(error)) from None
    count = len(data_module.train) * min(data_module.views, math.ceil(plan.epochs))
    size = measured.bytes * count + _val_bytes(data_module, model, measured)
    rooms = {"memory": _memory_room(plan, engine), "disk": _disk_room(plan)}
    facts = (
        f"The features of {count_of(len(data_module.train), 'image')} in {count_of(data_module.views, 'view')} and of "
        f"{count_of(len(data_module.val), 'validation image')} take about {in_bytes(size)} as {plan.dtype}; "
        f"{in_bytes(rooms['memory'])} are free in memory and {in_bytes(rooms['disk'])} in files"
    )
    fitting = [location for location, room in rooms.items() if size <= room]
    if not (is_forced or fitting):
        raise _Uncached(f"{facts}. Free some more, or set fewer data.views, features.dtype=int8, or another cache_dir.")
    location = wanted if is_forced else fitting[0]
    logger.info(
        "Feature cache: on (engine.cache=%s), %s%s. %s.",
        engine.cache,
        f"in {_root(plan)}" if location == "disk" else "in memory",
        ", as at the start of this run" if wanted != engine.cache else "",
        facts,
    )
    if size > rooms[location]:
        logger.warning("Free space for %s only: other features are computed in each epoch.", in_bytes(rooms[location]))
    return location


def _val_bytes(data_module: ImageDataModule, model: SegmentationModel, measured: FeatureSize) -> int:
    """Estimate the bytes of the validation images' features, as if all these images had the size of the first."""
    height, width = data_module.val[0]["mask"].shape[-2:]
    return round(measured.bytes * math.prod(model.input_size((height, width))) / measured.pixels) * len(data_module.val)


def _root(plan: CacheOptions) -> Path:
    return plan.cache_dir / _FOLDER


def _disk_room(plan: CacheOptions) -> int:
    return DiskStore(_root(plan), "", plan.dtype, cap_of(plan.gib)).room()


def _memory_room(plan: CacheOptions, engine: Engine) -> int:
    room = int(free_bytes(torch.device("cpu")) * _OF_MEMORY / engine.world_size)
    cap = cap_of(plan.gib)
    return room if cap is None else min(room, cap)


def _open_store(
    memory: bool, data_module: ImageDataModule, model: SegmentationModel, engine: Engine, plan: CacheOptions
) -> FeatureStore:
    """Return the feature store for the model's current weights."""
    if memory:
        return MemoryStore(plan.dtype, _memory_room(plan, engine))
    maps_alone = type(model.head).forward_frozen is Head.forward_frozen  # features that do not depend on the head
    parts = {
        **{name: part for name, part in plan.parts.items() if name != "head" or not maps_alone},
        "weights": weights_hash(frozen_tensors(model)),
        "code": code_hash([model.backbone] if maps_alone else [model.backbone, model.head], data_module.augment),
        "sizes": hash_of(model.scale, model.longest),
        "cut": hash_of(model.backbone.first_trained, maps_alone),
        "precision": hash_of(engine.precision, engine.tf32, engine.device.type, plan.dtype, engine.compile),
    }
    return DiskStore(_root(plan), origin(_root(plan), parts), plan.dtype, cap_of(plan.gib))
