"""Values given in Python reach the config unchanged."""

import enum
import math
import random
from pathlib import Path

import numpy as np
import pytest

from dinoseg.api.compose import compose, words_of
from dinoseg.config.grammar import write_value
from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow
LETTERS = "abnul1_-. ,=:;'\"\\()[]{}<>|&!?*+~#%@^`/$éßö中İſ\u212a\U0001f33f\t\n"
TEXTS = ["", " ", "null", "None", "true", "1", "1e3", "-1", "inf", "nan", "a b", "a,b", "a=b", "[a]", "{a:b}", "it's"]
TEXTS += [
    '"',
    "'",
    "\\",
    "\\'",
    'a\\"',
    "${",
    "$",
    "}{",
    "~",
    "+a",
    "a:b",
    "C:\\data\\x",
    "range(1,2)",
    "glob(*)",
    "a #b",
    "Döhe",
    "\\u00f6",
]


class Split(str, enum.Enum):  # noqa: UP042 - as of older programs
    VAL = "val"


def text(rng):
    drawn = "".join(rng.choices(LETTERS, k=rng.randrange(8)))
    return rng.choice([rng.choice(TEXTS), drawn]).replace("${", "$")


def value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 5:
        number = rng.choice([0, 1, -7, 2**70, 0.5, -1e-9, 1e300, math.inf, -math.inf, 3.0])
        return [None, rng.random() < 0.5, number, text(rng), text(rng)][kind]
    if kind < 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice([text(rng), f"k{number}", number]): value(rng, depth + 1) for number in range(rng.randrange(3))}


def test_composed_values_equal_the_given_values():
    rng = random.Random(0)
    given = {f"k{number}": value(rng) for number in range(600)}
    words = words_of({f"++probe.{key}": each for key, each in given.items()}, lambda key: False)
    found = to_container(compose(words).probe)
    assert [key for key in given if repr(found[key]) != repr(given[key])] == []
    assert len({repr(each) for each in given.values()}) > 200


@pytest.mark.parametrize(
    ("given", "composed"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (Path("a folder/it's.png"), "a folder/it's.png"),
        ((1, 2), [1, 2]),
        (Split.VAL, "val"),
        (np.str_("x, y"), "x, y"),
        ({"a key: (1)": 1}, {"a key: (1)": 1}),
        ({"1": 1, 1: 2, "null": 3}, {"1": 1, 1: 2, "null": 3}),
        ({"\uffff \U00010000": 1}, {"\uffff \U00010000": 1}),
    ],
)
def test_other_types_become_plain_values(given, composed):
    found = compose(words_of({"++probe": {"x": given}}, lambda key: key == "++probe")).probe
    assert repr(to_container(found)["x"]) == repr(composed)


def test_nan_stays_nan():
    assert math.isnan(compose(words_of({"++probe.x": math.nan})).probe.x)


def test_words_are_as_typed_where_hydra_reads_them_as_text():
    given = {
        "head": "mlp",
        "data.root": "my data/x",
        "trainer": {"steps": 20},
        "seed": None,
        "data.classes": ["a", "b c"],
    }
    typed = ["head=mlp", "data.root=my data/x", "trainer.steps=20", "seed=null", 'data.classes=[a,"b c"]']
    assert words_of(given) == typed


def test_paths_with_any_characters_are_paths():
    for path in ("a,b", "[x]", "a b=c", "'q'", "x{y}"):
        assert compose(words_of({"mode": "predict", "input": Path(path), "data.root": path})).input == path


@pytest.mark.parametrize("value", [np.zeros(2), object(), {1, 2}, b"x", 1j, [np.zeros(2)]])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match=r"seed is of type \w+\. Give text"):
        words_of({"seed": value})


def test_letters_of_any_language_are_written():
    given = {"data": "folder", "data.root": "Döhe", "data.classes": ["a", "Höhe"], "loss": {"weights": {"Höhe": 2.0}}}
    cfg = compose(words_of(given))
    assert (cfg.data.root, [*cfg.data.classes], dict(cfg.loss.weights)) == ("Döhe", ["a", "Höhe"], {"Höhe": 2.0})


def test_a_dotted_name_that_cannot_be_written_is_refused():
    with pytest.raises(UserError, match="Set it in a YAML file"):
        words_of({"labels.ä": 1})


def test_entries_of_heads_are_parsed_back_by_hydra():
    keys = {"weights": "Döhe.pth", "note": "null", "channels": 16, "drop": 0.5, "norm": None, "on": True}
    words = [f"++probe.{key}={write_value(value)}" for key, value in keys.items()]
    assert to_container(compose(words).probe) == keys
