"""Ranks that Slurm, torchrun or a user has started: this process joins them by its environment variables."""

import os
import re
import socket
import sys

from dinoseg.utils.cores import limit_threads_to_share

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # interface on which the ranks of one machine listen
_PORTS = range(20_000, 40_000)
_TASKS = "([1-9][0-9]{0,4})(?:[(]x([0-9]{1,5})[)])?"  # tasks of one machine, or of several in a row


def is_first_rank() -> bool:
    """Return whether this process writes the run's files: it runs alone or is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def has_other_ranks() -> bool:
    """Return whether this process is one of several ranks."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def join_ranks() -> None:
    """Join the ranks that Slurm, torchrun or a user has started, if any, and share the processors with them."""
    # in an sbatch script's own shell there are no tasks: only srun sets the variables of a step
    if "WORLD_SIZE" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        join_slurm()
    if "WORLD_SIZE" in os.environ:
        listen_on_loopback()
        limit_threads_to_share()


def use_loopback() -> None:
    """Let the ranks of one machine exchange tensors over loopback only."""
    if sys.platform in _LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
        os.environ["NCCL_SOCKET_IFNAME"] = f"={_LOOPBACK[sys.platform]}"


def listen_on_loopback() -> None:
    """Let ranks that a user has started with MASTER_ADDR=127.0.0.1 listen on loopback only."""
    environment = os.environ
    # not "localhost", which some schedulers give rank 0 of several machines
    if environment.get("MASTER_ADDR") != "127.0.0.1" or "TORCHELASTIC_RUN_ID" in environment:  # torchrun serves it
        return
    use_loopback()
    port = environment.get("MASTER_PORT", "")
    if environment.get("RANK") != "0" or "DINOSEG_STORE_SOCKET" in environment or not port.isdecimal():
        return
    # torch itself would listen on all interfaces
    store = socket.create_server(("127.0.0.1", int(port)))
    environment["DINOSEG_STORE_SOCKET"] = str(store.detach())


def join_slurm() -> None:
    """Set torchrun's variables from Slurm's where `srun` has started several tasks; the first node is MASTER_ADDR."""
    environment = os.environ
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if tasks == 1:
        return
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node()
    if "MASTER_PORT" not in environment:
        # steps of a job may run at the same time
        number = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
        environment["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(_tasks_here(tasks)),
    }


def _tasks_here(tasks: int) -> int:
    """Return the number of the step's tasks on this machine; of all tasks, where srun does not state it."""
    text, node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), os.environ.get("SLURM_NODEID", "")
    if re.fullmatch(f"{_TASKS}(,{_TASKS})*", text) and re.fullmatch("[0-9]{1,6}", node):
        machines = 0  # machines read so far
        for count, times in re.findall(_TASKS, text):
            machines += int(times or 1)
            if int(node) < machines:
                return int(count)
    return tasks


def _first_node() -> str:
    """Return the name of the step's first machine."""
    # replace each bracket of a list such as gpu[03-04,7],n1 by its first number
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", os.environ["SLURM_STEP_NODELIST"])
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")
