import itertools
import logging
from contextlib import closing

import pytest
import torch
from making import Pictures, train_batches

from dinoseg.data import enough_workers
from dinoseg.data.enough_workers import FROM_NONE, with_enough_workers
from dinoseg.data.transforms import Augment
from dinoseg.utils import cores


class Machine:
    """Loads an item in `read` seconds by each of the workers that run at once, and uses one in `use` seconds."""

    def __init__(self, read, use, cores=99, slower=1.0, later=None):
        self.later = later or read  # seconds, from some item on
        self.now, self.read, self.use, self.cores, self.slower = 0.0, read, use, cores, slower
        self.opened, self.closed = [], 0

    def load(self, keys, workers):
        self.opened.append(workers)
        try:
            ahead = list(itertools.islice(keys := iter(keys), 2 * workers or 1))  # as a DataLoader takes them
            while ahead:
                item = ahead.pop(0)
                ahead += itertools.islice(keys, 1)
                every = self.read / (min(workers, self.cores) or 1)
                self.now += max(every - self.use, 1e-6) if workers else every
                yield item
        finally:
            self.closed += 1

    def run(self, most=16, items=400, pauses=(), **options):
        given = []
        for item in with_enough_workers(self.load, range(items), most, lambda: self.now, **options):
            given.append(item)
            self.read = self.later if item == 200 else self.read
            self.now += self.use * self.slower ** len(self.opened) + (500 if item in pauses else 0)
        assert given == list(range(items)) and self.closed == len(self.opened)
        return self.opened


@pytest.mark.parametrize(
    ("machine", "most", "opened"),
    [
        (Machine(read=0.1, use=0.2), 16, [2]),  # nothing is waited for
        (Machine(read=0.4, use=0.2), 16, [2]),
        (Machine(read=0.5, use=0.2), 16, [2, 4]),
        (Machine(read=2.9, use=0.2), 16, [2, 4, 8, 16]),
        (Machine(read=2.9, use=0.2), 5, [2, 4, 5]),
        (Machine(read=2.9, use=0.2), 1, [1]),
        (Machine(read=2.9, use=0.2, cores=4), 16, [2, 4, 8, 4]),  # a disk that gives no more
        (Machine(read=0.5, use=0.2, slower=1.5), 16, [2, 4, 2]),  # they take the cores of who uses the items
    ],
)
def test_workers_become_as_many_as_bring_more_and_every_item_comes_once_and_in_order(machine, most, opened):
    assert machine.run(most) == opened


@pytest.mark.parametrize(
    ("machine", "opened"),
    [
        (Machine(read=0.01, use=0.2), [0]),
        (Machine(read=0.1, use=0.2), [0, 2]),
        (Machine(read=0.5, use=0.2), [0, 2, 4]),
        (Machine(read=0.1, use=0.2, slower=1.5), [0, 2, 0]),  # what a process costs is more than it brings
        (Machine(read=0.01, use=0.2, later=0.5), [0, 2, 4]),  # found while it goes on
        (Machine(read=0.5, use=0.2, later=0.01), [0, 2, 4]),
    ],
)
def test_the_process_itself_loads_where_that_takes_little_time(machine, opened):
    assert machine.run(first=0) == opened


def test_validations_are_no_reason_for_fewer():
    assert Machine(read=2.9, use=0.2).run(pauses=range(0, 400, 40)) == [2, 4, 8, 16]


def test_what_processes_start_with_is_not_measured():
    machine = Machine(read=0.1, use=0.2)

    def load(keys, workers):
        for number, item in enumerate(machine.load(keys, workers)):
            machine.now += 500 * (number == 3)  # the last of what two processes read first
            yield item

    for _ in with_enough_workers(load, range(200), 16, lambda: machine.now):
        machine.now += machine.use
    assert machine.opened == [2]


def test_short_runs_are_not_measured():
    assert Machine(read=2.9, use=0.2).run(items=30) == [2]
    assert Machine(read=0.0029, use=0.0002).run(items=400) == [2]


def test_changes_are_told(caplog):
    with caplog.at_level(logging.INFO):
        Machine(read=2.9, use=0.2, cores=4).run()
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "86% of the time is spent waiting for 2 loading processes; trying 4.",
        "72% of the time is spent waiting for 4 loading processes; trying 8.",
        "more processes are not faster; back to 4.",
    ]


def test_an_early_end_and_an_error_close_the_processes():
    machine = Machine(read=1, use=1)
    stream = with_enough_workers(machine.load, range(9), 4, lambda: 0.0)
    next(stream)
    stream.close()
    assert machine.closed == 1

    def failing(keys, workers):
        yield next(iter(keys))
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        list(with_enough_workers(failing, range(9), 4))


@pytest.mark.parametrize(
    ("environment", "opened"),
    [
        ({}, [2, 4, 8, 12]),
        ({"WORLD_SIZE": "3"}, [2, 4]),
        ({"WORLD_SIZE": "16"}, [2]),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "16"}, [2, 4, 6]),
    ],
)
def test_ranks_share_the_cores(environment, opened, monkeypatch):
    monkeypatch.setattr(cores, "_usable", lambda: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Machine(read=20, use=0.2).run(most=None) == opened


@pytest.mark.slow
def test_batches_are_the_same_when_their_processes_change_in_between(monkeypatch, caplog):
    data, augment = Pictures([(9, 8)] * 7), Augment((6, 6), flip=0.5, scale=(0.5, 2))
    options = {"batch_size": 2, "seed": 3}
    expected = list(itertools.islice(train_batches(data, augment, **options), 25))
    monkeypatch.setattr(enough_workers, "_ITEMS", 3)
    monkeypatch.setattr(enough_workers, "_SECONDS", 0)
    monkeypatch.setattr(enough_workers, "_MUCH", -1)
    monkeypatch.setattr(enough_workers, "_GAIN", 0)
    monkeypatch.setattr(cores, "_usable", lambda: set(range(3)))
    with caplog.at_level(logging.INFO), closing(train_batches(data, augment, **options, workers="auto")) as batches:
        found = list(itertools.islice(batches, 25))
    assert len(caplog.messages) == 1 and "trying 3" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO), closing(train_batches(data, augment, **options, workers=FROM_NONE)) as batches:
        from_none = list(itertools.islice(batches, 25))
    assert "trying 2" in caplog.text and "trying 3" in caplog.text
    for one, other in zip(expected, from_none, strict=True):
        assert one.names == other.names and torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
    for one, other in zip(expected, found, strict=True):
        assert one.names == other.names and torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)


@pytest.mark.parametrize(("workers", "cores", "told"), [(16, 1, 0), (17, 1, 1), (32, 8, 0), (33, 8, 1), ("auto", 1, 0)])
def test_more_processes_than_processors_can_do_with_are_told(workers, cores, told, monkeypatch, caplog):
    monkeypatch.setattr(enough_workers, "cores_here", lambda: cores)
    enough_workers.warn_of_many(workers)
    assert len(caplog.messages) == told
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    if workers == 32:
        enough_workers.warn_of_many(workers)
        assert "engine.workers=32 starts 128 loading processes on 8 processors" in caplog.text
