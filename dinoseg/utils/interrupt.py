"""Handling of SIGINT (Ctrl-C) and SIGTERM (`kill`, Slurm) by one exception; training stops after a complete step."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from dinoseg.utils.errors import KilledProcess, WaitEnded

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TWICE = 2.0  # seconds after which a signal is a second one: torchrun forwards those that the terminal sent to all
_deferrals: list["Deferral"] = []  # of this process, the innermost last


class Interrupted(KeyboardInterrupt):
    """Exception for a signal that ends this process; `again`: whether the signal was repeated.

    `note`: what the interrupted run has left, and how to resume it.
    """

    def __init__(self, number: int, *, again: bool = False, note: str = "") -> None:
        super().__init__(number)
        self.number, self.again, self.note = number, again, note
        self.status = 128 + number  # the exit status that a shell would give


class Deferral:
    """A stop request by signal, deferred until the work is at a point where it can stop."""

    def __init__(self, notice: str) -> None:
        self.signal = 0  # number of the signal; 0: none
        self._notice, self._since, self._waits = notice, 0.0, True

    def receive(self, number: int) -> None:
        """Handle a signal: the first is deferred, a second one ends everything.

        Raises:
            Interrupted: if signals are not deferred now, and on the second signal.
        """
        if self.signal:
            if time.monotonic() - self._since >= _TWICE:
                raise Interrupted(number, again=True)
            return
        self.signal, self._since = number, time.monotonic()
        if not self._waits:
            raise Interrupted(number)
        if self._notice:
            os.write(2, f"\n{self._notice}\n".encode())  # print is not reentrant, and may have been interrupted

    def leave(self) -> None:
        """End the work, even if the signal reached only another rank.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(self.signal or signal.SIGTERM)

    @contextmanager
    def at_once(self, allowed: bool) -> Iterator[None]:
        """Let a signal interrupt the block at once, if `allowed`: where that changes nothing that is saved."""
        self._waits = not allowed
        try:
            if self.signal and allowed:
                self.leave()
            yield
        finally:
            self._waits = True


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Let each signal raise `Interrupted`, SIGTERM as well, so that partial files are removed."""

    def end(number: int) -> None:
        raise Interrupted(number)

    with _handle_signals(end):
        yield


@contextmanager
def defer_signals(notice: str) -> Iterator[Deferral]:
    """Defer the first signal until the work checks for it or is done; print `notice` when it comes.

    Raises:
        Interrupted: if a signal has come, instead of an error that it may have caused, such as the end of a worker.
    """
    deferral = Deferral(notice)
    _deferrals.append(deferral)
    with _handle_signals(deferral.receive):
        try:
            yield deferral
        except (RuntimeError, KilledProcess, WaitEnded) as error:
            if deferral.signal:
                raise Interrupted(deferral.signal) from error
            raise
        finally:
            _deferrals.remove(deferral)
        if deferral.signal:
            deferral.leave()


def is_stop_requested() -> bool:
    """Return whether a signal was deferred by `defer_signals`, and the work that it waits for has not ended yet."""
    return any(deferral.signal for deferral in _deferrals)


@contextmanager
def forward_signals(processes: Sequence[int]) -> Iterator[None]:
    """Forward a first signal to processes by their numbers; a second one raises `Interrupted` here.

    On Windows, Ctrl-C reaches every process of the console by itself, and `os.kill` would end them at once.
    """
    deferral = Deferral("")

    def receive(number: int) -> None:
        if not deferral.signal and sys.platform != "win32":
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        deferral.receive(number)

    with _handle_signals(receive):
        yield


@contextmanager
def block_signals(*numbers: int) -> Iterator[None]:
    """Block signals until the end of the block, also in processes that start in it, until these unblock them.

    A mask does not suffice: another thread may receive the signal, and Python runs its handler in the main thread.
    """
    with hold_handlers(*numbers):
        if sys.platform == "win32":
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def hold_handlers(*numbers: int) -> Iterator[None]:
    """Call the Python handlers of signals at the end of the block instead of in it; in the main thread only."""
    received: list[int] = []
    is_holding = True

    def handler(number: int, frame: FrameType | None) -> None:
        if is_holding:
            received.append(number)
        else:  # a signal has interrupted the end of the block, before the former handler was back
            former[number](number, frame)

    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in numbers if is_main}
    former: dict[int, Any] = {number: each for number, each in handlers.items() if callable(each)}
    try:
        for number in former:
            signal.signal(number, handler)
        yield
    finally:
        is_holding = False
        for number, each in former.items():
            signal.signal(number, each)
        for number in dict.fromkeys(received):
            signal.raise_signal(number)


@contextmanager
def _handle_signals(receive: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        receive(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    # signals that are ignored, as under nohup, stay ignored; None: not handled by Python
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, former in before.items() if former not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
