"""What a view of an image costs, computed in each epoch or kept: measured on one, before a training begins."""

import math
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, FeatureBatch
from dinoseg.core.sizes import Size
from dinoseg.models.model import Segmenter
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.form import KEY_LENGTH, Stored, described, size_of
from dinoseg.training.feature_cache.store import DiskStore
from dinoseg.training.image_feed import ImageFeed
from dinoseg.utils.devices import synchronize
from dinoseg.utils.disk_speed import seconds_on_disk

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
