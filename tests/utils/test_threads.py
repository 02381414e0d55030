from threading import Barrier, Thread

import pytest
import torch

from dinoseg.utils.threads import threads

CPU = torch.device("cpu")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_pool_threads_run_torch_single_threaded(three_threads):
    with threads(CPU) as each:
        assert torch.get_num_threads() == 1
        assert list(each(lambda _: torch.get_num_threads(), range(6))) == [1] * 6
    assert torch.get_num_threads() == 3


def test_calls_run_concurrently_on_all_threads(three_threads):
    meeting = Barrier(3, timeout=600)
    with threads(CPU) as each:
        assert sorted(each(lambda _: meeting.wait(), range(3))) == [0, 1, 2]


def test_other_threads_do_not_change_the_pool(three_threads):
    with threads(CPU) as each:
        other = Thread(target=torch.set_num_threads, args=(3,))  # what threads to come begin with
        other.start()
        other.join()
        assert list(each(lambda _: torch.get_num_threads(), range(6))) == [1] * 6


def test_a_failure_gives_the_threads_back(three_threads):
    with pytest.raises(ZeroDivisionError), threads(CPU) as each:
        list(each(lambda number: 1 // number, range(2)))
    assert torch.get_num_threads() == 3


def test_without_threads_of_the_cpu_the_map_is_pythons(three_threads):
    with threads(torch.device("meta")) as each:
        assert each is map and torch.get_num_threads() == 3
    torch.set_num_threads(1)
    with threads(CPU) as each:
        assert each is map
