"""Linux control groups, versions 1 and 2: the CPU and memory limits of this process."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


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
