"""How many of the machine's processors are this process's, alone or as one of several ranks, and its memory."""

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from dinoseg.utils.control_groups import cpu_quota, memory_limit
from dinoseg.utils.errors import UserError

_SPINS = "300"  # `benchmarks/busy.py` compares numbers
_written: set[str] = set()  # values of OMP_NUM_THREADS that are not the user's
_TOPOLOGY = Path("/sys/devices/system/cpu")


def count_cores() -> int:
    """Return how many processors this process may use, and may keep busy as a container limits it."""
    usable = len(_usable())
    return max(1, min(usable, math.ceil(min(cpu_quota(), usable))))


def machine_memory() -> int:
    """Return the machine's memory in bytes, or what a container leaves of it."""
    return min(_installed_memory(), memory_limit())


def cores_here() -> int:
    """Return how many processors are the ranks' of this machine: more than one may use, where each is bound to its own.

    Slurm says it of a step, whether its tasks are bound to them or not; elsewhere those that this process may use are
    everybody's.
    """
    return _slurm_cores() or count_cores()


def ranks_here() -> int:
    """Return how many ranks share this machine's cores; where nobody says it, all of them.

    Raises:
        UserError: what says it is no number of ranks.
    """
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        if said := os.environ.get(name):
            if not re.fullmatch("[1-9][0-9]{0,5}", said):
                raise UserError(
                    f"{name}={said:.60} must be a whole number of ranks from 1 on, as torchrun sets it. Unset it, or "
                    "let torchrun start the ranks."
                )
            return int(said)
    return 1


def share_of_cores() -> int:
    """Return how many processors are this rank's: an even share, one at least."""
    return _share(count_cores())


def keep_to_share() -> None:
    """Let torch start as many threads as cores are this rank's, where OMP_NUM_THREADS does not say how many.

    Two threads of a core (hyper-threading) count as one. Ranks with the whole machine's threads each wait for one
    another's processors: two on two cores took six times as long.
    """
    if os.environ.get("OMP_NUM_THREADS"):  # torchrun writes 1
        return
    usable = _usable()
    cores = len({_core_of(number) for number in usable})
    # a quota is of time on any processors, and so on as many cores
    threads = min(share_of_cores(), max(1, _share(len(usable)) * cores // len(usable)))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _written.add(str(threads))
    torch: Any = sys.modules.get("torch")  # which reads it once
    if torch is not None:
        torch.set_num_threads(threads)


def forget_share() -> None:
    """Remove what `keep_to_share` wrote for this process: ranks that are started from here find shares of their own."""
    if os.environ.get("OMP_NUM_THREADS") in _written:
        del os.environ["OMP_NUM_THREADS"]
    _written.clear()


def keep_to_quota() -> None:
    """Let torch start as many threads as a container's limit lets run, where there is one that is below the machine."""
    if count_cores() < len(_usable()):
        keep_to_share()


def limit_spinning() -> None:
    """Let threads that wait for one another spin briefly before they sleep, unless the environment says how they wait.

    Without a limit they spin for milliseconds after each of a step's thousands of parallel loops, and take the
    processor from the thread that they wait for where another process is busy. libgomp, which is torch's OpenMP on
    Linux, reads this when torch is imported; processes that are started later inherit it.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _installed_memory() -> int:
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:  # exported models run without it, on Windows within any memory
            return sys.maxsize
        return int(psutil.virtual_memory().total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _share(cores: int) -> int:
    return max(1, min(cores, (_slurm_cores() or cores) // ranks_here()))


def _slurm_cores() -> int | None:
    said = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return int(said) if re.fullmatch("[1-9][0-9]{0,5}", said) else None


def _usable() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core_of(processor: int) -> str:
    """Return what names a processor's core: the processors that it has."""
    try:
        return (_TOPOLOGY / f"cpu{processor}" / "topology/thread_siblings_list").read_text()
    except OSError:
        return str(processor)
