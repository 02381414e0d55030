"""Slurm tasks as ranks: srun's environment variables translated into torchrun's."""

import os
import re

from dinoseg.utils.errors import UserError

_PORTS = range(20_000, 40_000)
_MOST = 10**6  # tasks of a step
_TASKS = "([1-9][0-9]{0,4})(?:[(]x([0-9]{1,5})[)])?"  # tasks of one machine, or of several in a row


def join_slurm() -> None:
    """Set torchrun's variables from Slurm's where `srun` has started several tasks; the first node is MASTER_ADDR.

    In an sbatch script's own shell there are no tasks: only srun sets the variables of a step.

    Raises:
        UserError: if a variable of the task is missing or malformed.
    """
    environment = os.environ
    if "WORLD_SIZE" in environment:
        return
    tasks = _of_slurm("SLURM_STEP_NUM_TASKS", least=1, most=_MOST, default="1")
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


def _of_slurm(name: str, *, least: int = 0, most: int = 2**32, default: str | None = None) -> int:
    """Return the integer in a variable of a task."""
    text = os.environ.get(name, default)
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
