"""Ranks of a job as processes of this machine: started, watched and ended together."""

import atexit
import faulthandler
import gc
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.plain import to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment.log_file import announce, configure_log
from dinoseg.utils.cores import cores_here, count_cores, forget_share, limit_threads_to_share
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.interrupt import SIGNALS, Interrupted, forward_signals, raise_on_signal
from dinoseg.utils.workers import end_with_parent, without_script

LAUNCH_KEYS = (
    "devices",
    "resume_from",
    "keeps_folder",
    "resumes_with",
    "check",
)  # keys of a mode that are not arguments of its function
_LAST_WORDS = 1.0  # seconds for a stuck rank to print its stacks
_GRACE = 60.0  # seconds for the other ranks to save and exit after one has failed
_LOST = 75  # exit status of a rank that has lost another one; the other one has failed
_GONE = re.compile("by peer|remote process exited")  # in gloo's and NCCL's messages on a lost rank
_STUCK = re.compile("[Tt]imed out|[Ww]ait timeout")  # if a rank does not respond: gloo, NCCL and the store
_KILLED = -9  # exit status of a rank after SIGKILL, which Windows does not have
_STOPPED = {status: number for number in SIGNALS for status in (128 + number, -number)}  # exit status to signal number
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # interface on which the ranks of one machine listen
_PORTS = range(20_000, 40_000)
_MAX = 10**6  # tasks of a step
_TASKS = "([1-9][0-9]{0,4})(?:[(]x([0-9]{1,5})[)])?"  # tasks of one machine, or of several in a row


class LostRank(UserError):
    """Error of a rank that waited for another one that is gone or stuck: the other one has failed."""


def run_mode(cfg: DictConfig, out_dir: Path) -> Any:
    """Call the mode's function in this process."""
    # or spawned processes would spawn theirs, too: seconds per loader worker, and joblib's could not start any
    set_start_method(None, force=True)
    if cfg.mode.get("keeps_folder", True):
        configure_log(out_dir if is_first_rank() else None)
    from dinoseg.config.nodes import instantiate

    if "torch" not in sys.modules and cfg.mode.get("keeps_folder", True):
        announce(f"mode={cfg.choices.mode}: importing libraries")
    try:
        with _telling_lost_ranks():
            mode = instantiate(cfg.mode, without=LAUNCH_KEYS)
            # not mode(...): parameters in errors of the parts that it runs are not its own
            return mode.func(cfg, out_dir=out_dir, **mode.keywords)
    finally:
        _leave_group()


@contextmanager
def shortages_as_user_errors() -> Iterator[None]:
    """Convert out-of-memory errors of libraries into `OutOfMemory`, in ranks too; other errors pass.

    Raises:
        OutOfMemory: with the library's own message.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from dinoseg.inference.memory import as_out_of_memory  # imports torch

        if (short := as_out_of_memory(error)) is None:
            raise
        raise short from error


@contextmanager
def _telling_lost_ranks() -> Iterator[None]:
    """Convert torch's errors about ranks that are gone or stuck into `LostRank`; other errors pass.

    Raises:
        LostRank: stating which of both.
    """
    try:
        yield
    except RuntimeError as error:
        message = next((line for line in str(error).splitlines() if line), "")
        if "WORLD_SIZE" not in os.environ or not (_GONE.search(message) or _STUCK.search(message)):
            raise
        if _GONE.search(message):
            raise LostRank(f"Lost the connection to another rank ({message}): see its messages.") from error
        raise LostRank(
            f"Timed out waiting for another rank ({message}). It may hang: `py-spy dump --pid` shows where. If it is "
            "only slower, raise engine.rank_timeout. resume=auto resumes from the last checkpoint."
        ) from error


def _leave_group() -> None:
    """Destroy the process group, however the mode ended: an interpreter that exits within one may hang.

    The group's threads end when nothing references it. Reference cycles (a model on ranks, an error's frames) are
    therefore collected before the interpreter exits: a thread that needs the interpreter later aborts the process.
    """
    if "WORLD_SIZE" in os.environ:
        atexit.register(gc.collect)
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_first_rank() -> bool:
    """Return whether this process writes the run's files: it runs alone or is rank 0."""
    return os.environ.get("RANK", "0") == "0"


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
    # torch itself would listen on all interfaces, and whoever reaches the store can disturb the training
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
    _use_loopback()
    if "SLURM_CPUS_ON_NODE" in os.environ:  # these ranks share the cores of the process that started them
        os.environ["SLURM_CPUS_ON_NODE"] = str(min(count_cores(), cores_here()))
    limit_threads_to_share()
    register_resolvers()
    try:
        with raise_on_signal(), file_errors_as_user_errors(out_dir), shortages_as_user_errors():
            result = run_mode(OmegaConf.create(cfg), out_dir)
    except UserError as error:
        print(f"error (rank {rank}): {error}", file=sys.stderr)
        sys.exit(_LOST if isinstance(error, LostRank) else 1)
    except Interrupted as stop:  # the parent reports the saved state
        sys.exit(stop.status)
    if rank == 0:
        sending.send_bytes(json.dumps(result).encode())


def join_ranks() -> None:
    """Set the variables by which this process joins the ranks that Slurm, torchrun or a user has started.

    Raises:
        UserError: see `join_slurm` and `listen_on_loopback`.
    """
    join_slurm()
    listen_on_loopback()


def _use_loopback() -> None:
    """Let the ranks of one machine exchange tensors over loopback only."""
    if sys.platform in _LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
        os.environ["NCCL_SOCKET_IFNAME"] = f"={_LOOPBACK[sys.platform]}"


def listen_on_loopback() -> None:
    """Let ranks that a user has started with MASTER_ADDR=127.0.0.1 listen on loopback only.

    Raises:
        UserError: the port of rank 0 is in use.
    """
    environment = os.environ
    # not "localhost", which some schedulers give rank 0 of several machines
    is_local = "WORLD_SIZE" in environment and environment.get("MASTER_ADDR") == "127.0.0.1"
    if not is_local or "TORCHELASTIC_RUN_ID" in environment:  # torchrun serves the store itself
        return
    _use_loopback()
    port = environment.get("MASTER_PORT", "")
    if environment.get("RANK") != "0" or "DINOSEG_STORE_SOCKET" in environment or not port.isdecimal():
        return
    try:
        # torch itself would listen on all interfaces
        store = socket.create_server(("127.0.0.1", int(port)))
    except (OSError, OverflowError) as error:
        raise UserError(f"Rank 0 cannot listen on MASTER_PORT={port} ({error}). Choose a free port.") from error
    environment["DINOSEG_STORE_SOCKET"] = str(store.detach())


def join_slurm() -> None:
    """Set torchrun's variables from Slurm's where `srun` has started several tasks; the first node is MASTER_ADDR.

    In an sbatch script's own shell there are no tasks: only srun sets the variables of a step.

    Raises:
        UserError: if a variable of the task is missing or malformed.
    """
    environment = os.environ
    if "WORLD_SIZE" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    tasks = _of_slurm("SLURM_STEP_NUM_TASKS", least=1, most=_MAX)
    if tasks == 1:
        return
    rank, local = _of_slurm("SLURM_PROCID", most=tasks - 1), _of_slurm("SLURM_LOCALID", most=tasks - 1)
    here = _tasks_here(tasks)
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node()
    if "MASTER_PORT" not in environment:
        number = _of_slurm("SLURM_JOB_ID") * 7 + _of_slurm("SLURM_STEP_ID")  # steps of a job may run at the same time
        environment["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(here),
    }


def _of_slurm(name: str, *, least: int = 0, most: int = 2**32) -> int:
    """Return the integer in a variable of a task."""
    text = os.environ.get(name)
    if text is None or not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise _not_of_task(name, f"must be a whole number from {least} to {most}")
    return int(text)


def _tasks_here(tasks: int) -> int:
    """Return the number of the step's tasks on this machine; of all tasks, where srun does not state it."""
    text, node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), os.environ.get("SLURM_NODEID", "")
    if re.fullmatch(f"{_TASKS}(,{_TASKS})*", text) and re.fullmatch("[0-9]{1,6}", node):
        machines = 0  # machines read so far
        for count, times in re.findall(_TASKS, text):
            machines += int(times or 1)
            if int(node) < machines:
                return int(count)
    return tasks


def _first_node() -> str:
    """Return the name of the step's first machine."""
    # replace each bracket of a list such as gpu[03-04,7],n1 by its first number
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", os.environ.get("SLURM_STEP_NODELIST", ""))
    host = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")
    if not re.fullmatch(r"\w[\w.-]*", host):
        raise _not_of_task("SLURM_STEP_NODELIST", "must name the machines of the step, such as gpu[03-04],n1")
    return host


def _not_of_task(name: str, rule: str) -> UserError:
    setting = f"{name}={os.environ[name]:.60}" if name in os.environ else f"{name} is missing: it"
    return UserError(
        f"{setting} {rule}. Start the ranks by `srun python -m dinoseg ...`, which sets it for each rank; for a single "
        "process, set SLURM_STEP_NUM_TASKS=1."
    )
