"""A container's share of the processors, the threads that follow from it, and how they wait and run torch."""

import os
import sys
from threading import Barrier, Thread

import psutil
import pytest
import torch

from dinoseg.utils import cores
from dinoseg.utils.devices import threads


@pytest.fixture
def groups(tmp_path, monkeypatch, set_cores):
    """Write files of control groups, and let 64 processors with two threads a core be usable."""
    for number in range(64):
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology/thread_siblings_list").write_text(f"{number % 32}\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    set_cores(64)
    monkeypatch.setattr(cores, "PROC", tmp_path)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    monkeypatch.setattr(os, "environ", {})

    def write(lines, files):
        for name, text in {"self/cgroup": lines, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("lines", "files", "count"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # as a container sees its own group
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),  # limited by one above
        ("0::/a\n", {"a/cpu.max": "20000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "9900000 100000\n"}, 64),
        ("0::/a\n", {"a/cpu.max": "100000 0\n"}, 64),
        ("0::/a\n", {"a/cpu.max": "odd\n"}, 64),
        ("1:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("1:cpu,cpuacct:/gone\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "25000\n"}, 2),
        ("1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 64),
        ("1:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "100000\n", "cpuset/a/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_a_containers_quota_bounds_the_processors(groups, lines, files, count):
    groups(lines, files)
    assert cores.count_cores() == cores.share_of_cores() == count


@pytest.mark.parametrize(
    ("quota", "environment", "threads"),
    [
        ("max", {}, None),
        ("800000", {}, "8"),  # on as many of the 32 cores
        ("6000000", {}, "32"),  # no more than there are cores
        ("800000", {"WORLD_SIZE": "2"}, "4"),
        ("800000", {"OMP_NUM_THREADS": "5"}, "5"),
    ],
)
def test_threads_follow_the_quota_unless_set(groups, monkeypatch, quota, environment, threads):
    groups("0::/\n", {"cpu.max": f"{quota} 100000\n"})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    os.environ.update(environment)
    cores.limit_threads_to_quota()
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_threads_of_one_job_are_not_inherited_by_the_next(groups, monkeypatch):
    groups("0::/\n", {"cpu.max": "800000 100000\n"})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    cores.limit_threads_to_quota()
    cores.forget_share()
    assert "OMP_NUM_THREADS" not in os.environ
    os.environ["OMP_NUM_THREADS"] = "5"
    cores.limit_threads_to_quota()
    cores.forget_share()
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("lines", "files", "bytes_"),
    [
        ("0::/a/b\n", {"a/memory.max": "4096\n", "a/b/memory.max": "max\n"}, 4096),
        ("1:memory:/a\n", {"memory/a/memory.limit_in_bytes": "8192\n"}, 8192),
        ("0::/\n", {"memory.max": f"{2**63}\n"}, psutil.virtual_memory().total),
        ("0::/\n", {}, psutil.virtual_memory().total),
    ],
)
def test_a_containers_memory_is_the_machines(groups, lines, files, bytes_):
    groups(lines, files)
    assert cores.machine_memory() == bytes_


@pytest.mark.parametrize(("platform", "bytes_"), [("linux", psutil.virtual_memory().total), ("win32", sys.maxsize)])
def test_without_psutil_only_windows_does_not_know_its_memory(groups, monkeypatch, platform, bytes_):
    groups("0::/\n", {})
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(cores.sys, "platform", platform)
    assert cores.machine_memory() == bytes_


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
        other = Thread(target=torch.set_num_threads, args=(3,))  # what threads to come begin with
        other.start()
        other.join()
        assert list(each(lambda _: torch.get_num_threads(), range(6))) == [1] * 6
    assert torch.get_num_threads() == 3


def test_calls_run_concurrently_on_all_threads(three_threads):
    meeting = Barrier(3, timeout=600)
    with threads(CPU) as each:
        assert sorted(each(lambda _: meeting.wait(), range(3))) == [0, 1, 2]


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
