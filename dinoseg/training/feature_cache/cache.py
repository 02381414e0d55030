"""Batches of what the frozen part of a model gives for images: read where it is kept, else computed and kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeGuard

import torch
from torch import Tensor

from dinoseg.data.enough_workers import AUTO, FROM_NONE, Workers
from dinoseg.data.loader import Transform, drawn_batches, load_in_order, read_view, view_chance
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.inference.policy import Autocast
from dinoseg.model import Segmenter
from dinoseg.ranges import NotNegative
from dinoseg.shapes import FeatureBatch, FrozenFeatures, SegmentationData
from dinoseg.training.feature_cache.key import goes_with, hash_of, image_hash
from dinoseg.training.feature_cache.masks import KeptMasks
from dinoseg.training.feature_cache.store import FeatureStore
from dinoseg.transfer import sent

_DRAW_DIGITS = 15  # of a hash, as a number that every device's generator takes


@dataclass
class View:
    """A sample as it is read: with its features where they are kept, else with its image."""

    key: str
    mask: Tensor  # (H, W) uint8
    name: str
    features: list[Tensor] | None
    image: Tensor | None  # (3, H, W) uint8
    draw: int | None = None  # what its noise in an epoch is drawn with; None: it has none


@dataclass
class Views:
    """Samples of one size, whose features are completed on their way to the device."""

    cache: "FeatureCache"
    views: list[View]

    @property
    def names(self) -> list[str]:
        """Return the samples' names."""
        return [view.name for view in self.views]

    @property
    def size(self) -> tuple[int, int]:
        """Return the (H, W) of the images."""
        height, width = self.views[0].mask.shape
        return height, width

    def to(self, device: torch.device) -> FeatureBatch:
        """Return the samples' features and masks on `device`."""
        return self.cache.completed(self.views, device)

    def split(self, parts: int) -> list["Views"]:
        """Return so many batches of the samples in their order, of equal sizes but for one sample."""
        whole, more = divmod(len(self.views), parts)
        ends = [number * whole + min(number, more) for number in range(parts + 1)]
        return [Views(self.cache, self.views[first:last]) for first, last in zip(ends, ends[1:], strict=False)]


@dataclass
class FeatureCache:
    """What the frozen part of a model gives for views of images, kept.

    Each image goes through the frozen part by itself, so that its features do not depend on its batch.

    Args:
        model: whose part that is, on its device; put in train mode or eval mode by its user.
        autocast: the precision's context.
        open_store: gives the place where features of the model as it then is are kept.
        drawing: what decides, beside its draw, how a view of an image is made.
        views: of each image, drawn in turn; None: new ones in each epoch.
        noise: added to features of training, as a share of the deviation of all numbers of an image's tensor; drawn
            anew for a view in each epoch.
        place: what that is: disk or memory; None: nothing is kept, features are only computed apart.
    """

    model: Segmenter
    autocast: Autocast
    open_store: Callable[[], FeatureStore]
    drawing: str
    views: int | None
    noise: NotNegative = 0.0
    place: str | None = None
    _store: FeatureStore | None = None
    _masks: KeptMasks = field(default_factory=KeptMasks)
    _validated: bool = False

    @property
    def store(self) -> FeatureStore:
        """Where features are kept: opened when it is first asked for, since a checkpoint may bring other weights."""
        self._store = self._store or self.open_store()
        return self._store

    @property
    def keeps(self) -> bool:
        """Whether features are kept, and not only computed apart."""
        return self.place is not None

    def train_batches(
        self,
        data: SegmentationData,
        augment: Transform,
        *,
        seed: int,
        workers: Workers,
        batch_size: int,
        start: int,
        **order: int,
    ) -> Iterator[Views]:
        """Yield this rank's share of each training batch, as `loader.train_batches` does of the same views.

        Once each view was read, AUTO begins anew with this process alone: a view from another costs more to receive
        than it costs to read here.
        """
        read = partial(_read_drawn, data, augment, seed, self.views, self.store, self.drawing, self._masks)
        batches = partial(drawn_batches, read, list, len(data), batch_size=batch_size, seed=seed, **order)
        first = self._workers(workers)
        stream = batches(start=start, workers=first)
        if self.views is None or not self.keeps:  # none comes again
            return map(partial(Views, self), stream)
        if first == AUTO:
            seen = self.views * -(-len(data) // batch_size)
            stream = _followed(stream, seen, partial(batches, start=start + seen, workers=FROM_NONE))
        return map(self._arrived, stream)

    def eval_batches(self, data: SegmentationData, *, workers: Workers, rank: int, world: int) -> Iterator[Views]:
        """Yield this rank's samples once and in order, each by itself and as it is."""
        read = partial(_read_whole, data, self.store, self._masks)
        workers = self._workers(workers)
        workers = FROM_NONE if workers == AUTO and self._validated else workers
        samples = load_in_order(read, range(rank, len(data), world), workers)
        self._validated = self.keeps
        return (self._arrived([sample]) for sample in samples)

    def completed(self, views: list[View], device: torch.device) -> FeatureBatch:
        """Return features and masks of views on `device`; what is not kept is computed and kept."""
        rows = [self._features(view, device) for view in views]
        tensors = [sent(torch.stack(part), device).float() for part in zip(*rows, strict=True)]
        if self.noise:
            for row, view in enumerate(views):
                self._disturb([part[row] for part in tensors], view.draw)
        masks = torch.stack([view.mask for view in views])
        size = (masks.shape[-2], masks.shape[-1])
        frozen = FrozenFeatures(tensors, size, self.model.seen_size(size))
        return FeatureBatch(frozen, sent(masks, device), [view.name for view in views])

    def _disturb(self, features: list[Tensor], draw: int | None) -> None:
        """Add noise to features of one image, in place."""
        if draw is None:
            return
        chance = torch.Generator(features[0].device).manual_seed(draw)
        for part in features:
            drawn = torch.randn(part.shape, generator=chance, device=part.device)
            part += self.noise * part.std(correction=0) * drawn

    def _features(self, view: View, device: torch.device) -> list[Tensor]:
        # another rank or batch may have put it there since the view was read
        kept = self.store.get(view.key) if view.features is None else view.features
        if kept is not None:
            return kept
        assert view.image is not None
        with self.autocast():
            frozen = self.model.frozen(sent(view.image[None], device))
        return self.store.put(view.key, [part[0] for part in frozen.tensors])

    def _workers(self, workers: Workers) -> Workers:
        return 0 if self.place == "memory" else workers  # other processes would not see what is kept

    def _arrived(self, views: list[View]) -> Views:
        """Return views that were read, here or in another process, and know next time what that took."""
        for view in views:
            self._masks.keep((view.key, view.name), view.mask)
            if view.features is not None:
                self.store.trust(view.key)
        return Views(self, views)


def _followed(
    first: Iterator[list[View]], count: int, then: Callable[[], Iterator[list[View]]]
) -> Iterator[list[View]]:
    yield from islice(first, count)
    del first  # the last reference: its processes end
    yield from then()


def view_key(data: SegmentationData, index: int, *draw: object) -> str:
    """Return the key of a view of an image, which `draw` decides; without it, of the image as it is."""
    return hash_of(image_hash(data, index), *draw)


def _read_drawn(
    data: SegmentationData,
    augment: Transform,
    seed: int,
    views: int | None,
    store: FeatureStore,
    drawing: str,
    masks: KeptMasks,
    epoch: int,
    index: int,
) -> View:
    key = view_key(data, index, drawing, seed, epoch if views is None else epoch % views, index)
    draw = int(hash_of(key, epoch)[:_DRAW_DIGITS], 16)
    chance = partial(view_chance, seed, views, epoch, index)
    features = store.get(key)
    if features is not None and _has_masks_alone(data) and _draws_masks_alone(augment):
        mask = masks.get((key, data.names[index]), lambda: augment.mask(data.mask(index), chance()))
        return View(key, mask, data.names[index], features, None, draw)
    sample = read_view(data, augment, index, chance())
    return View(key, sample["mask"], sample["name"], features, sample["image"], draw)


def _has_masks_alone(data: SegmentationData) -> TypeGuard[PairDataset]:
    return isinstance(data, PairDataset) and goes_with(type(data), "mask", "__getitem__")


def _draws_masks_alone(augment: Transform) -> TypeGuard[Augment]:
    return isinstance(augment, Augment) and goes_with(type(augment), "mask", "__call__")


def _read_whole(data: SegmentationData, store: FeatureStore, masks: KeptMasks, index: int) -> View:
    key = view_key(data, index)
    features = store.get(key)
    if features is not None and _has_masks_alone(data):
        mask = masks.get((key, data.names[index]), lambda: data.mask(index))
        return View(key, mask, data.names[index], features, None)
    sample = data[index]
    return View(key, sample["mask"], sample["name"], features, sample["image"])
