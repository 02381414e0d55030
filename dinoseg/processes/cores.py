"""How many of the machine's processors are this process's, alone or as one of several ranks."""

import os
import re


def count_cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here() -> int:
    """Return how many ranks share this machine's cores; where nobody says it, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def share_of_cores() -> int:
    """Return how many processors are this rank's: what Slurm gives to each task, else an even share; one at least.

    A task of Slurm may be bound to its own processors, so that an even share of those would be too few.
    """
    world, given = os.environ.get("WORLD_SIZE"), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if world and os.environ.get("SLURM_STEP_NUM_TASKS") == world and re.fullmatch("[1-9][0-9]{0,5}", given):
        return min(count_cores(), int(given))
    return max(1, count_cores() // ranks_here())


def keep_to_share() -> None:
    """Let libraries that are loaded from now on start as many threads as processors are this rank's.

    What OMP_NUM_THREADS says already stays: torchrun writes 1. Without it accelerate gives each rank on a CPU the whole
    machine's, and threads that wait for one another's processors take six times as long (two ranks on two cores).
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(share_of_cores())
