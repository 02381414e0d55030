"""Waits for other processes, threads and disks: each is logged, has a limit and ends when a stop is requested."""

import logging
import time
from collections.abc import Callable

from dinoseg.utils.errors import WaitEnded
from dinoseg.utils.interrupt import is_stop_requested

log = logging.getLogger(__name__)
NOTICE = 5.0  # seconds after which a wait is logged
_RARER = 5  # factor between the times of two log lines of one wait
_MAX_GAP = 10.0  # seconds between two checks that count: more means that this process itself was stopped


class Wait:
    """A wait that polls; call `check` between two polls.

    A signal ends a wait at once, unless it is deferred, as in a training. Then the wait looks for it.

    Args:
        describe: maps the seconds so far to a log line: what is waited for, and what to do if it hangs.
        limit: seconds after which the wait ends.
        notice: seconds after which the wait is logged for the first time.
        grace: seconds in which a stop request does not end the wait, since what is waited for usually comes.
    """

    def __init__(
        self, describe: Callable[[float], str], *, limit: float, notice: float = NOTICE, grace: float = 0.0
    ) -> None:
        self._describe = describe
        self._limit = limit
        self._next_line = notice
        self._grace = grace
        self._last_check = time.monotonic()
        self._seconds = 0.0

    def check(self) -> None:
        """Count the time since the last check, and log the wait if that is due.

        Raises:
            WaitEnded: the limit is reached, or a stop is requested.
        """
        now = time.monotonic()
        self._seconds += min(now - self._last_check, _MAX_GAP)
        self._last_check = now
        if self._seconds >= self._grace and is_stop_requested():
            raise WaitEnded(f"{self._describe(self._seconds)} The wait ends: a stop was requested.")
        if self._seconds >= self._limit:
            raise WaitEnded(f"{self._describe(self._seconds)} The wait ends after {self._limit:g} s.")
        if self._seconds >= self._next_line:
            self._next_line = max(NOTICE, _RARER * self._seconds)
            log.warning("%s", self._describe(self._seconds))
