"""Where ranks that were started apart, on several machines too, find one another, and how long they wait at work."""

import os
import warnings
from datetime import timedelta

import torch

from dinoseg.utils.errors import UserError

_ALIKE = r"(?s)Grad strides do not match bucket view strides.*grad\.sizes\(\) = \[(1,|\d+, \d+, 1, 1\])"


def meet(device: torch.device, seconds: float, at_work: float) -> None:
    """Join the group of ranks that the environment names (`WORLD_SIZE`, `MASTER_ADDR` ...), if it names any.

    Args:
        device: what the ranks compute on, which decides how they talk.
        seconds: that they wait for one another.
        at_work: seconds that they wait for one another later; then torch ends those that wait.

    Raises:
        UserError: the first one cannot be reached, or some of the others do not come.
    """
    distributed, world = torch.distributed, os.environ.get("WORLD_SIZE", "1")
    if device.type == "mps" and (world != "1" or distributed.is_initialized()):
        raise UserError(
            f"engine.devices={world}: torch trains on MPS in one process alone. Give engine.devices=1, or "
            "engine.device=cpu to train in several processes on the processor."
        )
    if world == "1" or distributed.is_initialized():
        return
    # DDP's, of tokens (1, N, C) before a rank's only sample, to be part of a larger gradient costs nothing; and of
    # convolutions of a single pixel, whose channels lie one after another in either layout
    warnings.filterwarnings("ignore", _ALIKE)
    place, rank = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", os.environ.get("RANK")
    try:
        store, number, ranks = next(distributed.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        patience = timedelta(seconds=at_work)
        store.set_timeout(patience)
        # torchrun keeps its store when it starts ranks again, and with it addresses of those that are dead
        store = distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=patience)
    except (distributed.DistError, ValueError) as error:  # ValueError: a variable that is missing or no number
        said = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(
            f"Rank {rank} of {world} did not meet the others at {place} within {seconds:g} s ({said}). Look whether "
            "all ranks were started, and whether MASTER_ADDR is the first one's machine, reached by that name and port "
            "from all others; slow starts get more time by engine.rendezvous_timeout."
        ) from error
