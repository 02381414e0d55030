"""Text from files, names above all, never steers the terminal that it is shown on."""

import logging
import sys
from io import StringIO

import numpy as np
import pytest
from command_line import call

from dinoseg.report.progress import Bar
from dinoseg.runs.log_file import configure_log
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import format_override, format_text, format_value, join_names, printable, suggest_nearest

NASTY = "a\x1b]0;owned\x07\r\x9b31m\u202egnp.\u2066\x7fz"
SHOWN = r"a\x1b]0;owned\x07\r\x9b31m\u202egnp.\u2066\x7fz"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        (NASTY, SHOWN),
        ("line\n\tof ours: é 猫 🐈\u200d⬛", "line\n\tof ours: é 猫 🐈\u200d⬛"),
        ("caf\udce9 \ud800", r"caf\xe9 \ud800"),
        ("one\u2028two", r"one\u2028two"),
    ],
)
def test_terminal_control_codes_are_escaped(text, escaped):
    assert printable(text) == str(UserError(text)) == escaped


def test_logs_prints_and_bars_show_no_control_characters(tmp_path, monkeypatch):
    out, err = StringIO(), StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    handlers = logging.getLogger().handlers[:]
    level = logging.getLogger().level
    try:
        configure_log(tmp_path)
        configure_log(tmp_path)  # of the second job of a sweep
        logging.getLogger("any").warning("left out: %s", NASTY)
        try:
            raise ValueError(NASTY)
        except ValueError:
            logging.exception("failed")
        print(f"left out: {NASTY}")
        with Bar(total=1, desc=NASTY) as bar:
            bar.update()
            bar.refresh()
    finally:
        for handler in logging.getLogger().handlers:
            handler.close()
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
    log = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert out.getvalue() == f"left out: {SHOWN}\n"
    assert log.count(SHOWN) == 2 and err.getvalue().count(SHOWN) == 3
    assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\x7f"} & {*log, *err.getvalue()}


def test_the_command_line_prints_names_escaped(tmp_path):
    for name in ("0", NASTY.replace("/", "")):
        write_png(tmp_path / f"data/train/images/{name}.png", np.zeros((4, 6), np.uint8))
    (tmp_path / "data/train/masks").mkdir()
    done = call(tmp_path, "mode=doctor", "data=folder", "data.root=data", "data.classes=[a,b]")
    assert done.status == 1 and SHOWN in done.err + done.out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*done.out, *done.err}


def test_lists_show_line_breaks_and_long_values_are_cut():
    assert join_names(["a\nb", "c"]) == r"a\nb, c"
    assert format_text("a" * 81) == "a" * 77 + "..." and format_text("a" * 80) == "a" * 80
    assert format_value("a" * 80) == "'" + "a" * 76 + "..."


@pytest.mark.parametrize(
    ("value", "in_message", "as_typed"),
    [
        (1, "1", "1"),
        ("1", "'1'", "'1'"),
        ("1e3", "'1e3'", "'1e3'"),
        ("null", "'null'", "'null'"),
        (None, "None", "null"),
        (True, "True", "true"),
        (["1", 1, "leaf 1"], "['1', 1, 'leaf 1']", "['1',1,leaf 1]"),
        ("a\n猫", r"'a\n猫'", r"'a\n\u732b'"),
    ],
)
def test_text_is_not_shown_as_a_value_of_another_type(value, in_message, as_typed):
    assert format_value(value) == in_message and format_override(value) == as_typed


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("data.augment.flips", "data.augment.flip"),
        ("head.flips", "inference.flips"),
        ("data.augment.batch_size", "data.batch_size"),
    ],
)
def test_a_suggested_key_has_the_same_parent_if_one_is_similar(word, found):
    known = ["data.augment.flip", "data.augment.scale", "data.batch_size", "inference.flips"]
    assert suggest_nearest(word, known) == f" Did you mean {found}?"


def test_longer_keys_of_the_same_group_are_suggested_first():
    assert (
        suggest_nearest("render.train", ["data.train", "render.train_videos"]) == " Did you mean render.train_videos?"
    )
