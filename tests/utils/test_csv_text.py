"""CSV of names that strangers gave."""

import csv

import pytest

from dinoseg.utils.csv_text import write_csv


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1+1", "'+1+1"),
        ("-cmd|'/C calc'!A0", "'-cmd|'/C calc'!A0"),
        ("@SUM(1)", "'@SUM(1)"),
        ("  =1", "'  =1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("a;=1+1", "a;'=1+1"),
        ('x;"=1+1', "x;'\"=1+1"),
        ('x; "" =1', 'x;\' "" =1'),
        ('x;"a=1', 'x;"a=1'),
        ("\t=1", "\\t=1"),
        ("\r=1", "\\r=1"),
        ("a\n=1", "a\\n=1"),
        ("a\x1b[2J\u202egnp.exe", "a\\x1b[2J\\u202egnp.exe"),
        ("\udcff", "\\xff"),
        ("a-b, c = d", "a-b, c = d"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        (-0.5, "-0.5"),
        (-3, "-3"),
        (None, ""),
        ("", ""),
    ],
)
def test_a_name_is_text_and_a_number_a_number(value, cell, tmp_path):
    write_csv(tmp_path / "a.csv", [[value, 1]])
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [[cell, "1"]]
