"""Batches of features of a model's frozen part: read from a cache, or computed and cached."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import overrides_both
from dinoseg.core.geometry import unify_depth
from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import FeatureBatch, FrozenFeatures, SampleLabels, SegmentationData, split_slices, stack_labels
from dinoseg.core.sizes import Size
from dinoseg.data.loader import TrainViews, Transform, advise_more_workers, load_in_order, sample_batches
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.measure import digest
from dinoseg.data.transforms import Augment
from dinoseg.extensions.feature_cache.key import image_hash
from dinoseg.extensions.feature_cache.store import FeatureStore
from dinoseg.extensions.feature_cache.unlabelled import Unmasked
from dinoseg.inference.strategy import Autocast
from dinoseg.models.model import SegmentationModel
from dinoseg.training.data_module import BatchCache
from dinoseg.utils.devices import to_device
from dinoseg.utils.units import hash_of

_MAX = 2**28  # bytes


class CachedMasks:
    """Compressed masks in memory, by the key and name of a view, up to a maximum size.

    Args:
        cap: maximum size in bytes.
    """

    def __init__(self, cap: int = _MAX) -> None:
        self._room = cap
        self._stored: dict[tuple[str, str], tuple[torch.Size, bytes]] = {}

    def get(self, key: tuple[str, str], read: Callable[[], np.ndarray]) -> Tensor:
        """Return a mask (H, W) uint8, by calling `read` if it is not cached."""
        if key not in self._stored:
            return torch.from_numpy(read())
        shape, content = self._stored[key]
        return torch.frombuffer(bytearray(zlib.decompress(content)), dtype=torch.uint8).view(shape)

    def keep(self, key: tuple[str, str], mask: Tensor) -> None:
        """Cache a mask (H, W) uint8 that `get` returned, here or in another process."""
        if key in self._stored or self._room <= 0:
            return
        content = zlib.compress(mask.contiguous().numpy().data, 1)
        if len(content) <= self._room:
            self._stored[key] = mask.shape, content
        self._room -= len(content)

    def __reduce__(self) -> tuple[type["CachedMasks"], tuple[()]]:
        return CachedMasks, ()  # a process that is not forked starts empty: sending the masks takes longer


@dataclass
class View:
    """A sample with its features if they are cached, else with its image."""

    key: str
    labels: SampleLabels
    features: list[Tensor] | None
    image: Tensor | None  # (3, H, W) uint8


@dataclass
class LazyFeatureBatch:
    """Samples of one size, whose missing features are computed by `to`."""

    cache: "FeatureCache"
    views: list[View]

    @property
    def names(self) -> list[str]:
        """Return the samples' names."""
        return [view.labels["name"] for view in self.views]

    @property
    def mask(self) -> Tensor:
        """Return the samples' masks (B, H, W)."""
        return self.labels["mask"]

    @property
    def maps(self) -> dict[str, Tensor]:
        """Return the samples' maps, see `Batch`."""
        return self.labels["maps"]

    @property
    def labels(self) -> dict[str, Any]:
        """Return the samples' names, masks and maps, see `stack_labels`."""
        return stack_labels([view.labels for view in self.views])

    @property
    def size(self) -> tuple[int, int]:
        """Return the (H, W) of the images."""
        return _size(self.views[0].labels["mask"])

    def to(self, device: torch.device) -> FeatureBatch:
        """Return the samples' features and masks on `device`."""
        return self.cache.complete_batch(self.views, device)

    def split(self, parts: int) -> list["LazyFeatureBatch"]:
        """Split the samples in their order into batches whose sizes differ by at most one sample."""
        return [replace(self, views=self.views[samples]) for samples in split_slices(len(self.views), parts)]


@dataclass
class FeatureCache(BatchCache):
    """Cache of the outputs of a model's frozen part for views of images.

    Each image goes through the frozen part by itself, so that its features do not depend on its batch.

    Args:
        model: a segmenter on its device; its user sets train mode or eval mode.
        autocast: returns the precision's context.
        open_store: returns the store of features for the model's weights at the time of the call.
        drawing: settings that determine a view of an image, together with its random draw.
        views: fixed augmentations of each image, used in turn.
        place: disk or memory.
    """

    model: SegmentationModel
    autocast: Autocast
    open_store: Callable[[], FeatureStore]
    drawing: str
    views: int
    place: str
    _store: FeatureStore | None = None
    _masks: CachedMasks = field(default_factory=CachedMasks)
    _validated: bool = False

    @property
    def store(self) -> FeatureStore:
        """Return the store; it is opened on first use, since a checkpoint may change the weights before."""
        self._store = self._store or self.open_store()
        return self._store

    def train_batches(
        self, drawn: TrainViews, *, workers: int, batch_size: int, start: int, **order: int
    ) -> Iterator[LazyFeatureBatch]:
        """Yield this rank's share of each training batch, with the same views as `loader.train_batches`.

        Once each view has been read, only this process reads: receiving a view from another one takes longer.
        """
        samples = len(drawn.data)
        read = partial(_read_views, drawn, self.store, self.drawing, self._masks)
        batches = partial(sample_batches, read, list, samples, batch_size=batch_size, seed=drawn.seed, **order)
        stream = batches(start=start, workers=self._workers(workers))
        seen = self.views * -(-samples // batch_size)
        stream = _chain_batches(stream, seen, partial(batches, start=start + seen, workers=0))
        return map(self._remember_views, stream)

    def eval_batches(
        self, data: SegmentationData, *, workers: int, rank: int, world_size: int
    ) -> Iterator[LazyFeatureBatch]:
        """Yield this rank's samples once and in order, each in a batch of its own and not augmented."""
        read = partial(_read_whole, data, self.store, self._masks)
        workers = 0 if self._validated else self._workers(workers)
        samples = load_in_order(read, range(rank, len(data), world_size), workers)
        self._validated = True
        return (self._remember_views([sample]) for sample in samples)

    def remedy(self, workers: int) -> str:
        """Return advice on loading batches faster with `workers` processes, in a sentence or two."""
        if self.place == "memory":
            return "Features are cached in memory: images are read only until each view was used once."
        advice = "Features are cached: use a cache_dir on a faster disk, or features.dtype=int8 for smaller files."
        return f"{advice} {advise_more_workers(workers)}"

    def complete_batch(self, views: list[View], device: torch.device) -> FeatureBatch:
        """Return features and masks of views on `device`; missing features are computed and cached."""
        rows = [self._features(view, device) for view in views]
        stacks = [to_device(torch.stack(unify_depth(part)), device) for part in zip(*rows, strict=True)]
        tensors = [part.float() if part.is_floating_point() else part for part in stacks]  # others are pixels
        size = _size(views[0].labels["mask"])
        frozen = FrozenFeatures(tensors, size, self.model.input_size(size))
        return FeatureBatch(frozen, **stack_labels([view.labels for view in views])).to(device)

    def _features(self, view: View, device: torch.device) -> list[Tensor]:
        if view.features is not None:
            return view.features
        with self.store.claim(view.key):
            # another run, rank or batch may have stored it since the view was read
            cached = self.store.get(view.key)
            if cached is not None:
                return cached
            assert view.image is not None
            with self.autocast():
                frozen = self.model.frozen(to_device(view.image[None], device))
            return self.store.put(view.key, [part[0] for part in frozen.tensors])

    def _workers(self, workers: int) -> int:
        return 0 if self.place == "memory" else workers  # other processes would not see cached features

    def _remember_views(self, views: list[View]) -> LazyFeatureBatch:
        """Return views that were read here or in another process, and remember their masks and checked keys."""
        for view in views:
            self._masks.keep((view.key, view.labels["name"]), view.labels["mask"])
            if view.features is not None:
                self.store.trust(view.key)
        return LazyFeatureBatch(self, views)


def _size(mask: Tensor) -> Size:
    return mask.shape[-2], mask.shape[-1]


def _chain_batches(
    first: Iterator[list[View]], count: int, then: Callable[[], Iterator[list[View]]]
) -> Iterator[list[View]]:
    yield from islice(first, count)
    del first  # the last reference: ends its processes
    yield from then()


def view_key(data: SegmentationData, index: int, *draw: object) -> str:
    """Return the key of the view of an image that `draw` determines; without `draw`, of the unaugmented image."""
    return hash_of(image_hash(data, index), *draw)


def _read_views(
    drawn: TrainViews, store: FeatureStore, drawing: str, masks: CachedMasks, epoch: int, index: int
) -> View:
    data, augment = drawn.data, drawn.augment
    facts = (drawing, drawn.seed, drawn.view_number(epoch), index, *_mask_digests(drawn, index))
    if get_map_kinds(data):
        # the objects decide how often a view is drawn again
        sample, redraws = drawn.draw(epoch, index)
        key = view_key(data, index, *facts, *([redraws] if redraws else []))
        return View(key, sample, store.get(key), sample["image"])
    key = view_key(data, index, *facts)
    name = data.names[index]
    features = store.get(key)
    if features is not None and _has_masks_only(data) and _transforms_masks_only(augment):
        mask = masks.get((key, name), lambda: augment.mask(data.mask(index), drawn.make_rng(epoch, index)))
        return View(key, SampleLabels(mask=mask, name=name), features, None)
    sample = drawn.read(epoch, index)
    return View(key, sample, features, sample["image"])


def _mask_digests(drawn: TrainViews, index: int) -> list[str]:
    """Return the hash of an image's mask if the mask determines the position of a view; else none."""
    data, augment = drawn.data, drawn.augment
    if not isinstance(augment, Augment) or augment.cat_max_ratio is None:
        return []
    return [digest(data.mask(index) if _has_masks_only(data) else data[index]["mask"].numpy())]


def _has_masks_only(data: SegmentationData) -> TypeGuard[PairDataset | Unmasked]:
    """Return whether a dataset reads masks without images, and its samples have no maps, which may need images."""
    files = isinstance(data, PairDataset | Unmasked) and overrides_both(type(data), "mask", "__getitem__")
    return files and not get_map_kinds(data)


def _transforms_masks_only(augment: Transform) -> TypeGuard[Augment]:
    return isinstance(augment, Augment) and overrides_both(type(augment), "mask", "__call__")


def _read_whole(data: SegmentationData, store: FeatureStore, masks: CachedMasks, index: int) -> View:
    key = view_key(data, index)
    features = store.get(key)
    if features is not None and _has_masks_only(data):
        mask = masks.get((key, data.names[index]), lambda: data.mask(index))
        return View(key, SampleLabels(mask=mask, name=data.names[index]), features, None)
    sample = data[index]
    return View(key, sample, features, sample["image"])
