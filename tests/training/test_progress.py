import sys

import pytest
import torch

from dinoseg.training.progress import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
def test_peak_memory_counts_from_the_last_reset():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    block = torch.ones(300 * 2**20, dtype=torch.uint8)
    high = peak_memory(CPU)
    assert high > before + 250 * 2**20
    del block
    assert peak_memory(CPU) > high - 2**20
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < high - 250 * 2**20
