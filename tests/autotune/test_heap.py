"""A heap's size is what the C library makes of what is taken and freed, though nothing is written there."""

import gc
from types import SimpleNamespace

import pytest
import torch

from dinoseg.autotune import step_bytes
from dinoseg.autotune.step_bytes import HeapBytes

SIDE = 2**10  # of float32: 4 MiB

pytestmark = pytest.mark.skipif(
    step_bytes._glibc() is None, reason="this C library does not tell how large its heap is"
)


def test_a_heap_has_grown_by_what_was_taken_at_most(monkeypatch):
    sizes = {}  # by address; a heap of no holes, which gives nothing back

    def take(_, size):
        sizes[len(sizes) + 1] = size
        return len(sizes)

    given = SimpleNamespace(mallinfo2=lambda: step_bytes._Info(arena=sum(sizes.values())), aligned_alloc=take)
    given.free = lambda address: None
    monkeypatch.setattr(step_bytes, "_glibc", lambda: given)
    with HeapBytes() as count:
        for _ in range(3):
            kept = [torch.empty(SIDE, SIDE, device="meta") for _ in range(4)]
            del kept
            gc.collect()
    assert count.now == 0 and count.most == 4 * 4 * SIDE**2 and count.grown == 3 * count.most


def test_the_c_library_tells_that_its_heap_has_grown():
    before = HeapBytes()._size()
    with HeapBytes() as count:
        kept = torch.empty(2**14, 2**14, device="meta")  # 1 GiB, larger than any hole, of which nothing is written
    assert count.grown >= 2**30
    del kept
    gc.collect()
    assert HeapBytes()._size() < before + 2**30


def test_where_no_more_is_given_nothing_is_told(monkeypatch):
    asked = []
    given = SimpleNamespace(
        mallinfo2=lambda: step_bytes._Info(arena=len(asked)), aligned_alloc=lambda *each: asked.append(each)
    )
    monkeypatch.setattr(step_bytes, "_glibc", lambda: given)
    with HeapBytes() as count:
        torch.empty(8, device="meta")
    assert count.grown == 0 and count.most == 32 and asked == [(64, 64)]  # of a whole cache line, as torch does


def test_without_such_a_library_tensors_count_all_the_same(monkeypatch):
    monkeypatch.setattr(step_bytes, "_glibc", lambda: None)
    with HeapBytes() as count:
        kept = torch.empty(8, device="meta")
    assert count.grown == 0 and count.now == 32 and kept is not None
