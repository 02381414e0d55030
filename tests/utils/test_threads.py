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


def test_nobody_shares_work_while_a_pool_is_at_work(three_threads):
    with threads(CPU) as each:
        assert torch.get_num_threads() == 1
        assert list(each(lambda _: torch.get_num_threads(), range(6))) == [1] * 6
    assert torch.get_num_threads() == 3


def test_as_many_calls_as_threads_run_at_once(three_threads):
    meeting = Barrier(3, timeout=600)
    with threads(CPU) as each:
        assert sorted(each(lambda _: meeting.wait(), range(3))) == [0, 1, 2]


def test_another_thread_that_takes_its_threads_back_meanwhile_changes_nothing(three_threads):
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
