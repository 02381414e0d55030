"""Base class of loggers, which receive what a training logs in addition to metrics.jsonl, and its form in a thread."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

import numpy as np

from dinoseg.utils.errors import WaitEnded
from dinoseg.utils.waiting import NOTICE, Wait

Status = Literal["finished", "failed", "killed"]  # of a training that has ended
_POLL = 0.1  # seconds between two looks at whether a logger has sent all values
_GRACE = 1.0  # seconds beyond its timeout in which a logger can raise its own error


class Logger:
    """Base class of loggers: only rank 0 makes one, and each method does nothing by default.

    An exception in any method closes and drops the logger with one warning, and the training continues. Only a
    `UserError` of the constructor ends the run.

    Args:
        out_dir: the run folder, which exists.
        start_step: steps done before. A run that resumes may have logged later steps before it was killed; these are
            logged again.

    Attributes:
        view: how to open the log, printed after the training; empty: nothing to print.
        timeout: seconds after which a call counts as failed; its methods then run in a thread, so that no training
            waits for a server, and the constructor must not wait either. None: they run at once.
        is_enabled: False: its settings disable it, so no other method is called. The constructor logs why.
    """

    view: str = ""
    timeout: float | None = None
    is_enabled: bool = True

    def __init__(self, out_dir: Path, *, start_step: int = 0) -> None:
        pass

    @classmethod
    def check_installed(cls) -> None:
        """Refuse a package that is not installed, before data and weights are read.

        Raises:
            UserError: naming the package and how to install it.
        """

    def config(self, settings: Mapping[str, Any]) -> None:
        """Receive the settings that distinguish runs, by dotted name such as `optim.optimizer.lr`, before all else."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Receive finite values after a step, such as `train/loss` or `val/miou`."""

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Receive images (H, W, 3) uint8 of the validation after a step, by the names of its samples."""

    def scores(self, values: Mapping[str, Any]) -> None:
        """Receive the scores of the best checkpoint after the training: numbers, and tables such as `matrix`."""

    def checkpoint(self, path: Path) -> None:
        """Receive the file of the best checkpoint, after its scores."""

    def close(self, *, status: Status = "finished") -> None:
        """Write buffered values, and close files and connections.

        Args:
            status: how the training ended: finished; failed by an error, or this logger is dropped; killed by a signal.
        """


class BackgroundLogger(Logger):
    """Calls the methods of a logger in order, in one thread.

    A call returns at once, and `close` waits at most `timeout` seconds. The next call raises an exception of an earlier
    one. At the first, the thread closes the logger as failed, and ends.

    Args:
        logger: the logger.
        timeout: its timeout in seconds.

    Raises:
        TimeoutError: by any method, if an earlier call runs for more than `timeout` seconds.
        RuntimeError: by any method, if an earlier call raised no `Exception`, but `SystemExit`, for example.
    """

    def __init__(self, logger: Logger, timeout: float) -> None:
        self._logger, self._limit = logger, timeout + _GRACE
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
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        name, limit = type(self._logger).__name__, self._logger.timeout
        wait = Wait(
            lambda seconds: f"Waiting for {name} to send the last values ({seconds:.0f} s, at most {limit:g} s).",
            limit=self._limit,
            notice=NOTICE,
        )
        try:
            while self._thread.is_alive():
                self._thread.join(_POLL)
                wait.check()
        except WaitEnded:
            self._abandon(f"it has not received all values {limit:g} s after the training")

    def _put(self, call: Callable[[], None]) -> None:
        began = self._began
        if began is not None and time.monotonic() - began > self._limit:
            self._abandon(f"no answer for {self._logger.timeout:g} s")
        if self._error is not None:
            raise self._error
        self._calls.put(call)

    def _abandon(self, reason: str) -> None:
        self._error = self._error or TimeoutError(reason)
        self._calls.put(None)

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
