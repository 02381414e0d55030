"""What a training may take of the memory of a device, which need not be here."""

import re
from dataclasses import dataclass

from dinoseg.autotune.step_bytes import StepBytes
from dinoseg.utils.errors import UserError

KINDS = ("cpu", "cuda")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B", re.IGNORECASE)
# of CUDA: its context and the workspaces of its libraries; blocks of the allocator that are of no use to one another.
# Of a CPU: code that is read when it is first run; holes of the C library's heap, see benchmarks/step_memory.py
_BESIDE = {"cuda": 2**30, "cpu": 3 * 2**27}
_HOLES = {"cuda": 1.08, "cpu": 1.75}
_HEAP = 1.2  # times the heap that tensors alone take: operations take memory for themselves among these


def memory_of(text: str | float) -> int:
    """Return the bytes of an amount such as 24GiB (2^30 bytes each) or 24GB (10^9).

    Raises:
        UserError: it is none, or nothing.
    """
    found = _AMOUNT.fullmatch(str(text).strip())
    if found is None or float(found[1]) == 0:
        raise UserError(
            f"mode.memory={text}: give an amount with its unit, such as 24GiB, 24GB or 800MiB, or null for what is "
            "free here."
        )
    power = " kMGT".index(found[2].upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


@dataclass(frozen=True)
class Target:
    """The device that a training is to fit.

    Attributes:
        kind: cpu or cuda.
        memory: bytes that it has to give.
        bf16: whether it computes in bfloat16.
        world: devices that share a batch.
        seen: by how much more a step was seen to take than was foretold of it.
    """

    kind: str
    memory: int
    bf16: bool
    world: int = 1
    seen: float = 1.0

    @property
    def beside(self) -> int:
        """Bytes that are taken beside tensors and what lies between them."""
        return _BESIDE[self.kind]

    def need(self, step: StepBytes) -> int:
        """Return the bytes that a training with such steps takes of it, holes and libraries included."""
        taken = max(step.peak * _HOLES[self.kind], step.heap * _HEAP)
        return round(taken * self.seen) + self.beside
