"""Rendezvous of ranks that torchrun or Slurm has started, and texts that they exchange before the process group."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.distributed import DistError

from dinoseg.utils.errors import UserError

_stores: list[Any] = []  # kept open: rank 0 serves the store, which the others may still read
_numbers = count()  # of the exchanged texts, equal on all ranks


def open_store(seconds: float) -> tuple[Any, int, int]:
    """Return the key-value store of all ranks, this rank's number and the number of ranks.

    Args:
        seconds: timeout of the connection.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    with reach_ranks(seconds):
        store, rank, ranks = _connect(timedelta(seconds=seconds))
    # torchrun reuses its store when it restarts ranks, with stale addresses of dead ranks
    return torch.distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store), rank, ranks


def _connect(timeout: timedelta) -> tuple[Any, int, int]:
    """Return torch's store, this rank's number and the number of ranks.

    Rank 0 hosts the store: on the socket of `DINOSEG_STORE_SOCKET`, which `cli/ranks.py` opens for ranks of one
    machine unless torchrun or Slurm starts them, else on all interfaces.
    """
    environment = os.environ
    if "DINOSEG_STORE_SOCKET" not in environment:
        store, rank, ranks = next(torch.distributed.rendezvous("env://", timeout=timeout))
        return store, rank, ranks
    ranks = int(environment["WORLD_SIZE"])
    store = torch.distributed.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        ranks,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        # a copy, which the store closes: a later engine of this process needs the socket again
        master_listen_fd=os.dup(int(environment["DINOSEG_STORE_SOCKET"])),
    )
    return store, int(environment["RANK"]), ranks


def share_from_rank0(text: Callable[[], str], *, connect: float, wait: float) -> str:
    """Call `text` on rank 0 only, and return its result on every rank; rank 0 waits until all have read it.

    Args:
        text: makes the text.
        connect: seconds that ranks wait for one another.
        wait: seconds that the other ranks wait for the text.

    Raises:
        UserError: on every rank, if rank 0 raises one; or rank 0 cannot be reached.
    """
    store, rank, ranks = open_store(connect)
    _stores.append(store)
    key = f"text_{next(_numbers)}"
    if rank == 0:
        publish = partial(_publish, store, key, ranks, connect)
        try:
            content = text()
        except UserError as error:
            publish(f"error {error}")
            raise
        publish(f"text {content}")
        return content
    store.set_timeout(timedelta(seconds=wait))
    with reach_ranks(wait):
        kind, _, content = store.get(key).decode().partition(" ")
        store.set(f"{key}_read_by_{rank}", "")
    if kind == "error":
        raise UserError(content)
    return content


def _publish(store: Any, key: str, ranks: int, seconds: float, content: str) -> None:
    """Set a key, and wait until all other ranks have read it: the store ends with this process."""
    store.set(key, content)
    with suppress(DistError):  # of ranks that have ended
        store.wait([f"{key}_read_by_{rank}" for rank in range(1, ranks)], timedelta(seconds=seconds))


@contextmanager
def reach_ranks(seconds: float) -> Iterator[None]:
    """Convert errors of ranks that do not reach one another within some seconds.

    Raises:
        UserError: with rank, address and reason.
    """
    try:
        yield
    except (DistError, ValueError) as error:  # ValueError: a variable is missing or not a number
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
        host, port, rank, ranks = (os.environ.get(name) for name in names)
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(
            f"Rank {rank} of {ranks} did not reach the others at {host}:{port} within {seconds:g} s ({reason}). Check "
            "that all ranks were started, and that MASTER_ADDR is the machine of rank 0, reachable by that name and "
            "port from all others; for slow starts, raise engine.rendezvous_timeout."
        ) from error
