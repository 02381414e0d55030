import errno
import logging
import os
import pickle
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from failing import fail_after

from dinoseg.extensions.feature_cache import store as stores
from dinoseg.extensions.feature_cache.form import size_of
from dinoseg.extensions.feature_cache.store import DiskStore, MemoryStore
from dinoseg.utils.interrupt import Interrupted, defer_signals

SHAPE = (8, 3, 4)
SIZE = size_of([torch.zeros(SHAPE)], "float16")
KEYS = [f"{number:032x}" for number in range(20)]


def features(number=0):
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))]


def fill(store, numbers):
    for number in numbers:
        store.put(KEYS[number], features(number))


def age(folder, seconds):
    """Make the files of a folder as old as if a run had read them so long ago; the first the oldest."""
    for later, path in enumerate(sorted(folder.glob("*.features"))):
        then = time.time() - seconds + later
        os.utime(path, (then, then))


def stored_numbers(store):
    return [number for number, key in enumerate(KEYS) if key in store]


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_stored_features_are_returned_as_put_returned_them(kind, tmp_path):
    def make_store(stored):
        return DiskStore(tmp_path, "a", stored) if kind == "disk" else MemoryStore(stored, 2**20)

    store = make_store("float16")
    assert store.get(KEYS[0]) is None and KEYS[0] not in store
    said = store.put(KEYS[0], features())
    assert KEYS[0] in store and KEYS[1] not in store
    for _ in range(2):
        (found,) = store.get(KEYS[0])
        assert torch.equal(found, said[0]) and torch.equal(found, features()[0].half())
    store = make_store("int8")
    said = store.put(KEYS[2], [*features(), torch.ones(5, 2)])
    found = store.get(KEYS[2])
    assert [tensor.dtype for tensor in found] == 2 * [torch.float32]
    assert all(map(torch.equal, found, said)) and torch.allclose(found[0], features()[0], atol=0.02)


def test_memory_store_copies_only_the_stored_features():
    store = MemoryStore("float32", 2**20)
    batch = torch.randn(16, *SHAPE)
    store.put(KEYS[0], [batch[0]])
    batch.zero_()
    (found,) = store.get(KEYS[0])
    assert found.any() and found.untyped_storage().nbytes() == found.nbytes


def test_runs_that_start_together_compute_a_key_once(tmp_path):
    computed = []

    def compute(store):
        with store.claim(KEYS[0]):
            if store.get(KEYS[0]) is None:
                time.sleep(0.05)
                computed.append(store.put(KEYS[0], features()))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(compute, [DiskStore(tmp_path, "a", "float16") for _ in range(3)]))
    assert len(computed) == 1 and [path.suffix for path in (tmp_path / "a").iterdir()] == [".features"]


def test_features_are_computed_if_the_other_process_hangs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stores, "_PATIENCE", 0.1)
    store = DiskStore(tmp_path, "a", "float16")
    with store.claim(KEYS[0]), store.claim(KEYS[0]):
        store.put(KEYS[0], features())
    assert "has locked" in caplog.text and "The features are computed here" in caplog.text
    assert store.get(KEYS[0]) is not None


def test_stop_request_ends_the_wait_for_features(tmp_path):
    store = DiskStore(tmp_path, "a", "float16")
    entered = []
    with pytest.raises(Interrupted), defer_signals(""), store.claim(KEYS[0]):
        signal.raise_signal(signal.SIGTERM)
        with store.claim(KEYS[0]):
            entered.append(True)
    assert entered


def test_a_cache_that_cannot_be_written_blocks_no_run(tmp_path):
    (tmp_path / "a").write_text("no folder")
    with DiskStore(tmp_path, "a", "float16").claim(KEYS[0]):
        pass


def test_store_is_that_of_its_origin_in_any_process(tmp_path):
    store = DiskStore(tmp_path, "a", "float16")
    fill(store, [3])
    assert DiskStore(tmp_path, "b", "float16").get(KEYS[3]) is None
    for same in (DiskStore(tmp_path, "a", "float16"), pickle.loads(pickle.dumps(store))):
        assert torch.equal(same.get(KEYS[3])[0], features(3)[0].half())


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "pipe": replace_by_pipe,
    "folder": replace_by_folder,
    "size": lambda path: os.truncate(path, 2**40),  # takes no room, but for who reads it
    "name": lambda path: path.write_bytes(path.with_name(f"{KEYS[1]}.features").read_bytes()),
    "bit": lambda path: path.write_bytes(path.read_bytes()[:-100] + b"?" + path.read_bytes()[-99:]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_or_foreign_file_is_replaced_with_a_warning(kind, tmp_path, caplog):
    fill(DiskStore(tmp_path, "a", "float16"), [0, 1])
    path = tmp_path / "a" / f"{KEYS[0]}.features"
    DAMAGE[kind](path)
    store = DiskStore(tmp_path, "a", "float16")
    assert store.get(KEYS[0]) is None and store.get(KEYS[0]) is None and store.get(KEYS[1]) is not None
    (told,) = [record.getMessage() for record in caplog.records]
    assert str(path) in told and "cannot be used" in told
    fill(store, [0, 2])
    assert stored_numbers(store) == ([1, 2] if kind == "folder" else [0, 1, 2])
    if kind == "folder":
        assert "is a folder" in caplog.text and "Remove it" in caplog.text
    else:
        assert torch.equal(store.get(KEYS[0])[0], features(0)[0].half())


def test_checked_file_is_still_compared_with_its_size(tmp_path):
    store = DiskStore(tmp_path, "a", "float16")
    fill(store, [0])
    assert store.get(KEYS[0]) is not None
    for size in (SIZE - 64, 128, 20, 1, 0):
        os.truncate(tmp_path / "a" / f"{KEYS[0]}.features", size)
        assert store.get(KEYS[0]) is None


def test_loaded_features_are_independent_of_their_file(tmp_path):
    store = DiskStore(tmp_path, "a", "float16")
    path = tmp_path / "a" / f"{KEYS[0]}.features"
    first, second = (features(number)[0].half() for number in range(2))
    fill(store, [0])
    (found,) = store.get(KEYS[0])
    found.zero_()
    (found,) = store.get(KEYS[0])
    assert torch.equal(found, first)
    store.put(KEYS[0], features(1))
    (other,) = store.get(KEYS[0])
    assert torch.equal(found, first) and torch.equal(other, second)
    os.truncate(path, 0)  # of a mapped file, nothing could be read any more
    assert torch.equal(other, second)
    path.unlink()
    assert torch.equal(found, first)


def test_least_recently_used_files_of_other_runs_are_evicted(tmp_path, caplog):
    fill(DiskStore(tmp_path, "old", "float16"), range(4))
    fill(DiskStore(tmp_path, "a", "float16"), [10, 11])
    age(tmp_path / "old", 1000)
    age(tmp_path / "a", 5000)
    store = DiskStore(tmp_path, "a", "float16", cap=7 * SIZE)
    old = DiskStore(tmp_path, "old", "float16")
    assert store.get(KEYS[10]) is not None  # used now, so no longer old
    assert store.room() == 6 * SIZE
    fill(store, [12])
    assert stored_numbers(old) == [0, 1, 2, 3] and stored_numbers(store) == [10, 11, 12]
    fill(store, [13])
    assert stored_numbers(old) == [2, 3]  # some more than needed, so that the next one need not look
    fill(store, range(14, 17))
    assert stored_numbers(old) == [] and stored_numbers(store) == [10, 11, 12, 13, 14, 15, 16]
    assert not caplog.records
    fill(store, [17])
    assert stored_numbers(store) == [10, 12, 13, 14, 15, 16, 17]
    fill(store, [18, 19])
    assert stored_numbers(store) == [10, 12, 13, 14, 15, 16, 17] and store.room() == 0
    (told,) = [record.getMessage() for record in caplog.records]
    assert "0.0 MiB at most: no more features are cached" in told and "the next run caches more" in told
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= store.cap


def test_a_file_server_s_clock_may_differ_by_some_seconds(tmp_path):
    fill(DiskStore(tmp_path, "other", "float16"), range(2))
    for seconds, room in ((5, SIZE), (15, 3 * SIZE)):
        age(tmp_path / "other", seconds)
        assert DiskStore(tmp_path, "a", "float16", cap=3 * SIZE).room() == room


def test_memory_store_respects_its_cap_with_one_warning(caplog):
    store = MemoryStore("float16", cap=2 * 2 * torch.zeros(SHAPE).numel() + 1)
    fill(store, range(5))
    assert stored_numbers(store) == [0, 1] and store.room() == 1
    assert len(caplog.records) == 1 and "used up" in caplog.text
    assert torch.equal(store.put(KEYS[9], features(9))[0], features(9)[0].half())


def test_some_room_is_left_on_the_disk(tmp_path, monkeypatch, caplog):
    free = [stores._RESERVE + 2 * SIZE + 5]
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    store = DiskStore(tmp_path, "a", "float16")
    assert store.room() == 2 * SIZE + 5
    for number in range(3):
        fill(store, [number])
        free[0] -= SIZE
    assert stored_numbers(store) == [0, 1] and "0.0 MiB are free" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_stops_caching_but_not_the_run(number, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        fail_after(patch, stores, "write_all", 2, OSError(number, os.strerror(number)))
        store = DiskStore(tmp_path, "a", "float16")
        for each in range(4):
            assert torch.equal(store.put(KEYS[each], features(each))[0], features(each)[0].half())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{key}.features" for key in KEYS[:2]]
    (told,) = [record.getMessage() for record in caplog.records]
    assert ("the disk is full" in told) == (number != errno.EIO) and str(tmp_path) in told
    again = DiskStore(tmp_path, "a", "float16")
    fill(again, [2, 3])
    assert stored_numbers(again) == [0, 1, 2, 3] and all(again.get(KEYS[each]) is not None for each in range(4))


def test_unwritable_cache_folder_is_a_warning(tmp_path, caplog):
    (tmp_path / "root").write_text("no folder")
    store = DiskStore(tmp_path / "root", "a", "float16")
    assert store.room() > 0 and store.get(KEYS[0]) is None
    fill(store, [0, 1])
    assert len([record for record in caplog.records if "Cannot write features" in record.getMessage()]) == 1


def write_and_read(root, seed):
    store = DiskStore(root, "a", "float16", cap=12 * SIZE)
    wrong = 0
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(seed)).tolist()
    for _ in range(4):
        for number in order:
            found = store.get(KEYS[number]) or store.put(KEYS[number], features(number))
            wrong += not torch.equal(found[0], features(number)[0].half())
    return wrong


@pytest.mark.slow
def test_runs_that_share_a_folder_give_each_other_nothing_wrong(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), ProcessPoolExecutor(3, get_context("fork")) as processes:
        assert list(processes.map(write_and_read, 3 * [tmp_path], range(3))) == [0, 0, 0]
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert names and all(name.endswith(".features") and not name.startswith(".") for name in names)


def test_features_beyond_float16_are_cached_with_one_warning(tmp_path, caplog):
    stores._warn_of_wider.cache_clear()
    large = [7e4 * part for part in features()]
    for store in (DiskStore(tmp_path, "a", "float16"), MemoryStore("float16", 2**20)):
        for key in KEYS[:2]:
            (put,), (got,) = store.put(key, large), store.get(key)
            assert torch.equal(put, large[0].bfloat16()) and torch.equal(got, put)
    assert len(caplog.messages) == 1 and "cached in bfloat16" in caplog.text and "features.dtype=float32" in caplog.text
