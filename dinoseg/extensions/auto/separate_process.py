"""Work in a new process with its own memory, for measurements that earlier work would change."""

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import block_signals
from dinoseg.utils.workers import end_with_parent, without_script

T = TypeVar("T")
R = TypeVar("R")
_ENDING = 10.0  # seconds for a process to end before it is killed


def run_in_process(work: Callable[[T], R], item: T, *, timeout: float | None = None) -> R | None:
    """Run `work` on an item in a new process with its own memory, and return its result; None if it was killed.

    The process ends when this one is interrupted or killed. Ctrl-C reaches only this one; otherwise the child would
    print its own traceback next to this one's message.

    Args:
        work: maps the item to the result.
        item: what to work on.
        timeout: seconds after which the process ends; it is killed if that takes longer than 10 s. None: never.

    Raises:
        UserError: if `work` raises it.
        RuntimeError: if `work` raises any other error, whose traceback is printed before.
        TimeoutError: if it takes longer than `timeout`.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    ending, closed = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, item, sending, ending))
    resource_tracker.ensure_running()  # starting it later would unblock signals
    try:
        with block_signals(signal.SIGINT), without_script(work):
            process.start()
        sending.close()
        ending.close()
        if not receiving.poll(timeout):
            raise TimeoutError
        result = receiving.recv()
        process.join(_ENDING)  # time to end its own processes
    except EOFError:
        process.join()
        if process.exitcode == 1:
            raise RuntimeError("A process of this job failed; see its traceback above.") from None
        return None
    finally:
        closed.close()
        if process.pid is not None:
            process.join(_ENDING)
            process.kill()
            process.join()
        receiving.close()
    if isinstance(result, UserError):
        raise result
    return result


def _answer(work: Callable[[Any], Any], item: Any, sending: Connection, ending: Connection) -> None:
    if ending.poll():  # the caller was interrupted while this process started
        return
    threading.Thread(target=end_with_parent, args=(ending,), kwargs={"ends_children": True}, daemon=True).start()
    try:
        sending.send(work(item))
    except UserError as error:
        sending.send(error)
