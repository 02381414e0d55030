"""Daemons that a test starts, and waits for by their state."""

import subprocess
import time
from contextlib import contextmanager

HANG = 1800  # seconds; only a state that is never reached takes so long


@contextmanager
def run_daemon(command, log, env):
    """Run a daemon in the foreground and end it after the block; its output goes to `log`."""
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env) as daemon:
        try:
            yield daemon
        finally:
            daemon.terminate()


def wait_until(reached, daemons=(), *, seconds=HANG):
    """Wait until `reached()` is true, and return its value.

    Raises:
        AssertionError: a daemon has ended before, or the state is not reached in time.
    """
    deadline = time.monotonic() + seconds
    while not (state := reached()):
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        assert not ended, f"ended: {ended}"
        assert time.monotonic() < deadline, f"never reached: {reached}"
        time.sleep(0.1)
    return state
