"""Rendezvous of ranks that torchrun or Slurm has started, and the messages that ranks exchange.

Messages are JSON and arrays instead of pickles, so that a process that joins can send values, but no code.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch.distributed import DistError

from dinoseg.utils.errors import UserError

_TEXT = "json"  # name of the JSON text of a message among its arrays, whose names are numbers
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
    if os.environ.get("RANK") == "0":
        # torch blocks without a word, and no log is open yet
        ranks_here = f"{os.environ.get('WORLD_SIZE')} ranks at {os.environ.get('MASTER_ADDR')}"
        print(f"waiting for {ranks_here}, at most {connect:g} s (engine.rendezvous_timeout) ...", file=sys.stderr)
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


def encode_message(value: Any) -> bytes:
    """Return a value as bytes.

    Args:
        value: numbers, text, booleans, None and arrays, in lists, tuples and dicts of any depth.

    Raises:
        TypeError: the value contains another type.
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_to_json(value, arrays)).encode()
    return save({**arrays, _TEXT: np.frombuffer(text, np.uint8)})


def decode_message(content: bytes) -> Any:
    """Return the value of `encode_message`, with the same types; numpy's scalars become Python's.

    Raises:
        UserError: the bytes are no message.
    """
    try:
        arrays = load(content)
        return _from_json(json.loads(arrays[_TEXT].tobytes()), arrays)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"Received {len(content)} bytes that are not a message of a rank ({type(error).__name__}). Start all ranks "
            "with the same version of dinoseg, on a network that only you use."
        ) from error


def _to_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return a value as JSON, in which each object is one of the tags `tuple`, `dict` and `array`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_to_json(each, arrays) for each in value]
    if type(value) is tuple:
        return {"tuple": [_to_json(each, arrays) for each in value]}
    if type(value) is dict:
        return {"dict": [[_to_json(each, arrays) for each in pair] for pair in value.items()]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        name = str(len(arrays))
        arrays[name] = np.asarray(value, order="C")  # safetensors mixes up the values of others
        return {"array": name}
    raise TypeError(f"ranks exchange plain values and arrays, not {type(value).__name__}")


def _from_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_from_json(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "array":
        return arrays[content]
    items = _from_json(content, arrays)
    return {"tuple": tuple, "dict": dict}[tag](items)
