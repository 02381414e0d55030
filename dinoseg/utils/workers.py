"""Worker processes: one way to start, feed and end them. Imports only the standard library."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import connection, util
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from dinoseg.utils.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=Exception)
_ENDING = 10.0  # seconds for a process to end before it is killed
_MAX_WORKERS = 61 if sys.platform == "win32" else 2**20  # Windows cannot wait for more processes at once
_AHEAD = 4  # unfinished or unconsumed items per process: bounds memory
ErrorTypes = type[Exception] | tuple[type[Exception], ...]
_task: tuple[Callable[[Any], Any], ErrorTypes]  # of a worker process: sent once, not with every item


def in_processes(
    work: Callable[[T], R],
    items: Sequence[T],
    workers: int,
    *,
    remedy: str,
    catch: type[E] | tuple[type[E], ...] = (),
    in_order: bool = True,
    start: Callable[[], None] | None = None,
) -> Generator[tuple[T, R | E], None, None]:
    """Yield each item with its result of `work`, computed a few items ahead of the consumer.

    Processes are spawned. They end when this generator is exhausted, closed or interrupted, and when this process is
    killed; before, items in work get 10 s to be finished. `work` and `start` have to be picklable: module-level
    functions, or partials of them.

    Args:
        work: maps an item to its result.
        items: what to work on.
        workers: number of processes; with at most one, or a single item, all work runs in this process.
        remedy: advice to the user in case a process was killed, for example for lack of memory.
        catch: exceptions that are yielded instead of the result; others are raised when their item is due.
        in_order: yield in the order of the items, else in the order of completion.
        start: called first in each new process, never in this one.

    Raises:
        UserError: if a process was killed.
    """
    workers = min(workers, len(items), _MAX_WORKERS)
    if workers <= 1:
        yield from ((item, _attempt(work, catch, item)) for item in items)
        return
    # spawn: a progress bar's thread is running, and forking next to a thread can deadlock
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (work, catch, start))
    todo = iter(items)
    waiting: dict[Future[R | E], T] = {}
    try:
        while True:
            with without_script(work):  # the pool starts processes when it gets items
                for item in islice(todo, _AHEAD * workers - len(waiting)):
                    waiting[pool.submit(_attempt_here, item)] = item
            if not waiting:
                return
            watched = [next(iter(waiting))] if in_order else waiting
            for future in wait(watched, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(
            f"A process was killed, most likely because memory ran out. {remedy} (In a script of your own, processes "
            "need `if __name__ == '__main__':` around what the script does.)"
        ) from None
    finally:
        processes = list((pool._processes or {}).values())
        with kill_remaining(processes, _ENDING):
            pool.shutdown(cancel_futures=True)


@contextmanager
def kill_remaining(processes: Sequence[Any], seconds: float) -> Iterator[None]:
    """Kill processes that have not ended some seconds after the block began, or when it ends."""

    def kill() -> None:
        for process in processes:
            process.kill()

    # no thread starts any more as the interpreter exits, when generators in reference cycles are closed
    if sys.is_finalizing():
        kill()
        yield
        return
    killer = threading.Timer(seconds, kill)
    killer.start()
    try:
        yield
    finally:
        killer.cancel()
        kill()
        killer.join()


@contextmanager
def without_script(*needed: Any) -> Iterator[None]:
    """Hide the script from processes that start in the block, unless it defines one of the `needed` functions.

    Spawned processes import the main module, and a script without `if __name__ == "__main__":` would run once more in
    each of them.
    """
    functions = [each.func if isinstance(each, partial) else each for each in needed]
    script = vars(sys.modules["__main__"])
    before: dict[str, Any] = {name: script[name] for name in ("__spec__", "__file__") if name in script}
    if all(each.__module__ != "__main__" for each in functions):
        script["__spec__"] = None
        script.pop("__file__", None)
    try:
        yield
    finally:
        script |= before


def _attempt(work: Callable[[T], R], catch: type[E] | tuple[type[E], ...], item: T) -> R | E:
    try:
        return work(item)
    except catch as error:
        return error


def _start_worker(work: Callable[[Any], Any], catch: ErrorTypes, start: Callable[[], None] | None) -> None:
    global _task
    _task = work, catch
    threading.Thread(target=end_with_parent, daemon=True).start()
    if start is not None:
        start()


def end_with_parent(*endings: Connection, ends_children: bool = False) -> None:
    """End this process when its parent is killed, or closes the other end of one of the connections.

    Its semaphores, such as those of a data loader's queues, are removed first: they would be reported as leaked.

    Args:
        endings: the connections.
        ends_children: whether its own processes are killed: one that is starting would print a traceback, since it
            receives only a part of its work.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel, *endings])
        util._run_finalizers(0)  # type: ignore[attr-defined]  # those that wait for threads have lower priorities
        if ends_children:
            import psutil

            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        os._exit(1)


def _attempt_here(item: Any) -> Any:
    return _attempt(*_task, item)
