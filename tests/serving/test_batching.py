import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest

from dinoseg.serving.batching import ModelWorker

SMALL, LARGE = np.zeros((2, 3, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)


class Gate:
    """A model that waits until it may go on, and notes its batches."""

    def __init__(self):
        self.open, self.seen = threading.Event(), []

    def ids(self, images):
        assert self.open.wait(120)
        self.seen.append([int(image.max()) for image in images])
        if any(image.max() == 13 for image in images):
            raise ValueError("thirteen")
        return np.stack([image[..., 0] for image in images])


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def worker(gate):
    made = ModelWorker(gate.ids, batch_size=3, wait=0.0, max_pixels=60)
    made.submit(SMALL)  # it is busy with this one until the gate opens
    while len(made):
        pass
    yield made
    gate.open.set()
    made.stop()


def results(futures):
    wait(futures, timeout=120)
    return [int(future.result().max()) for future in futures]


def test_what_waits_is_taken_by_size_and_comes_back_to_whom_it_belongs(gate, worker):
    futures = [
        worker.submit(size + np.uint8(n)) for n, size in enumerate((SMALL, LARGE, SMALL, LARGE, SMALL, SMALL), 1)
    ]
    gate.open.set()
    assert results(futures) == [1, 2, 3, 4, 5, 6]
    assert gate.seen == [[0], [1, 3, 5], [2, 4], [6]]


def test_no_batch_has_more_pixels_than_the_limit(gate, worker):
    futures = [worker.submit(LARGE + np.uint8(n)) for n in range(1, 6)]  # 20 pixels each, 60 in all
    huge = worker.submit(np.full((10, 10, 3), 9, np.uint8))
    gate.open.set()
    assert results([*futures, huge]) == [1, 2, 3, 4, 5, 9]
    assert gate.seen == [[0], [1, 2, 3], [4, 5], [9]]


def test_what_is_cancelled_while_it_waits_is_never_computed(gate, worker):
    first, second = worker.submit(SMALL + np.uint8(1)), worker.submit(SMALL + np.uint8(2))
    assert first.cancel()
    gate.open.set()
    assert results([second]) == [2] and gate.seen == [[0], [2]]


def test_a_batch_that_fails_costs_no_other_request(gate, worker):
    good, bad, other = (worker.submit(SMALL + np.uint8(n)) for n in (1, 13, 2))
    gate.open.set()
    assert results([good, other]) == [1, 2]
    with pytest.raises(ValueError, match="thirteen"):
        bad.result(120)
    two = [worker.submit(SMALL + np.uint8(n)) for n in (13, 3)]
    assert results(two[1:]) == [3]


def test_images_of_one_height_and_another_width_go_alone(gate, worker):
    wide = worker.submit(np.full((2, 4, 3), 2, np.uint8))
    small = worker.submit(SMALL + np.uint8(1))
    gate.open.set()
    assert results([wide, small]) == [2, 1] and gate.seen == [[0], [2], [1]]


def test_calls_have_their_turn_between_images(gate, worker):
    first = worker.submit(SMALL + np.uint8(1))
    called = worker.call(lambda: list(gate.seen))
    last = worker.submit(SMALL + np.uint8(2))
    gate.open.set()
    assert results([first, last]) == [1, 2] and called.result(120) == [[0], [1, 2]]


def test_a_stop_finishes_what_waits_and_takes_no_more(gate, worker):
    futures = [worker.submit(SMALL + np.uint8(n)) for n in range(1, 8)]
    gate.open.set()
    worker.stop()
    assert all(future.done() for future in futures) and results(futures) == list(range(1, 8))
    with pytest.raises(RuntimeError, match="stopped"):
        worker.submit(SMALL)


def test_an_idle_model_waits_for_more_as_long_as_it_is_told():
    seen = []
    worker = ModelWorker(
        lambda images: [seen.append(len(images)) or image[..., 0] for image in images][: len(images)],
        batch_size=2,
        wait=600.0,
        max_pixels=100,
    )
    first = worker.submit(SMALL)
    time.sleep(0.03)  # the first one alone starts no batch
    futures = [first, worker.submit(SMALL)]  # a full batch does not wait
    assert wait(futures, timeout=120).not_done == set() and seen == [2, 2]
    worker.stop()


def test_a_stop_waits_for_no_more_images():
    worker = ModelWorker(lambda images: np.stack(images)[..., 0], batch_size=2, wait=600.0, max_pixels=100)
    future = worker.submit(SMALL)
    worker.stop()
    assert future.done()
