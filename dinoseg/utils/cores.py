"""Processors and memory that this process may use, alone or as one of several ranks."""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinoseg.utils.errors import UserError

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # of Linux control groups, versions 1 and 2
_written: set[str] = set()  # values of OMP_NUM_THREADS that `limit_threads_to_share` set
_TOPOLOGY = Path("/sys/devices/system/cpu")


def count_cores() -> int:
    """Return the number of processors that this process may use, within a container's CPU limit."""
    usable = len(_find_usable_cores())
    return max(1, min(usable, math.ceil(min(cpu_quota(), usable))))


def machine_memory() -> int:
    """Return the machine's memory in bytes, or a container's limit if that is lower."""
    return min(_installed_memory(), memory_limit())


def cores_here() -> int:
    """Return the number of processors for all ranks of this machine, which may exceed this process's own.

    Slurm states it for a step, whether or not its tasks are bound to processors. Elsewhere the ranks share the
    processors that this process may use.
    """
    return _slurm_cores() or count_cores()


def ranks_here() -> int:
    """Return the number of ranks that share this machine's cores: LOCAL_WORLD_SIZE, else WORLD_SIZE, else 1."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        if value := os.environ.get(name):
            return int(value)
    return 1


def check_devices(devices: object) -> None:
    """Refuse another `engine.devices` than the number of ranks; 1 accepts any number.

    Raises:
        UserError: this process is one of another number of ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if devices not in (1, ranks):
        raise UserError(f"engine.devices={devices}: this mode runs on {ranks}. Leave engine.devices out.")


def share_of_cores() -> int:
    """Return this rank's even share of the processors, at least one."""
    return _share(count_cores())


def limit_threads_to_share() -> None:
    """Limit torch's threads to this rank's share of the cores, unless OMP_NUM_THREADS is set.

    Two threads of a core (hyper-threading) count as one. If each rank starts threads for the whole machine, they wait
    for one another's processors: two ranks on two cores took six times as long.
    """
    if os.environ.get("OMP_NUM_THREADS"):  # torchrun sets 1
        return
    usable = _find_usable_cores()
    cores = len({_core_of(number) for number in usable})
    # a quota limits time on any processors, so it may be spent on whole cores
    threads = min(share_of_cores(), max(1, _share(len(usable)) * cores // len(usable)))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _written.add(str(threads))
    torch: Any = sys.modules.get("torch")  # torch reads the variable only once
    if torch is not None:
        torch.set_num_threads(threads)


def forget_share() -> None:
    """Unset the OMP_NUM_THREADS of `limit_threads_to_share`, so that ranks started from here compute their shares."""
    if os.environ.get("OMP_NUM_THREADS") in _written:
        del os.environ["OMP_NUM_THREADS"]
    _written.clear()


def limit_threads_to_quota() -> None:
    """Limit torch's threads to a container's CPU limit, if that is below the machine's processors."""
    if count_cores() < len(_find_usable_cores()):
        limit_threads_to_share()


def _installed_memory() -> int:
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:  # optional for exported models, which then have no memory limit on Windows
            return sys.maxsize
        return int(psutil.virtual_memory().total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _share(cores: int) -> int:
    return max(1, min(cores, (_slurm_cores() or cores) // ranks_here()))


def _slurm_cores() -> int | None:
    value = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return int(value) if re.fullmatch("[1-9][0-9]{0,5}", value) else None


def _find_usable_cores() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core_of(processor: int) -> str:
    """Return an identifier of a processor's core: the list of its hardware threads."""
    try:
        return (_TOPOLOGY / f"cpu{processor}" / "topology/thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def group_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that this process is in, each followed by those above it.

    Args:
        controller: `cpu` or `memory`; version 1 has separate groups for each.
    """
    for line in read_text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = GROUPS / controller if controllers else GROUPS
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def cpu_quota() -> float:
    """Return the number of processors that container limits allow this process; infinity without a limit."""
    quota = math.inf
    for folder in group_folders("cpu"):
        numbers = read_text(folder / "cpu.max").split()  # of version 2: `200000 100000`, or `max 100000`
        numbers = numbers or [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(numbers) == 2 and all(number.isdecimal() and int(number) for number in numbers):  # `-1`: none
            quota = min(quota, int(numbers[0]) / int(numbers[1]))
    return quota


def memory_limit() -> int:
    """Return the bytes that container limits allow this process; the largest integer (sys.maxsize) without a limit."""
    files = (folder / name for folder in group_folders("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    texts = [read_text(file).strip() for file in files]
    return min((int(text) for text in texts if text.isdecimal()), default=sys.maxsize)  # `max`: none


def read_text(path: Path) -> str:
    """Return the content of a system file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
