import itertools
import threading
import time
from unittest.mock import Mock

import pytest

from dinoseg.inference import stream
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.utils import waiting


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = {*threading.enumerate()}  # one of an earlier test may still be ending
    yield
    assert {*threading.enumerate()} <= before


@pytest.mark.parametrize(("count", "depth"), [(0, 1), (1, 4), (3, 1), (200, 4)])
def test_everything_passes_in_order(count, depth):
    written = []
    done = run_pipeline(range(count), lambda item: item * 2, written.append, depth=depth)
    assert written == [2 * item for item in range(count)]
    assert done.items == count and done.seconds > 0


def test_the_stages_overlap():
    """Reading item 2, the model with item 1 and writing item 0 wait for one another."""
    at_work = threading.Barrier(3, timeout=600)

    def meet(item, at):
        if item == at:
            at_work.wait()
        return item

    done = run_pipeline(
        (meet(item, 2) for item in range(12)), lambda item: meet(item, 1), lambda item: meet(item, 0), depth=1
    )
    assert done.items == 12 and not at_work.broken


class Broken(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 30])
@pytest.mark.parametrize("stage", ["read", "infer", "write"])
@pytest.mark.parametrize("depth", [1, 4])
def test_a_failing_stage_stops_the_others_and_is_raised(stage, at, depth):
    seen = {"read": [], "infer": [], "write": []}

    def step(name, item):
        if name == stage and item == at:
            raise Broken(f"{name} {item}")
        seen[name].append(item)
        return item

    endless = (step("read", item) for item in itertools.count())
    with pytest.raises(Broken, match=f"^{stage} {at}$") as error:
        run_pipeline(endless, lambda item: step("infer", item), lambda item: step("write", item), depth=depth)
    assert "step" in [frame.name for frame in error.traceback]
    assert seen["write"] == list(range(len(seen["write"])))
    assert len(seen["write"]) <= at
    assert len(seen["read"]) <= at + 2 * depth + 4


def test_a_failure_while_the_others_are_stuck_in_full_queues():
    read = []

    def write(item):
        end = time.monotonic() + 600
        while len(read) < 5 and time.monotonic() < end:  # two in the queues, and one in each stage's hands
            time.sleep(0.01)
        raise Broken

    with pytest.raises(Broken):
        run_pipeline((read.append(item) or item for item in range(1000)), lambda item: item, write, depth=1)
    assert len(read) == 5


def test_the_first_of_two_failures_is_raised():
    failed = threading.Event()
    writers = []

    def write(item):
        writers.append(threading.current_thread())
        failed.set()
        raise Broken("write")

    def read():
        yield 1
        failed.wait(600)
        writers[0].join(600)  # its error is then known
        raise Broken("read")

    with pytest.raises(Broken, match="write"):
        run_pipeline(read(), lambda item: item, write)


def test_an_interrupt_stops_everything():
    infer = Mock(side_effect=[0, 1, 2, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(range(1000), infer, lambda item: None, depth=1)


def join_stages():
    for thread in threading.enumerate():
        if thread.name in stream.STAGES:
            thread.join(60)


def test_failed_stage_ends_the_wait_for_one_that_hangs(monkeypatch):
    started = threading.Event()
    go = threading.Event()
    ended = []

    def read():
        yield 1
        started.wait(600)
        raise Broken("read")

    def write(item):
        started.set()
        go.wait(30)
        ended.append(item)

    monkeypatch.setattr(stream, "_ENDING", 0.1)
    with pytest.raises(Broken, match="read"):
        run_pipeline(read(), lambda item: item, write)
    assert not ended
    go.set()
    join_stages()


@pytest.mark.parametrize(("stage", "items"), [("read", 1), ("write", 1), ("write", 5)])
def test_signal_ends_a_pipeline_whose_stage_hangs(stage, items, monkeypatch, caplog):
    go = threading.Event()

    def interrupt(_):
        raise KeyboardInterrupt  # as a signal does in the main thread

    def write(item):
        if stage == "write":
            go.wait()

    def read():
        yield from range(items)
        if stage == "read":
            go.wait()

    monkeypatch.setattr(stream, "_PATIENCE", 0)
    monkeypatch.setattr(stream, "_ENDING", 0.1)
    monkeypatch.setattr(waiting.log, "filters", [interrupt])
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(read(), lambda item: item, write, depth=1)
    go.set()
    join_stages()


def test_the_report_names_the_stage_that_is_at_work_the_longest():
    times = [number / 1000 for number in range(1, 101)]
    passed = Throughput(100, 10.1, {"read": times, "model": [0.001] * 100, "write": []})
    assert passed.report() == (
        "read 50.5 ms (p95 95.0), model 1.0 ms (p95 1.0); the slowest stage is read, busy 50% of the time"
    )
    assert Throughput(0, 0.1, {}).report() == ""
