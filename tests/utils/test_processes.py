"""Work in processes: what comes back and in which order, that none ever stays, and those that read hostile input."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from child_functions import echo, stuck
from daemons import wait_until

from dinoseg.extensions.serving import child as child_module
from dinoseg.extensions.serving.child import Child, ChildEnded
from dinoseg.utils import workers as workers_module
from dinoseg.utils.errors import UserError
from dinoseg.utils.workers import in_processes

run = functools.partial(in_processes, remedy="Do less.")
started_with = []  # filled in processes by `note_start`


def square_first_late(item, folder):
    if item == 0:
        wait_until((folder / "3").exists)
    return note(item, folder) ** 2


def wait_for_go(item, folder):
    if item:
        wait_until((folder / "go").exists)
    return note(item, folder)


def refuse_odd(item):
    if item % 4 == 3:
        raise OSError(28, "no room", f"{item}")
    if item % 2:
        raise UserError(f"{item} is odd")
    return item


def note(item, folder):
    (folder / f"{item}").touch()
    return item


def die(item):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def stop_after_first(item):
    if item:
        os.kill(os.getpid(), signal.SIGSTOP)
    return item


def note_start():
    started_with.append(os.getpid())


def tell_start(_):
    time.sleep(0.02)
    return os.getpid(), list(started_with)


class Heavy:
    """Work that counts how often it is sent."""

    sent = 0

    def __getstate__(self):
        Heavy.sent += 1
        return {}

    def __call__(self, item):
        return tell_start(item)


def nobody_is_left():
    return not multiprocessing.active_children()


@pytest.mark.parametrize("in_order", [True, False])
def test_each_item_has_its_result_in_the_requested_order(tmp_path, in_order):
    work = functools.partial(square_first_late, folder=tmp_path)
    pairs = list(run(work, range(23), 2, in_order=in_order))
    assert sorted(pairs) == [(item, item * item) for item in range(23)]
    assert (pairs == sorted(pairs)) == (pairs[0][0] == 0) == in_order
    assert nobody_is_left()


@pytest.mark.parametrize("workers", [1, 2])
def test_named_errors_are_results(workers):
    pairs = dict(run(refuse_odd, range(8), workers, catch=(UserError, OSError)))
    assert [pairs[item] for item in range(0, 8, 2)] == [0, 2, 4, 6]
    assert [str(pairs[item]) for item in (1, 5)] == ["1 is odd", "5 is odd"]
    assert all(isinstance(pairs[item], OSError) and pairs[item].errno == 28 for item in (3, 7))
    assert pairs[7].filename == "7"


@pytest.mark.parametrize("workers", [1, 2])
def test_other_errors_are_raised_when_their_item_is_due(workers):
    taken = []
    with pytest.raises(OSError, match="no room"):
        for item, result in run(refuse_odd, range(100), workers, catch=UserError):
            taken.append((item, str(result)))
    assert taken == [(0, "0"), (1, "1 is odd"), (2, "2")] and nobody_is_left()


def test_little_is_done_ahead_and_nothing_after_the_end(tmp_path):
    results = run(functools.partial(note, folder=tmp_path), range(200), 2, in_order=False)
    for _ in range(3):
        next(results)
    time.sleep(0.2)
    assert 3 <= len(list(tmp_path.iterdir())) <= 3 + 2 * 4
    results.close()
    assert nobody_is_left() and len(list(tmp_path.iterdir())) <= 3 + 2 * 4


class CancellingPool(workers_module.ProcessPoolExecutor):
    """Pool whose first task waits for the file `go`, which is there once waiting tasks are cancelled."""

    go: Path

    def submit(self, *arguments):
        self.tasks = [*getattr(self, "tasks", []), super().submit(*arguments)]
        return self.tasks[-1]

    def shutdown(self, **named):
        def release():
            wait_until(lambda: not any(task._state == "PENDING" for task in self.tasks))
            self.go.touch()

        threading.Thread(target=release).start()
        super().shutdown(**named)


def test_waiting_items_are_dropped_when_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(CancellingPool, "go", tmp_path / "go", raising=False)
    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", CancellingPool)
    results = run(functools.partial(wait_for_go, folder=tmp_path), range(200), 2)
    assert next(results) == (0, 0)
    results.close()
    assert nobody_is_left() and not (tmp_path / "7").exists()


def test_hanging_process_is_killed_once_its_results_are_closed(monkeypatch):
    monkeypatch.setattr(workers_module, "_ENDING", 0.1)
    results = run(stop_after_first, range(4), 2)
    assert next(results) == (0, 0)
    results.close()
    assert nobody_is_left()


@pytest.mark.parametrize("in_order", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_killed_process_is_reported(in_order):
    with pytest.raises(UserError, match=r"^A process was killed, .* because memory ran out. Do less. \(In a script"):
        list(run(die, range(50), 2, in_order=in_order))
    assert nobody_is_left()


def test_one_process_or_one_item_is_done_here():
    for items, workers in (([1, 2, 3], 1), ([1, 2], 0), ([1], 8), ([], 3)):
        here = [(item, (os.getpid(), [])) for item in items]
        assert list(run(tell_start, items, workers, start=note_start)) == here
    assert list(run(lambda item: -item, [1], 8)) == [(1, -1)]  # not even picklable


def test_each_process_starts_once_and_gets_its_work_once():
    Heavy.sent = 0
    told = [result for _, result in run(Heavy(), range(30), 2, start=note_start)]
    assert all(starts == [process] for process, starts in told)
    assert len(dict(told)) <= 2 and os.getpid() not in dict(told) and 1 <= Heavy.sent <= 2


SCRIPT = """
    import signal
    import time
    from functools import partial
    from pathlib import Path
    from dinoseg.utils.workers import in_processes

    def work(item, folder):
        (folder / str(item)).touch()
        time.sleep(0.02)

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job starts without
        for _ in in_processes(partial(work, folder=Path({folder!r})), range(1000), 2, remedy=""):
            pass
"""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_killed_one(tmp_path, way):
    folder = tmp_path / "done"
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(folder=str(folder))))
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(lambda: len(list(folder.iterdir())) > 5)
        assert len(living_processes(process.pid)) >= 3
        process.send_signal(way)
        assert process.wait(120) != 0
        wait_until(lambda: not living_processes(process.pid))
        assert len(list(folder.iterdir())) < 1000
    finally:
        if living_processes(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def living_processes(group):
    """Return the processes of a group that run."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


MEMORY = 2**28


def ask_child(child, seconds=60.0):
    try:
        with child.deadline(seconds):
            child.send({"number": 1}, b"bytes")
            return child.receive()
    finally:
        child.close()


def test_modules_of_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    assert ask_child(Child(echo, MEMORY)) == ({"number": 1}, b"bytes")


def test_a_deadline_begins_once_the_process_is_ready(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\nfrom child_functions import echo\ntime.sleep(6)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(echo, "__module__", "slow_to_import")
    assert ask_child(Child(echo, MEMORY), seconds=5.0) == ({"number": 1}, b"bytes")


def test_a_process_that_is_never_ready_is_killed(monkeypatch):
    monkeypatch.setattr(child_module, "_START_SECONDS", 1e-3)
    with pytest.raises(ChildEnded, match="too late"):
        ask_child(Child(stuck, MEMORY))


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_messages_arrive_where_standard_error_is_closed():
    code = (
        "from child_functions import echo; from dinoseg.extensions.serving.child import Child; "
        "child = Child(echo, 2**28); "
        "context = child.deadline(60); context.__enter__(); child.send({'number': 1}); print(child.receive())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "({'number': 1}, b'')\n"


CLOSED_AT_EXIT = """
import gc
from dinoseg.utils.workers import kill_remaining

class Process:
    def kill(self):
        print("killed", flush=True)

def items():
    try:
        yield
    finally:
        with kill_remaining([Process()], 60):
            print("closed", flush=True)

gc.disable()
cycle = [items()]
cycle.append(cycle)
next(cycle[0])
del cycle
"""


def test_processes_of_a_generator_end_with_the_interpreter():
    done = subprocess.run([sys.executable, "-c", CLOSED_AT_EXIT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "killed\nclosed\n", "")
