"""Waits are logged at growing intervals, have a limit, and end when a stop is requested."""

import signal
from types import SimpleNamespace

import pytest

from dinoseg.utils import waiting
from dinoseg.utils.errors import WaitEnded
from dinoseg.utils.interrupt import Interrupted, defer_signals
from dinoseg.utils.waiting import Wait


@pytest.fixture
def check_after(monkeypatch):
    """Return a function that checks a wait after some more seconds."""
    now = [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def check(wait, seconds):
        now[0] += seconds
        wait.check()

    return check


def describe(seconds):
    return f"No news for {seconds:.0f} s."


def test_wait_is_logged_more_and_more_rarely(check_after, caplog):
    wait = Wait(describe, limit=200)
    for _ in range(130):
        check_after(wait, 1)
    assert caplog.messages == ["No news for 5 s.", "No news for 25 s.", "No news for 125 s."]


def test_wait_ends_at_its_limit(check_after):
    wait = Wait(describe, limit=9)
    check_after(wait, 8)
    with pytest.raises(WaitEnded, match="No news for 9 s. The wait ends after 9 s"):
        check_after(wait, 1)


def test_time_in_which_the_process_was_stopped_does_not_count(check_after):
    check_after(Wait(describe, limit=60), 10_000)


@pytest.mark.parametrize("grace", [0, 5])
def test_deferred_signal_ends_a_wait_after_its_grace(check_after, grace):
    wait = Wait(describe, limit=60, grace=grace)
    has_waited = not grace
    with pytest.raises(Interrupted), defer_signals(""):
        check_after(wait, 4)
        signal.raise_signal(signal.SIGTERM)
        if grace:
            check_after(wait, 0)
            has_waited = True
        check_after(wait, 1)
        pytest.fail("the wait has not ended")
    assert has_waited
    check_after(wait, 1)  # the request ends with the work
