import errno
import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import Pictures, train_batches
from mistakes import assert_refused, refusals
from pretended_cuda import is_pinned, pretended_cuda
from signals import signal_in_thread
from torch.utils.data import _utils
from torch.utils.data._utils.pin_memory import pin_memory as pin_memory_of
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dinoseg.data import loader
from dinoseg.data.loader import eval_samples, load_in_order, stack_equal
from dinoseg.data.transforms import Affine, Augment, ColorJitter
from dinoseg.extensions.clips.view import ClipBatch, ClipView, clip_batches
from dinoseg.training.engine import Engine
from dinoseg.utils import cores as cores_module
from dinoseg.utils import waiting
from dinoseg.utils.errors import UserError, WaitEnded
from dinoseg.utils.interrupt import Interrupted, defer_signals

AUGMENT = Augment((12, 10), scale=(0.7, 1.4), affine=Affine(15, 0.1, 5), flip=0.5, color=ColorJitter(0.2))
SIZES = [(20 + i, 30 - i) for i in range(11)]


def take(batches, count):
    return list(itertools.islice(batches, count))


def batches_of(workers=0, data=None, **options):
    """Return training batches, of two of eleven images unless an option says otherwise."""
    return train_batches(data or Pictures(SIZES), AUGMENT, workers=workers, **{"batch_size": 2, "seed": 0} | options)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.names == b.names
        assert torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(workers):
    alone = take(batches_of(batch_size=4, seed=5), 8)
    assert alone[0].image.shape == (4, 3, 12, 10) and alone[0].mask.shape == (4, 12, 10)
    assert alone[0].image.dtype == alone[0].mask.dtype == torch.uint8
    assert_same(alone, take(batches_of(workers, batch_size=4, seed=5), 8))


def test_more_workers_than_cores_do_not_warn(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert list(load_in_order(abs, [-1, 2], 2)) == [1, 2]


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (3, 2), (70, 0)])
def test_start_is_the_same_as_skipping(start, workers):
    options = {"batch_size": 4, "seed": 5}
    through = take(batches_of(**options), start + 3)
    assert_same(through[start:], take(batches_of(workers, start=start, **options), 3))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_a_batch(world_size):
    options = {"batch_size": 6, "seed": 1, "start": 2}
    whole = take(batches_of(**options), 4)
    parts = [take(batches_of(rank=rank, world_size=world_size, **options), 4) for rank in range(world_size)]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert batch.names == [name for share in shares for name in share.names]
        assert torch.equal(batch.image, torch.cat([share.image for share in shares]))


def test_every_epoch_holds_each_sample_once_in_a_new_order():
    batches = take(batches_of(batch_size=4), 22)
    names = [name for batch in batches for name in batch.names]
    epochs = [names[i : i + 11] for i in range(0, 88, 11)]
    assert all(Counter(epoch) == Counter(Pictures(SIZES).names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_seed_and_epoch_change_the_view():
    views = [take(batches_of(data=Pictures([(30, 30)]), batch_size=1, seed=seed), 5) for seed in (0, 1)]
    assert len({view.image.numpy().tobytes() for view in sum(views, [])}) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_unchanged(workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(batches_of(workers), 3)
    list(eval_samples(Pictures(SIZES), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def children_after_a_moment(before):
    gc.collect()
    for _ in range(1200):
        if not (left := [each for each in multiprocessing.active_children() if each not in before]):
            return 0
        time.sleep(0.05)
    return len(left)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_ignore_signals_meant_for_the_main_process(number):
    batches = batches_of(2)
    next(batches)  # of the first worker: the second may have just begun
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert len(take(batches, 20)) == 20
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(120)
        assert worker.exitcode == 0


def test_worker_killed_while_sending_raises_an_error():
    def reset_connection(_):
        raise ConnectionResetError("reset by peer")

    act = partial(list, load_in_order(reset_connection, range(2), 1))
    assert_refused(act, "A data-loading process was killed", "reset by peer")


def kill_worker(before):
    """Kill the loading process that is not in `before`, and wait until it has ended; it stays unreaped."""
    (worker,) = (each for each in multiprocessing.active_children() if each not in before)
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def act_before_prefetch(monkeypatch, act):
    """Call a function when the loading processes have started, before the first items are due."""
    prefetch = _MultiProcessingDataLoaderIter._reset

    def act_and_prefetch(self, *arguments, **named):
        act()
        prefetch(self, *arguments, **named)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_reset", act_and_prefetch)


@pytest.mark.slow
def test_killed_worker_is_reported_where_its_batch_is_due():
    before = multiprocessing.active_children()  # of other tests
    batches = batches_of(1)
    next(batches)
    kill_worker(before)
    signal.raise_signal(signal.SIGCHLD)  # a handler must not raise in the middle of whatever this process does
    words = ("A data-loading process was killed", "engine.workers=1", "resume=auto")
    assert_refused(lambda: take(batches, 20), *words)
    assert children_after_a_moment(before) == 0


@pytest.mark.slow
def test_worker_killed_while_the_loader_is_built_is_reported(monkeypatch):
    act_before_prefetch(monkeypatch, partial(kill_worker, multiprocessing.active_children()))
    assert_refused(lambda: take(batches_of(1), 1), "A data-loading process was killed")


@pytest.mark.slow
def test_signal_waits_until_loading_processes_have_started(monkeypatch):
    before = multiprocessing.active_children()
    act_before_prefetch(monkeypatch, partial(signal_in_thread, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        take(batches_of(2), 1)
    assert children_after_a_moment(before) == 0


@pytest.mark.slow
def test_process_that_cannot_start_is_the_only_error(monkeypatch):
    before = multiprocessing.active_children()
    start = multiprocessing.Process.start

    def start_first_only(self):
        if len(multiprocessing.active_children()) > len(before):
            raise OSError(errno.EAGAIN, "no more processes")
        start(self)

    monkeypatch.setattr(multiprocessing.Process, "start", start_first_only)
    with pytest.raises(OSError, match="no more processes"):
        take(batches_of(2), 1)
    assert children_after_a_moment(before) == 0


@pytest.mark.slow
def test_signal_waits_until_loading_processes_have_ended(monkeypatch):
    end_workers = _MultiProcessingDataLoaderIter._shutdown_workers
    ended = []

    def interrupt_and_end(self):
        if not self._shutdown:
            signal_in_thread(signal.SIGINT)
            end_workers(self)
            ended.append(len(self._workers))

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", interrupt_and_end)
    with pytest.raises(KeyboardInterrupt):
        list(eval_samples(Pictures(SIZES), workers=2))
    assert ended == [2]


@pytest.mark.heavy
def test_workers_end_with_the_iterator():
    before = multiprocessing.active_children()  # of other tests
    batches = batches_of(2)
    next(batches)
    assert len([each for each in multiprocessing.active_children() if each not in before]) == 2
    del batches
    assert children_after_a_moment(before) == 0
    assert len(list(eval_samples(Pictures(SIZES), workers=2))) == 11
    assert children_after_a_moment(before) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_pass_through_workers(workers):
    before = multiprocessing.active_children()  # of other tests
    spoilt = Pictures(SIZES, error_at=4)
    for items in (batches_of(workers, spoilt, batch_size=3), eval_samples(spoilt, workers=workers)):
        with pytest.raises(UserError) as caught:
            take(items, 20)
        assert str(caught.value) == "bad.png number 4 is spoilt: replace it."
        assert children_after_a_moment(before) == 0  # although the exception is still held


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_samples_in_order_for_each_rank(workers):
    for rank in range(3):
        samples = eval_samples(Pictures(SIZES), workers=workers, rank=rank, world_size=3)
        assert [sample["name"] for sample in samples] == [f"p{i}" for i in range(rank, 11, 3)]
    assert list(eval_samples(Pictures([(4, 4)]), workers=workers, rank=1, world_size=2)) == []


def test_stack_equal_joins_neighbours_of_one_size():
    sizes = [(4, 4)] * 3 + [(4, 5)] + [(4, 4)] * 2 + [(5, 4)] * 5
    batches = list(stack_equal(eval_samples(Pictures(sizes)), lambda size: 2 if size[0] == 4 else 3))
    assert [batch.names for batch in batches] == [
        ["p0", "p1"], ["p2"], ["p3"], ["p4", "p5"], ["p6", "p7", "p8"], ["p9", "p10"],
    ]  # fmt: skip
    assert batches[2].image.shape == (1, 3, 4, 5)


def wait_for(*slow, **options):
    return loader.wait_for_item(Slow(*slow, **options), 0, 2)


ENDED = SimpleNamespace(is_alive=lambda: False)
test_message_names_value_and_remedy = refusals(
    {
        "clips": (lambda: clip_batches(Films(), ClipView((8, 8)), batch_size=40, seed=0), "data.batch_size=40 with 31"),
        "three devices": (
            lambda: train_batches(Pictures(SIZES), AUGMENT, seed=0, batch_size=4, world_size=3),
            "data.batch_size=4 cannot be shared by 3 devices",
        ),
        "no pinning thread": (lambda: wait_for(10**9, pinning=ENDED), "the thread that pins batches has stopped"),
    }
)


class Films:
    """Clips of three frames: 100 in one video, one in another; a frame's number stands in each of its pixels."""

    videos = ["long"] * 30 + ["short"]

    def __len__(self):
        return len(self.videos)

    def frames(self, index, epoch=0):
        return np.stack([np.full((9, 12, 3), index + number, np.uint8) for number in range(3)]), f"v/{index}"


def test_clips_are_shuffled_over_all_videos_and_resumed():
    view = ClipView((8, 8), flip=0.5)
    options = {"batch_size": 6, "seed": 2}
    whole = take(clip_batches(Films(), view, **options), 11)
    assert whole[0].image.shape == (6, 3, 3, 8, 8)
    order = [name for batch in whole for name in batch.names]
    assert Counter(order[:31]) == Counter(order[31:62]) == {f"v/{index}": 1 for index in range(31)}
    assert order[:31] != order[31:62] != sorted(order[31:62])
    for batch in whole:
        for clip, name in zip(batch.image, batch.names, strict=True):
            assert [int(frame.unique()) for frame in clip] == [int(name[2:]) + number for number in range(3)]
    for workers in (0, 2):
        again = take(clip_batches(Films(), view, start=7, workers=workers, **options), 4)
        assert [batch.names for batch in again] == [batch.names for batch in whole[7:]]
        assert all(torch.equal(a.image, b.image) for a, b in zip(again, whole[7:], strict=True))
    shares = [next(clip_batches(Films(), view, rank=rank, world_size=3, **options)) for rank in range(3)]
    assert [name for share in shares for name in share.names] == whole[0].names


@pytest.mark.parametrize("cuda", [True, False])
def test_training_batches_are_pinned_if_cuda_is_used(monkeypatch, cuda):
    def read_here(data, *, sampler, pin_memory, **_):
        """Stand for a DataLoader, without processes and threads."""
        return (pin_memory_of(data[key]) if pin_memory else data[key] for key in sampler)

    monkeypatch.setattr(loader, "DataLoader", read_here)
    monkeypatch.setattr(loader, "WorkerIterator", iter)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    with pretended_cuda() as waits:
        batch = next(batches_of(2, batch_size=4, seed=5))
        clips = ClipBatch(torch.zeros(1, 2, 3, 4, 4), ["a"]).pin_memory()
        assert is_pinned(batch.image) == is_pinned(batch.mask) == cuda and is_pinned(clips.image)
        there = batch.to(torch.device("cuda"))
        assert there.names == batch.names and not waits.take()
        (sample,) = take(eval_samples(Pictures(SIZES), workers=2), 1)
        assert not is_pinned(sample["image"])  # it is copied into a batch first


@pytest.mark.parametrize(
    ("device", "environment", "workers"),
    [
        ("cuda", {}, 8),
        ("cuda", {"WORLD_SIZE": "3"}, 4),
        ("cuda", {"WORLD_SIZE": "16"}, 2),
        ("cuda", {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "16"}, 6),
        ("mps", {}, 8),
        ("cpu", {}, 2),
    ],
)
def test_workers_follow_from_device_cores_and_ranks(device, environment, workers, monkeypatch):
    monkeypatch.setattr(cores_module, "_find_usable_cores", lambda: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loader.count_workers(device) == workers


def test_engine_resolves_auto_and_keeps_a_number():
    assert Engine("cpu", "fp32", workers="auto").workers == 2
    assert Engine("cpu", "fp32", workers=0).workers == 0


class Slow:
    """An iterator that comes to nothing for so many polls, before each of its items."""

    _workers = (SimpleNamespace(pid=77), SimpleNamespace(pid=88))

    def __init__(self, polls, error="DataLoader timed out after 5.0 seconds", pinning=None):
        self.polls, self.left, self.error, self._pin_memory_thread = polls, polls, error, pinning

    def __next__(self):
        if not self.left:
            self.left = self.polls
            return "item"
        self.left -= 1
        raise RuntimeError(self.error)


def test_missing_batch_is_reported_at_growing_intervals(monkeypatch, caplog):
    seconds = iter(range(0, 10_000, 5))
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert loader.wait_for_item(Slow(11), 0, 2) == "item" and not caplog.messages
    assert loader.wait_for_item(Slow(350), 6, 2) == "item"
    told = [message.split(":")[0] for message in caplog.messages]
    assert told == ["No batch for 60 s", "No batch for 300 s", "No batch for 1500 s"]
    assert "item 7 of this epoch is due from loading process 1 of 2 (id 77)" in caplog.text
    assert "py-spy dump --pid 77" in caplog.text and "engine.workers=0" in caplog.text
    assert_refused(lambda: loader.wait_for_item(Slow(400), 6, 2), "item 7", "after 1800 s", error=WaitEnded)
    assert_refused(lambda: wait_for(1, "another"), "another", error=RuntimeError)


def test_stop_request_ends_the_wait_for_a_stopped_process(monkeypatch):
    def read(key):
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(loader, "POLL", 0.02)
    monkeypatch.setattr(loader, "NOTICE", 0.05)
    monkeypatch.setattr(loader, "_ENDING", 0.1)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 3600)  # seconds in which torch waits for each process
    with pytest.raises(Interrupted), defer_signals(""):
        signal.raise_signal(signal.SIGTERM)
        list(load_in_order(read, range(4), 2))
    for process in multiprocessing.active_children():
        process.join(60)
    assert not multiprocessing.active_children()


def test_late_batch_is_still_returned(monkeypatch, caplog, tmp_path):
    def read(key):
        while key == 2 and not (tmp_path / "told").exists():
            time.sleep(0.01)
        return key

    def release(record):
        if "item 3 " in record.getMessage():
            (tmp_path / "told").touch()
        return True

    monkeypatch.setattr(loader, "POLL", 0.02)
    monkeypatch.setattr(loader, "_PATIENCE", 0.05)
    monkeypatch.setattr(waiting.log, "filters", [release])
    assert list(load_in_order(read, range(4), 2)) == [0, 1, 2, 3]
    assert "item 3 of this epoch is due from loading process 1 of 2" in caplog.text
