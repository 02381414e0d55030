"""Ranks of a job as processes of this machine: started, watched and ended together."""

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.cli.job_checks import MissingDevice
from dinoseg.cli.joined_ranks import use_loopback
from dinoseg.cli.run_mode import LostRank, run_mode, shortages_as_user_errors
from dinoseg.config.plain import to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.utils.cores import cores_here, count_cores, forget_share, limit_threads_to_share
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.interrupt import SIGNALS, Interrupted, forward_signals, raise_on_signal
from dinoseg.utils.workers import end_with_parent, without_script

_LAST_WORDS = 1.0  # seconds for a stuck rank to print its stacks
_GRACE = 60.0  # seconds for the other ranks to save and exit after one has failed
_LOST = 75  # exit status of a rank that has lost another one; the other one has failed
_KILLED = -9  # exit status of a rank after SIGKILL, which Windows does not have
_STOPPED = {status: number for number in SIGNALS for status in (128 + number, -number)}  # exit status to signal number


def run_ranks(cfg: DictConfig, out_dir: Path, devices: int) -> Any:
    """Run a mode in `devices` processes and return the result of the first.

    Signals are forwarded to all of them. If one fails, the others get time to exit by themselves (the first saves its
    progress) and are killed afterwards.

    Raises:
        UserError: a rank has failed and printed the reason.
        Interrupted: a signal has ended them.
    """
    forget_share()
    context = get_context("spawn")  # CUDA does not survive a fork
    receiving, sending = context.Pipe(duplex=False)
    # torch itself would listen on all interfaces, and other machines that reach the store can disturb the training
    store = socket.create_server(("127.0.0.1", 0))
    port = store.getsockname()[1]
    ranks = [
        context.Process(
            target=_run_rank,
            args=(rank, devices, port, None if rank else store, to_container(cfg), out_dir, sending),
        )
        for rank in range(devices)
    ]
    try:
        with store, without_script():
            for rank in ranks:
                rank.start()
        sending.close()
        with forward_signals([rank.pid for rank in ranks if rank.pid]):
            result = _watch(ranks, receiving)
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
    return result


def _watch(ranks: Sequence[BaseProcess], receiving: Any) -> Any:
    """Return the result of the first rank once all have succeeded; raise if one failed."""
    result: list[Any] = []
    failed: int | None = None
    deadline = math.inf
    ending = {rank.sentinel: number for number, rank in enumerate(ranks)}
    waiting: list[Any] = [receiving, *ending]
    while waiting and time.monotonic() < deadline:
        for ready in connection.wait(waiting, timeout=1.0):
            waiting.remove(ready)
            if not isinstance(ready, int):
                # at once: a pipe holds 64 KiB, and the rank blocks until it is read
                result += _receive_result(receiving)
                continue
            number = ending[ready]
            ranks[number].join()
            if ranks[number].exitcode and failed is None:
                failed = number
                deadline = time.monotonic() + _GRACE
            elif ranks[number].exitcode and ranks[failed or 0].exitcode == _LOST:
                failed = number  # the lost rank, whose connections close before it exits
    if failed is None:
        return result[0]
    status = ranks[failed].exitcode
    stuck = [number for sentinel, number in ending.items() if sentinel in waiting]
    if stuck and status == _LOST:
        raise _hung([ranks[number] for number in stuck], stuck)
    if status in _STOPPED:
        raise Interrupted(_STOPPED[status])
    if status == _KILLED:
        raise UserError(
            f"Rank {failed} was killed by SIGKILL, usually because the system ran out of memory. resume=auto resumes "
            "from the last checkpoint."
        )
    ended = f"status {status}" if status is None or status >= 0 else signal.Signals(-status).name
    raise UserError(f"Rank {failed} ended with {ended}: see its message above.")


def _hung(ranks: Sequence[BaseProcess], numbers: Sequence[int]) -> UserError:
    """Make ranks that others waited for in vain print their stacks, and return the error to raise."""
    for rank in ranks:
        if rank.pid and sys.platform != "win32":
            os.kill(rank.pid, signal.SIGUSR1)  # the rank prints its stacks, see `_run_rank`
            rank.join(_LAST_WORDS)
    named = ", ".join(str(number) for number in numbers)
    return UserError(
        f"Rank {named} hung: the other ranks waited for engine.rank_timeout seconds and stopped. Its stack is above, "
        "if it could be printed. If it was only slower, raise engine.rank_timeout. resume=auto resumes from the last "
        "checkpoint."
    )


def _receive_result(receiving: Any) -> list[Any]:
    try:
        return [json.loads(receiving.recv_bytes())]
    except EOFError:  # the first rank ended without a result
        return []


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    store: socket.socket | None,
    cfg: dict[str, Any],
    out_dir: Path,
    sending: connection.Connection,
) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.platform != "win32":
        faulthandler.register(signal.SIGUSR1)
    if rank:
        sending.close()  # so that the parent gets EOF when the only writer exits
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if store is not None:
        os.environ["DINOSEG_STORE_SOCKET"] = str(store.detach())
    use_loopback()
    if "SLURM_CPUS_ON_NODE" in os.environ:  # these ranks share the cores of the process that started them
        os.environ["SLURM_CPUS_ON_NODE"] = str(min(count_cores(), cores_here()))
    limit_threads_to_share()
    register_resolvers()
    try:
        with raise_on_signal(), file_errors_as_user_errors(out_dir), shortages_as_user_errors():
            result = run_mode(OmegaConf.create(cfg), out_dir, world_size)
    except UserError as error:
        if rank and isinstance(error, MissingDevice):  # rank 0 prints the same message
            sys.exit(_LOST)
        print(f"error (rank {rank}): {error}", file=sys.stderr)
        sys.exit(_LOST if isinstance(error, LostRank) else 1)
    except Interrupted as stop:  # the parent reports the saved state
        sys.exit(stop.status)
    if rank == 0:
        sending.send_bytes(json.dumps(result).encode())
