"""Work for a client, which ends when the client leaves, its time is up, or the server stops."""

import asyncio
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from dinoseg.utils.errors import UserError

T = TypeVar("T")


class WorkCancelled(Exception):
    """The client has left, or has cancelled its work."""


class OutOfTime(UserError):
    """The work takes too long, or the server stops."""


@dataclass(eq=False)
class Work:
    """The work for one request or upload, which threads share.

    Attributes:
        is_cancelled: whether nobody waits for the result any longer.
        deadline: end of the time for computing, by `time.monotonic`.
    """

    is_cancelled: bool = False
    deadline: float = math.inf


class CheckedCalls(TorchFunctionMode):
    """Mode that calls `check` before each torch function of the block in this thread; an error of it ends the block.

    So windows, the blocks of a model and the masks of objects can be interrupted, and none of them knows of it. A call
    costs about 2 microseconds. Compiled code is not interrupted.

    Args:
        check: raises an error to interrupt.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        if not torch.compiler.is_compiling():  # a check within a compiled block would cut its graph at each call
            self._check()
        return func(*args, **(kwargs or {}))


async def run_in_thread(function: Callable[[], T]) -> T:
    """Return the result of a function that runs in a thread of its own.

    The threads of asyncio and anyio delay the end of the process until they are done, and an operation of torch cannot
    be interrupted.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="work", daemon=True).start()
    return await asyncio.wrap_future(future)
