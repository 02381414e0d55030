"""What is said where memory cannot be had."""

import pytest

from dinoseg.inference.memory import OutOfMemory, as_out_of_memory, reason_of
from dinoseg.utils.errors import UserError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "none left"),
        (
            RuntimeError("Caught RuntimeError in worker 0.\n  Traceback\n  out of memory: 7 GiB\n"),
            "out of memory: 7 GiB",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "[enforce fail] DefaultCPUAllo"),
    ],
)
def test_out_of_memory_error_quotes_the_relevant_line(error, reason):
    found = as_out_of_memory(error)
    assert isinstance(found, OutOfMemory) and str(found).startswith(f"Out of memory ({reason}")


def test_reason_of_another_error_is_its_first_line():
    assert reason_of(UserError("a mask is missing\n- of 3.png")) == "a mask is missing"


def test_other_errors_are_no_shortage():
    assert as_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
