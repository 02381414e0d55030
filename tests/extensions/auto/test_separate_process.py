"""Work in a process of its own: what comes back of it, and that it leaves nothing."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
from daemons import wait_until

from dinoseg.extensions.auto.separate_process import run_in_process
from dinoseg.utils.errors import UserError


def answers(item):
    if item == "refused":
        raise UserError("no such item")
    if item == "broken":
        raise ValueError("not foreseen")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid(), is_sigint_blocked()


def is_sigint_blocked():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Struck:
    """Work during whose sending Ctrl-C is pressed."""

    def __getstate__(self):
        signal.raise_signal(signal.SIGINT)
        return {}


def test_single_process_returns_its_answer_or_failure(capfd):
    item, process, deaf = run_in_process(answers, "run_bands")
    assert item == "run_bands" and process != os.getpid() and deaf and not is_sigint_blocked()
    with pytest.raises(KeyboardInterrupt):
        run_in_process(Struck(), "never")
    assert not multiprocessing.active_children() and not is_sigint_blocked() and not capfd.readouterr().err
    assert run_in_process(answers, "killed") is None
    with pytest.raises(UserError, match="no such item"):
        run_in_process(answers, "refused")
    with pytest.raises(RuntimeError, match="see its traceback above"):
        run_in_process(answers, "broken")
    assert "ValueError: not foreseen" in capfd.readouterr().err


def test_a_process_of_its_own_is_killed_at_its_time_limit():
    with pytest.raises(TimeoutError):
        run_in_process(time.sleep, 600, timeout=0.05)
    assert not multiprocessing.active_children()


def hold_semaphore(path):
    """Create a semaphore that has a name, as a data loader's queues do, and write the name."""
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    path.with_suffix(".part").write_text(semaphore._semlock.name)
    path.with_suffix(".part").rename(path)
    time.sleep(600)


@pytest.fixture
def limit_file(tmp_path, monkeypatch):
    """Return the file at whose appearance the time limit of a process ends."""
    path = tmp_path / "name"
    monkeypatch.setattr("multiprocessing.connection.Connection.poll", lambda *_: not wait_until(path.exists))
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="semaphores have no names there")
def test_process_at_its_time_limit_leaves_no_semaphore(limit_file):
    from _multiprocessing import sem_unlink

    with pytest.raises(TimeoutError):
        run_in_process(hold_semaphore, limit_file, timeout=1)
    with pytest.raises(FileNotFoundError):
        sem_unlink(limit_file.read_text())


class SlowToLoad:
    """An argument that a new process takes a second to load."""

    def __reduce__(self):
        return time.sleep, (1,)


def start_slow_process(path):
    """Start a process whose arguments do not fit into a pipe, and wait for it to load them."""
    process = multiprocessing.get_context("spawn").Process(target=path.touch, args=(SlowToLoad(), b" " * 2**20))
    threading.Timer(0.3, path.touch).start()
    process.start()


def test_process_that_starts_at_the_time_limit_ends_silently(limit_file, capfd):
    with pytest.raises(TimeoutError):
        run_in_process(start_slow_process, limit_file, timeout=1)
    time.sleep(1.2)
    assert capfd.readouterr().err == ""
