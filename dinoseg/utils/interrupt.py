"""SIGINT (Ctrl-C) and SIGTERM (`kill`, Slurm): both end what runs by one exception, and training at a whole step."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TWICE = 2.0  # seconds after which a signal is a second one: torchrun passes on what the terminal has sent to all


class Interrupted(KeyboardInterrupt):
    """A signal has asked this process to end; `again` if that was not the first time.

    `note` is what is left of the work, in words.
    """

    def __init__(self, number: int, *, again: bool = False, note: str = "") -> None:
        super().__init__(number)
        self.number, self.again, self.note = number, again, note
        self.status = 128 + number  # the exit status that a shell would give


class Deferral:
    """Whether a signal has asked to end, kept until the work is at a point where it can."""

    def __init__(self, notice: str) -> None:
        self.asked = 0  # number of the signal
        self._notice, self._since, self._waits = notice, 0.0, True

    def receive(self, number: int) -> None:
        """Take a signal: the first waits until it is asked for, a second one ends everything.

        Raises:
            Interrupted: where nothing is in its way, and at the second signal.
        """
        if self.asked:
            if time.monotonic() - self._since >= _TWICE:
                raise Interrupted(number, again=True)
            return
        self.asked, self._since = number, time.monotonic()
        if not self._waits:
            raise Interrupted(number)
        if self._notice:
            os.write(2, f"\n{self._notice}\n".encode())  # print may be what was interrupted, and is not safe in here

    def leave(self) -> None:
        """End, though it may be another rank that was asked.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(self.asked or signal.SIGTERM)

    @contextmanager
    def at_once(self, allowed: bool) -> Iterator[None]:
        """Let a signal end what is done in here, where that changes nothing that is kept."""
        self._waits = not allowed
        try:
            if self.asked and allowed:
                self.leave()
            yield
        finally:
            self._waits = True


@contextmanager
def raised() -> Iterator[None]:
    """Let each signal raise `Interrupted`, SIGTERM as well, so that what is half-written is removed."""

    def end(number: int) -> None:
        raise Interrupted(number)

    with _handled(end):
        yield


@contextmanager
def deferred(notice: str) -> Iterator[Deferral]:
    """Keep a first signal until the work asks for it, or is done; say `notice` when it comes.

    Raises:
        Interrupted: when a signal has come, in place of an error that it may have caused, such as the end of a worker.
    """
    deferral = Deferral(notice)
    with _handled(deferral.receive):
        try:
            yield deferral
        except RuntimeError as error:
            if deferral.asked:
                raise Interrupted(deferral.asked) from error
            raise
        if deferral.asked:
            deferral.leave()


@contextmanager
def ending_input() -> Iterator[Deferral]:
    """Let a first signal be the end of an input that has none, and nothing be raised for it; a second ends all."""
    deferral = Deferral("Stopping: what came so far is being finished.")
    with _handled(deferral.receive):
        yield deferral


@contextmanager
def passed_on(processes: Sequence[int]) -> Iterator[None]:
    """Pass a first signal on to processes by their numbers; a second one raises `Interrupted` here.

    On Windows, Ctrl-C reaches every process of the console by itself, and `os.kill` would end them at once.
    """
    deferral = Deferral("")

    def receive(number: int) -> None:
        if not deferral.asked and sys.platform != "win32":
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        deferral.receive(number)

    with _handled(receive):
        yield


@contextmanager
def held(*numbers: int) -> Iterator[None]:
    """Hold signals back until the block's end, here and in processes that start in it, until these let them through."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled(receive: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        receive(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    # what is ignored, as under nohup, stays so; None: not Python's
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, former in before.items() if former not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
