"""Views are known by all that draws them, and completed as they are kept; masks are read once."""

import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_trainings import write_pairs
from torch import nn

from dinoseg.core.shapes import FrozenFeatures
from dinoseg.data.loader import TrainViews
from dinoseg.data.transforms import Augment
from dinoseg.extensions.feature_cache import cache
from dinoseg.extensions.feature_cache.cache import CachedMasks, FeatureCache, View
from dinoseg.extensions.feature_cache.store import MemoryStore

CPU = torch.device("cpu")


def test_a_view_is_known_by_its_image_and_all_that_draws_it(tmp_path):
    data = write_pairs(tmp_path, [(6, 7)] * 3)
    shutil.copy(tmp_path / "0.png", tmp_path / "1.png")

    def read(drawing="drawing", seed=5, views=2, epoch=0, index=0):
        drawn = TrainViews(data, Augment((4, 4)), seed, views)
        return cache._read_views(drawn, MemoryStore("float32", 0), drawing, CachedMasks(), epoch, index)

    first = read()
    others = [{"drawing": "other"}, {"seed": 6}, {"epoch": 1}, {"index": 1}, {"index": 2}, {"views": None, "epoch": 2}]
    assert len({first.key, *(read(**other).key for other in others)}) == 1 + len(others)
    again = read(epoch=2)
    assert again.key == first.key and torch.equal(again.image, first.image)


@pytest.fixture
def cache_and_view():
    """Return a cache over a frozen part that gives thirds, in float16 and under an autocast to bfloat16, and a view."""

    def frozen(images):
        passed.append(torch.is_autocast_enabled("cpu"))
        return FrozenFeatures([torch.full((1, 2, 3), 1 / 3)], (4, 4), (8, 8))

    def open_store():
        return MemoryStore("float16", 2**20)

    passed = []
    model = nn.Linear(1, 1)  # whose device is asked
    model.frozen, model.input_size = frozen, lambda size: tuple(2 * side for side in size)
    kept = FeatureCache(model, lambda: torch.autocast("cpu", torch.bfloat16), open_store, "drawing", 2, "memory")
    image, mask = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    return kept, View("0" * 32, {"mask": mask, "name": "a"}, None, image), passed


def test_cached_features_equal_computed_features(cache_and_view):
    kept, view, passed = cache_and_view
    first, second = (kept.complete_batch([view], CPU).image for _ in range(2))
    assert torch.equal(first.tensors[0], second.tensors[0]) and first.tensors[0].dtype == torch.float32
    assert (first.size, first.seen) == ((4, 4), (8, 8)) == (second.size, second.seen)
    assert passed == [True]  # another batch, or rank, has put it there since the view was read


def test_bytes_stay_bytes_and_numbers_become_float32(cache_and_view):
    """Also the numbers of an image that float16 does not hold, in a batch with another one."""
    kept, view, _ = cache_and_view
    view.features = [torch.arange(256, dtype=torch.uint8), torch.tensor([0.0, 4.0]).half()]
    large = replace(view, features=[view.features[0], torch.tensor([0.0, 2.0**17]).bfloat16()])
    for views, numbers in (([view], [[0.0, 4.0]]), ([view, large], [[0.0, 4.0], [0.0, 2.0**17]])):
        pixels, features = kept.complete_batch(views, CPU).image.tensors
        assert torch.equal(pixels[0], view.features[0]) and pixels.dtype == torch.uint8
        assert features.dtype == torch.float32 and features.tolist() == numbers


def test_features_read_by_another_process_are_trusted(cache_and_view):
    kept, view, _ = cache_and_view
    trusted = []
    kept._store = SimpleNamespace(trust=trusted.append)
    view.features = [torch.ones(2, 3)]
    kept._remember_views([view])
    assert trusted == [view.key]


def mask(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


def read_masks(kept, drawn, read):
    """Ask for masks as one who reads them, and keep what comes."""
    for key, expected in drawn.items():
        found = kept.get(key, lambda key=key: read.append(key) or drawn[key].copy())
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected)
        kept.keep(key, found)
        found.zero_()  # who has it may change it


def test_mask_is_read_once_and_returned_unchanged():
    drawn = {(f"{view}", f"{index}"): mask(1 + 7 * index, 9 - view, index) for index in range(3) for view in range(2)}
    drawn["", ""] = mask(6, 8).T
    kept = CachedMasks()
    read = []
    for _ in range(3):
        read_masks(kept, drawn, read)
    assert read == list(drawn)


def test_masks_beyond_the_cap_are_read_again():
    drawn = {(f"{number}", ""): mask(20, 50, number) for number in range(3)}  # of some 1,000 bytes each
    kept = CachedMasks(cap=1200)
    read = []
    for _ in range(2):
        read_masks(kept, drawn, read)
    assert [key[0] for key in read] == ["0", "1", "2", "1", "2"]
    kept = CachedMasks()
    kept.keep(("a", "b"), torch.from_numpy(mask(500, 500)))
    assert len(pickle.dumps(kept)) < 1000, "none are sent to another process"
