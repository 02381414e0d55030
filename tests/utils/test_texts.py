"""Text of strangers: YAML is plain values or one error, in bounded time; CSV cells are no formulas."""

import csv
import time

import pytest
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.forms import SchemaError
from dinoseg.utils.yaml_text import parse_yaml, read_yaml

LAUGHS = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "alias"),
        (MERGED, "alias"),
        ("data: &a [*a]", "alias"),
        ("a: " + "[" * 20000, "recursion depth"),
        ("seed: " + "9" * 20000, "not plain YAML"),
        ("seed: " + ":".join(["59"] * 2000) + ".5", "not plain YAML"),
        ("? {a: b}\n: 1", "not plain YAML"),
        ("seed: 1\nseed: 2", "seed occurs more than once"),
        ("1: a\n01: b", "1 occurs more than once"),
        ("a: !!python/object/apply:os.system [true]", "tag:yaml.org,2002:python/object/apply:os.system"),
        ("seed: !!bool foo", "not plain YAML"),
        ("seed: !!int ''", "not plain YAML"),
        ("seed: !!float ''", "not plain YAML"),
        ("seed: !!timestamp foo", "not plain YAML"),
        ("%TAG ! tag:yaml.org,2002:\n---\nseed: !bool foo", "not plain YAML"),
        ("seed: 1\n<<: {seed: 2}", "occurs more than once"),
        ("---\na: 1\n---\nb: 2", "not plain YAML"),
        ("a: \0", "not plain YAML"),
        ("data: !!omap 3", "not plain YAML"),
    ],
)
def test_unsafe_yaml_is_one_error_in_bounded_time(text, says):
    begin = time.process_time()
    with pytest.raises(SchemaError, match=says) as caught:
        parse_yaml(text)
    assert time.process_time() - begin < 2 and len(str(caught.value)) < 1000


def test_own_yaml_is_read_back():
    config = {
        "seed": 0,
        "a": {"lr": 1e-5, "none": None, "on": "yes", "day": "2026-01-01", "text": "1e-3", "list": [1, [2.5, True]]},
    }
    assert parse_yaml(OmegaConf.to_yaml(OmegaConf.create({**config, "b": "${a.lr}"}))) == {**config, "b": "${a.lr}"}
    assert parse_yaml("seed: 2026-01-01") == {"seed": "2026-01-01"}, "dates are text, as in Hydra"


def test_yaml_is_utf_8(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    assert_refused(lambda: read_yaml(tmp_path / "bytes.yaml"), "byte 0xff in position 3", error=UnicodeDecodeError)


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
