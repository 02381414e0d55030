"""Lock files: held by one process, never by what it has forked."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest
from failing import fail_after
from held_locks import start_behind_lock

from dinoseg.utils.errors import WaitEnded
from dinoseg.utils.locks import acquire, hold_lock, release

KILLED = """
import os, signal, sys, time
from pathlib import Path
from dinoseg.utils.locks import acquire
acquire(Path(sys.argv[1]))
if os.fork() == 0:
    print("forked", flush=True)
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_irregular_lock_file_is_refused_without_waiting(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(OSError):
        acquire(tmp_path / "lock", wait=True)


def test_link_in_place_of_a_lock_leaves_its_target_unchanged(tmp_path):
    (tmp_path / "notes").write_text("of the user")
    (tmp_path / "lock").symlink_to("notes")
    with pytest.raises(OSError), hold_lock(tmp_path / "lock"):
        pass
    assert (tmp_path / "notes").read_text() == "of the user"


def test_lock_has_one_holder_and_keeps_the_content(tmp_path):
    """Run folders are locked by their log."""
    log = tmp_path / "deep/run.log"
    first = acquire(log)
    log.write_text("step 1\n")
    assert first is not None and acquire(log) is None
    release(first)
    second = acquire(log)
    assert second is not None and log.read_text() == "step 1\n"
    release(second)


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "lock")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"forked\n"  # the child has it open still, had it kept it
        parent.wait(120)
        file = acquire(tmp_path / "lock")
        parent.stdout.close()
        assert file is not None
        release(file)


def test_a_lock_file_that_its_holder_removes_is_no_lock_any_more(tmp_path, caplog):
    path = tmp_path / "lock"
    entered = threading.Event()

    def wait():
        with hold_lock(path):
            entered.set()

    with start_behind_lock(path, caplog, wait):
        assert not entered.is_set()
    assert entered.is_set() and not path.exists()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    fail_after(monkeypatch, fcntl, "flock", 0, OSError(errno.ENOLCK, "No locks available"))
    with hold_lock(tmp_path / "lock"):
        assert "cannot be locked (No locks available): start one process at a time" in caplog.text


def test_wait_names_the_holder_and_has_a_limit(tmp_path):
    path = tmp_path / "lock"
    with (
        hold_lock(path),
        pytest.raises(WaitEnded, match=f"Process {os.getpid()} on .* has locked {path}.*The wait ends after 0.3 s"),
        hold_lock(path, limit=0.3),
    ):
        pass
    with hold_lock(path):
        pass


def test_wait_for_a_log_does_not_take_its_lines_for_a_holder(tmp_path, caplog):
    log = tmp_path / "run.log"
    first = acquire(log)
    log.write_text("step 1\n")
    assert acquire(log, wait=0.3) is None
    assert f"Another process has locked {log}" in caplog.text and "step 1" not in caplog.text
    release(first)
