"""Processes that work on hostile input: what they import, when their time begins, and where their messages go."""

import os
import subprocess
import sys

import pytest
from child_functions import echo, stuck

from dinoseg.utils import child as child_module
from dinoseg.utils.child import Child, ChildEnded

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
        "from child_functions import echo; from dinoseg.utils.child import Child; child = Child(echo, 2**28); "
        "context = child.deadline(60); context.__enter__(); child.send({'number': 1}); print(child.receive())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "({'number': 1}, b'')\n"
