"""Ranks that others start: Slurm's tasks, torchrun that starts them again; and those that never meet."""

import math
import os
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
from daemons import wait_until

from dinoseg.cli.joined_ranks import is_first_rank, join_ranks, join_slurm
from dinoseg.training.engine import join_process_group
from dinoseg.utils import cores
from dinoseg.utils.errors import UserError

STEP = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4"}
TASK = {**STEP, "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[03-04,7],n1"}
OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


@pytest.fixture
def environment(monkeypatch):
    """Return an environment of its own, without ranks and a container's limits."""
    monkeypatch.setattr(cores, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(
        os, "environ", own := {k: v for k, v in os.environ.items() if k not in OWN and "SLURM" not in k}
    )
    return own


@pytest.mark.parametrize(
    ("given", "address", "port"),
    [
        ({}, "gpu03", "20087"),
        ({"SLURM_STEP_NODELIST": "n1,n2"}, "n1", "20087"),
        ({"SLURM_STEP_NODELIST": "n1"}, "n1", "20087"),
        ({"SLURM_STEP_NODELIST": "a[7,9]-b[2-3].site,c"}, "a7-b2.site", "20087"),
        # a given address needs nothing of Slurm
        ({"MASTER_ADDR": "n7", "MASTER_PORT": "9", "SLURM_STEP_NODELIST": "", "SLURM_JOB_ID": ""}, "n7", "9"),
    ],
)
def test_a_task_of_slurm_is_a_rank(environment, given, address, port):
    environment |= TASK | given
    join_slurm()
    assert [environment[name] for name in OWN[:5]] == ["2", "0", "4", address, port] and not is_first_rank()


@pytest.mark.parametrize("own", [{"WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None}])
def test_single_task_environment_is_left_alone(environment, own):
    """torchrun below srun, a single task, and the shell of an sbatch script, which is no step."""
    environment |= TASK | {name: value for name, value in own.items() if value}
    for name in (name for name, value in own.items() if value is None):
        del environment[name]
    before = dict(environment)
    join_ranks()
    assert {name: environment[name] for name in before} == before and environment.keys() - before <= {"OMP_NUM_THREADS"}


NODES = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}


@pytest.mark.parametrize(
    ("said", "here"),
    [
        ({}, 4),
        (NODES, 4),  # of which machine it is, is not said
        (NODES | {"SLURM_NODEID": "0"}, 2),
        (NODES | {"SLURM_NODEID": "2"}, 1),
        (NODES | {"SLURM_NODEID": "3"}, 4),
        (NODES | {"SLURM_NODEID": "-1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x", "SLURM_NODEID": "0"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "0", "SLURM_NODEID": "0"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "128(x12)", "SLURM_NODEID": "11"}, 128),
    ],
)
def test_tasks_know_how_many_are_on_their_machine(environment, said, here):
    environment |= TASK | said
    join_slurm()
    assert environment["LOCAL_WORLD_SIZE"] == str(here)


@pytest.mark.parametrize(
    ("said", "usable", "share"),
    [
        ({}, 12, 12),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 12, 3),
        ({"WORLD_SIZE": "4"}, 12, 3),
        ({"LOCAL_WORLD_SIZE": "16"}, 12, 1),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 8, 8),  # each task is bound to its own
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 32, 8),  # none is
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "8"}, 32, 2),  # none is, on a machine that others use, too
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 2, 2),  # no more than a task may use
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_ON_NODE": "256"}, 128, 128),
        ({"SLURM_CPUS_ON_NODE": "8"}, 32, 8),
        *(({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": odd}, 32, 8) for odd in ("9" * 5000, "0", "-4", "x", "")),
    ],
)
def test_ranks_share_a_machine(environment, set_cores, said, usable, share):
    set_cores(usable)
    environment |= said
    assert cores.share_of_cores() == share


@pytest.mark.parametrize(
    ("said", "usable", "siblings", "threads"),
    [
        ({}, 12, 1, 3),
        ({"OMP_NUM_THREADS": ""}, 12, 1, 3),
        ({}, 2, 1, 1),
        ({}, 96, 2, 12),
        ({}, 4, 2, 1),
        ({}, 12, 0, 3),
    ],
)
def test_a_rank_keeps_to_its_cores(environment, monkeypatch, set_cores, tmp_path, said, usable, siblings, threads):
    """Also where torch was loaded before, and where nothing is known of the threads of a core (0 siblings)."""
    for number in range(usable if siblings else 0):
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology/thread_siblings_list").write_text(f"{number % (usable // siblings)},\n")
    told = []
    set_cores(usable)
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    environment |= {"LOCAL_WORLD_SIZE": "4"} | said
    cores.limit_threads_to_share()
    assert (environment["OMP_NUM_THREADS"], told) == (str(threads), [threads])


def test_given_thread_count_is_unchanged(environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # nor is it loaded
    environment |= {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "9"}
    cores.limit_threads_to_share()
    assert environment["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize(
    ("rank", "changes", "said"),
    [
        ("1", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}, "Rank 1 of 2 did not reach .* at 127.0.0.1:9 within"),
        ("0", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "1/2 clients joined.*engine.rendezvous_timeout"),
        ("1", {"MASTER_PORT": "9"}, "MASTER_ADDR expected, but not set"),
        ("x", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}, "Rank x of 2"),
    ],
)
def test_ranks_that_do_not_meet_say_where_and_for_how_long(environment, rank, changes, said):
    environment |= {"RANK": rank, "WORLD_SIZE": "2", **changes}
    with pytest.raises(UserError, match=said):
        join_process_group(torch.device("cpu"), 1.0, 60.0)


def test_ranks_use_the_given_timeout_and_ignore_equal_strides(environment, monkeypatch):
    environment |= {"RANK": "1", "WORLD_SIZE": "2"}
    told = {}
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **given: told.update(given))
    said = "Grad strides do not match bucket view strides.\ngrad.sizes() = [{}], strides() = [696, 24, 1]"
    with warnings.catch_warnings():
        join_process_group(torch.device("cpu"), 5.0, 7.5)
        warnings.warn(said.format("1, 4, 24"), stacklevel=1)
        warnings.warn(said.format("11, 768, 1, 1"), stacklevel=1)  # of `head.linear_skip`
        for other in ("16, 4, 24", "11, 768, 3, 3"):
            with pytest.raises(UserWarning, match="strides"):
                warnings.warn(said.format(other), stacklevel=1)
    assert told["timeout"].total_seconds() == 7.5 == told["store"].timeout.total_seconds()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_threads_of_a_group_end_with_it(environment, monkeypatch):
    """One that runs while the interpreter exits may abort it, so that a finished job fails."""
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 1)]))
    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        monkeypatch.delitem(sys.modules, name)
    before = count_gloo_threads()
    join_process_group(torch.device("cpu"), 5.0, 5.0)
    try:
        wait_until(lambda: count_gloo_threads() > before, seconds=10)  # a thread names itself when it runs
        import_module("torch.distributed.nn.functional")  # as transformers does
    finally:
        torch.distributed.destroy_process_group()
    wait_until(lambda: count_gloo_threads() == before, seconds=10)


def count_gloo_threads() -> int:
    count = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # of a thread that ends
            count += "gloo" in path.read_text()
    return count
