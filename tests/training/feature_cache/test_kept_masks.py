import pickle

import numpy as np
import torch

from dinoseg.training.feature_cache.cache import CachedMasks


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
    kept, read = CachedMasks(), []
    for _ in range(3):
        read_masks(kept, drawn, read)
    assert read == list(drawn)


def test_masks_beyond_the_cap_are_read_again():
    drawn = {(f"{number}", ""): mask(20, 50, number) for number in range(3)}  # of some 1,000 bytes each
    kept, read = CachedMasks(cap=1200), []
    for _ in range(2):
        read_masks(kept, drawn, read)
    assert [key[0] for key in read] == ["0", "1", "2", "1", "2"]


def test_none_are_sent_to_another_process():
    kept = CachedMasks()
    kept.keep(("a", "b"), torch.from_numpy(mask(500, 500)))
    assert len(pickle.dumps(kept)) < 1000
