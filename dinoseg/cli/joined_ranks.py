"""Ranks that Slurm, torchrun or a user has started: this process joins them by its environment variables."""

import os
import re
import socket
import sys

from dinoseg.utils.cores import limit_threads_to_share
from dinoseg.utils.errors import UserError

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # interface on which the ranks of one machine listen
_PORTS = range(20_000, 40_000)
_MAX = 10**6  # tasks of a step
_TASKS = "([1-9][0-9]{0,4})(?:[(]x([0-9]{1,5})[)])?"  # tasks of one machine, or of several in a row


def is_first_rank() -> bool:
    """Return whether this process writes the run's files: it runs alone or is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def has_other_ranks() -> bool:
    """Return whether this process is one of several ranks."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def join_ranks() -> None:
    """Join the ranks that Slurm, torchrun or a user has started, if any, and share the processors with them.

    Raises:
        UserError: see `join_slurm` and `listen_on_loopback`.
    """
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
    """Let ranks that a user has started with MASTER_ADDR=127.0.0.1 listen on loopback only.

    Raises:
        UserError: the port of rank 0 is in use.
    """
    environment = os.environ
    # not "localhost", which some schedulers give rank 0 of several machines
    if environment.get("MASTER_ADDR") != "127.0.0.1" or "TORCHELASTIC_RUN_ID" in environment:  # torchrun serves it
        return
    use_loopback()
    port = environment.get("MASTER_PORT", "")
    if environment.get("RANK") != "0" or "DINOSEG_STORE_SOCKET" in environment or not port.isdecimal():
        return
    try:
        # torch itself would listen on all interfaces
        store = socket.create_server(("127.0.0.1", int(port)))
    except (OSError, OverflowError) as error:
        raise UserError(f"Rank 0 cannot listen on MASTER_PORT={port} ({error}). Choose a free port.") from error
    environment["DINOSEG_STORE_SOCKET"] = str(store.detach())


def join_slurm() -> None:
    """Set torchrun's variables from Slurm's where `srun` has started several tasks; the first node is MASTER_ADDR.

    Raises:
        UserError: if a variable of the task is missing or malformed.
    """
    environment = os.environ
    tasks = _of_slurm("SLURM_STEP_NUM_TASKS", least=1, most=_MAX)
    if tasks == 1:
        return
    rank, local = _of_slurm("SLURM_PROCID", most=tasks - 1), _of_slurm("SLURM_LOCALID", most=tasks - 1)
    here = _tasks_here(tasks)
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node()
    if "MASTER_PORT" not in environment:
        number = _of_slurm("SLURM_JOB_ID") * 7 + _of_slurm("SLURM_STEP_ID")  # steps of a job may run at the same time
        environment["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(here),
    }


def _of_slurm(name: str, *, least: int = 0, most: int = 2**32) -> int:
    """Return the integer in a variable of a task."""
    text = os.environ.get(name)
    if text is None or not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise _not_of_task(name, f"must be a whole number from {least} to {most}")
    return int(text)


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
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", os.environ.get("SLURM_STEP_NODELIST", ""))
    host = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")
    if not re.fullmatch(r"\w[\w.-]*", host):
        raise _not_of_task("SLURM_STEP_NODELIST", "must name the machines of the step, such as gpu[03-04],n1")
    return host


def _not_of_task(name: str, rule: str) -> UserError:
    setting = f"{name}={os.environ[name]:.60}" if name in os.environ else f"{name} is missing: it"
    return UserError(
        f"{setting} {rule}. Start the ranks by `srun python -m dinoseg ...`, which sets it for each rank; for a single "
        "process, set SLURM_STEP_NUM_TASKS=1."
    )
