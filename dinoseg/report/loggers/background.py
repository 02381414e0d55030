"""Logger whose methods run in a thread, so that a training does not wait for a server."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from dinoseg.report.loggers.logger import Logger, Status

_GRACE = 1.0  # seconds beyond its timeout in which a logger can raise its own error
_MAX_CALLS = 10_000  # waiting calls at which a logger counts as failed: each holds a row of some hundred values


class BackgroundLogger(Logger):
    """Calls the methods of a logger in order, in one thread.

    A call returns at once, and `close` waits at most `timeout` seconds. The next call raises an exception of an earlier
    one. At the first, the thread closes the logger as failed, and ends.

    Args:
        logger: its `timeout` is set.

    Raises:
        TimeoutError: by any method, if an earlier call runs for more than `timeout` seconds, or too many calls wait.
        RuntimeError: by any method, if an earlier call raised no `Exception`, but `SystemExit`, for example.
    """

    def __init__(self, logger: Logger) -> None:
        assert logger.timeout is not None
        self._logger, self._limit = logger, logger.timeout + _GRACE
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._began: float | None = None  # when the running call began; None: none is running
        self._error: Exception | None = None
        self._is_closed = False
        # a daemon: Python does not wait for a call that never returns
        self._thread = Thread(target=self._run, name=f"dinoseg {type(logger).__name__}", daemon=True)
        self._thread.start()

    def config(self, settings: Mapping[str, Any]) -> None:
        """Pass the settings on."""
        self._put(lambda: self._logger.config(settings))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Pass values on."""
        self._put(lambda: self._logger.scalars(step, values))

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Pass images on."""
        self._put(lambda: self._logger.images(step, named))

    def scores(self, values: Mapping[str, Any]) -> None:
        """Pass scores on."""
        self._put(lambda: self._logger.scores(values))

    def checkpoint(self, path: Path) -> None:
        """Pass the path of a checkpoint on."""
        self._put(lambda: self._logger.checkpoint(path))

    def close(self, *, status: Status = "finished") -> None:
        """Close the logger after all waiting calls, and end the thread."""
        self._put(lambda: self._close(status))
        self._calls.put(None)
        self._thread.join(self._limit)
        self._check()
        if self._thread.is_alive():
            raise self._abandon(f"it has not received all values {self._logger.timeout:g} s after the training")

    def _put(self, call: Callable[[], None]) -> None:
        self._check()
        began = self._began
        if began is not None and time.monotonic() - began > self._limit:
            raise self._abandon(f"no answer for {self._logger.timeout:g} s")
        if self._calls.qsize() >= _MAX_CALLS:
            raise self._abandon(f"{_MAX_CALLS:,} calls wait: it is slower than the training")
        self._calls.put(call)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _abandon(self, reason: str) -> TimeoutError:
        self._error = error = TimeoutError(reason)
        self._calls.put(None)
        return error

    def _close(self, status: Status) -> None:
        self._is_closed = True
        self._logger.close(status=status)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None and self._error is None:
            self._began = time.monotonic()
            try:
                call()
            except Exception as error:
                self._error = error
            except BaseException as error:  # a client's SystemExit would end the thread silently, or the training
                self._error = RuntimeError(f"{type(error).__name__}: {error}")
            else:
                self.view = self._logger.view
            finally:
                self._began = None
            if self._error is not None:
                break
        if not self._is_closed:
            with suppress(BaseException):  # the first error is reported
                self._close("failed")
