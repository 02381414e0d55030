"""Progress on a terminal and in a pipe."""

import io
import sys

import pytest

from dinoseg.report import progress
from dinoseg.report.progress import Bar


@pytest.fixture
def stderr(monkeypatch):
    """Return a function that makes stderr a terminal or a pipe, and gives what is written to it."""

    def replace(terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def test_pipe_gets_whole_lines(stderr, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    written = stderr(False)
    with Bar(total=3, unit="image", desc="predicting") as bar:
        for _ in range(3):
            bar.update()
    lines = written.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"predicting: {count} of 3 images" for count in (1, 2, 3)]
    assert "\r" not in written.getvalue() and "left" in lines[0] and "images/s" in lines[0]


def test_pipe_gets_few_lines(stderr):
    written = stderr(False)
    assert list(Bar(range(1000), unit="file")) == list(range(1000))
    assert written.getvalue() == ""  # it was over before the first was due


def test_terminal_gets_a_bar(stderr):
    written = stderr(True)
    list(Bar(range(3), unit="file"))
    assert "\r" in written.getvalue() and "3/3" in written.getvalue()
