"""A heap's size is what the C library makes of what is taken and freed, though nothing is written there."""

import ctypes
import gc
from types import SimpleNamespace

import pytest
import torch

from dinoseg.costs import heap
from dinoseg.costs.heap import HeapBytes

SIDE = 2**10  # of float32: 4 MiB

pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="this C library does not tell how large its heap is")


def test_a_heap_has_grown_by_what_was_taken_at_most():
    with HeapBytes():
        torch.empty(1, device="meta")  # what torch imports for its first is on the heap too
    with HeapBytes() as count:
        for _ in range(3):
            kept = [torch.empty(SIDE, SIDE, device="meta") for _ in range(4)]
            del kept
            gc.collect()
    assert count.now == 0 and count.most == 4 * 4 * SIDE**2
    assert 0.9 * count.most < count.grown < 1.6 * count.most  # holes that were there before may serve


def test_where_no_more_is_given_nothing_is_told(monkeypatch):
    given = SimpleNamespace(mallinfo2=lambda: heap._Info(), aligned_alloc=lambda *_: None, free=ctypes.CDLL(None).free)
    monkeypatch.setattr(heap, "_glibc", lambda: given)
    with HeapBytes() as count:
        torch.empty(8, device="meta")
    assert count.grown == 0 and count.most == 32


def test_without_such_a_library_tensors_count_all_the_same(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with HeapBytes() as count:
        kept = torch.empty(8, device="meta")
    assert count.grown == 0 and count.now == 32 and kept is not None
