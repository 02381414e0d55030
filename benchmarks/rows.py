"""What benchmarks have in common: their ratios in one form, for the table of `run.py`, and the machine in words."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

FILE = "DINOSEG_BENCHMARK_ROWS"  # the environment's name for the file that rows go to


@dataclass(frozen=True)
class Row:
    """A ratio: how many times better we are than a reference of the same run.

    Args:
        what: is done, and what of it is compared: time, memory or a rate.
        reference: by what other way.
        ratio: above 1 where we are better; None: it was not measured.
        needed: the least that is promised; None: nothing is.
        skipped: why it was not measured, and what to do about that.
    """

    what: str
    reference: str
    ratio: float | None
    needed: float | None = None
    skipped: str = ""

    def __post_init__(self) -> None:
        assert (self.ratio is None) == bool(self.skipped)

    @property
    def missed(self) -> bool:
        """Whether less is reached than is promised."""
        return self.ratio is not None and self.needed is not None and not self.ratio >= self.needed


def tell(*rows: Row) -> None:
    """Add rows to the file that `run.py` reads, if it has asked for them."""
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(asdict(row))}\n" for row in rows)


def machine(packages: Sequence[str] = ("torch", "numpy")) -> str:
    """Return processor, cores, load and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {versions}"
    )
