"""Memory budget of a training on a device, which need not be present."""

import re
from dataclasses import dataclass

from dinoseg.extensions.auto.step_bytes import StepBytes
from dinoseg.utils.errors import UserError

KINDS = ("cpu", "cuda")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B", re.IGNORECASE)
# CUDA: its context and library workspaces; gaps between allocator blocks. CPU: code that is loaded on first use; holes
# in the heap of the C library, see benchmarks/step_memory.py
_OVERHEAD = {"cuda": 2**30, "cpu": 3 * 2**27}
_HOLES = {"cuda": 1.08, "cpu": 1.75}


def memory_of(text: str | float) -> int:
    """Return the bytes of an amount such as 24GiB (2^30 bytes each) or 24GB (10^9).

    Raises:
        UserError: it is not an amount with a unit, or zero.
    """
    found = _AMOUNT.fullmatch(str(text).strip())
    if found is None or float(found[1]) == 0:
        raise UserError(
            f"mode.memory={text}: give an amount with its unit, such as 24GiB, 24GB or 800MiB, or null for the free "
            "memory of this machine."
        )
    power = " kMGT".index(found[2].upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


@dataclass(frozen=True)
class Target:
    """The device that a training has to fit.

    Attributes:
        kind: cpu or cuda.
        memory: available bytes.
        bf16: whether it computes in bfloat16.
        world_size: devices that share a batch.
    """

    kind: str
    memory: int
    bf16: bool
    world_size: int = 1

    def need(self, step: StepBytes) -> int:
        """Return the bytes that a training with such steps takes, gaps and libraries included."""
        return round(step.peak * _HOLES[self.kind]) + _OVERHEAD[self.kind]
