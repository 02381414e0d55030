"""What Windows lacks is not needed: whole runs in a process that has no more than Windows offers."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinoseg import __main__
from dinoseg.extensions.sweeps.search import open_study
from dinoseg.utils.files import is_name
from dinoseg.utils.interrupt import forward_signals


@pytest.mark.heavy
def test_modules_and_runs_need_nothing_that_windows_lacks(tmp_path):
    command = [sys.executable, Path(__file__).with_name("as_on_windows.py"), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    modules, *ended = done.stdout.splitlines()
    assert ended == ["train: 0", "resume: 0", "eval: 0", "predict: 0"], done.stdout + done.stderr
    assert int(modules) >= len(list(Path(__file__).parents[1].glob("dinoseg/**/[!_]*.py")))


def test_a_letter_that_standard_output_does_not_know_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["dinoseg"])
    monkeypatch.setattr("dinoseg.modes.help.help_for", lambda arguments: "\u65e5.png")
    __main__.main()
    assert written.getvalue() == b"\\u65e5.png\n"


@pytest.mark.parametrize("text", ["..\\a", "a\\b", "C:a", "a:b"])
def test_on_windows_more_signs_lead_out_of_a_folder(monkeypatch, text):
    assert is_name(text)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not is_name(text) and is_name("a b")


def test_a_search_makes_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "symlink", pytest.fail)
    study = open_study(tmp_path / "search.log", "maximize", ["a=range(1,3)"], [])
    assert not study.get_trials() and (tmp_path / "search.log").is_file()


def test_signals_are_not_forwarded_on_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(process))
    sent = []
    with forward_signals([7, 8]):
        signal.raise_signal(signal.SIGTERM)
    assert not sent
