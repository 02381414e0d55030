"""Tables of mistakes, and of the words that the message of each must hold: its key, its value and its remedy."""

from pathlib import Path

import pytest

from dinoseg.utils.errors import UserError


def refusals(table, *, error=UserError):
    """Return a test of a table: the name of a mistake to (function without arguments, word, ...).

    Each function runs in an empty folder of its own, so that it writes files, and names them, by relative paths.
    """
    rows = [pytest.param(act, words, id=name) for name, (act, *words) in table.items()]

    @pytest.mark.parametrize(("act", "words"), rows)
    def test(tmp_path, monkeypatch, act, words):
        monkeypatch.chdir(tmp_path)
        assert_refused(act, *words, error=error)

    return test


def assert_refused(act, *words, error=UserError):
    """Check that a call raises an error whose message holds all the words; return the message."""
    with pytest.raises(error) as raised:
        act()
    message = str(raised.value)
    assert words and not [word for word in words if word not in message], message
    return message


def command(*words):
    """Return a function that runs a command line in the current folder, and raises what it prints as its error."""

    def act():
        from command_line import call  # with Hydra and OpenCV, which tests of child processes do not need

        done = call(Path.cwd(), *words)
        if done.status:
            raise UserError(done.err)

    return act
