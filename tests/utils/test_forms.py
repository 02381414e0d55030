"""What is read back from disk: hostile JSON is told apart from what was written, wherever it is read."""

import json
import os
from functools import partial

import pytest
import torch
from mistakes import assert_refused, refusals
from safetensors.torch import save_file

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.scan import scan
from dinoseg.data.scan.measure import Record
from dinoseg.evaluation.run_facts import TRACKING
from dinoseg.extensions.clips.youtube_vos import YoutubeVos
from dinoseg.extensions.packed.store import INDEX, PIXELS, Extent, StoreKey, open_store, write_index
from dinoseg.extensions.tracking.state_form import TensorForm, check_state
from dinoseg.extensions.tracking.video.state import STATE, read_track_state
from dinoseg.extensions.video_scores.restart import earlier_run
from dinoseg.runs.split_file import _read_split
from dinoseg.utils import forms
from dinoseg.utils.files import is_name
from dinoseg.utils.forms import SchemaError, parse_json

HOSTILE = [  # none of them has the form of anything that is written
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[" * 30 + b"]" * 30,
    b"null",
    b"[]",
    b'"text"',
    b"NaN",
    b'{"a": Infinity}',
    b'{"a": 1e999}',
    b'{"a": 1, "a": 2}',
    b"9" * 5000,
    b'{"videos": NaN, "train": NaN, "data": {}, "given": "none", "tracker": {}}',
    b'{"videos": [1], "train": [1], "made_by": 1}',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_reader_takes_hostile_json_or_breaks_on_it(tmp_path, caplog, text):
    for name in (INDEX, TRACKING, "split.json", "train/meta.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / PIXELS).write_bytes(bytes(64))
    assert open_store(tmp_path, StoreKey("f", None), ["a"]) is None
    assert _read_split(tmp_path / "split.json") is None
    assert caplog.text.count("is damaged (") == 1
    resume = partial(earlier_run, str(tmp_path), {"data": {}, "given": "none", "tracker": {}})
    assert_refused(resume, "holds no readable tracking.json (", "leave mode.restart out")
    for folder in ("JPEGImages/v", "Annotations/v"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    videos = YoutubeVos(str(tmp_path)).videos
    assert_refused(lambda: videos("train"), "Cannot read ", "meta.json as YouTube-VOS's", "Unpack it again")
    save_file({"a": torch.zeros(1)}, tmp_path / STATE, {"track": text.decode("utf-8", "replace")})
    assert_refused(lambda: read_track_state(tmp_path), "state.safetensors is not readable (", "Leave mode.restart out")
    reader = MaskReader(Labels.of(["a"], None, 255), Masks())
    path = scan._find_file(tmp_path, [], reader)
    path.write_bytes(text)
    caplog.clear()
    assert scan._read_records(path) == {}
    assert ("is damaged (" in caplog.text) == (text != b"{}")  # which says that nothing was scanned


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(0, value) for value in (-64, 64, 2**70, 1.0, "0", True, None, [0])],
        *[(1, value) for value in (0, -1, 2**40, 2.0, "2", True)],
        *[(3, value) for value in (-1, 2**32, "1")],
        *[(4, value) for value in (0, 2**20, "3")],
        *[(5, value) for value in (0, 3, True)],
        *[(6, value) for value in (-1, 3, 2**20 + 1, "0")],
    ],
)
def test_places_in_a_packed_store_lie_inside_its_file(tmp_path, place, value):
    key = StoreKey("f", None)
    names = ["a"]
    numbers = [0, 2, 3, 7, 3, 1, 0]
    (tmp_path / PIXELS).write_bytes(bytes(64))
    write_index(tmp_path, key, names, [])
    content = json.loads((tmp_path / INDEX).read_text())
    for expected in (True, False):
        (tmp_path / INDEX).write_text(json.dumps({**content, "places": [numbers]}))
        assert (open_store(tmp_path, key, names) is not None) == expected
        numbers = [value if position == place else number for position, number in enumerate(numbers)]


def test_no_item_of_a_packed_store_is_larger_than_an_image(tmp_path):
    key = StoreKey("f", None)
    (tmp_path / PIXELS).touch()
    os.truncate(tmp_path / PIXELS, 2**40)  # all holes
    for side, there in ((2**13, True), (2**15, False)):
        write_index(tmp_path, key, ["a"], [Extent(0, side, side, 0)])
        assert (open_store(tmp_path, key, ["a"]) is not None) == there


def test_damaged_scan_cache_is_rebuilt(tmp_path, caplog):
    reader = MaskReader(Labels.of(["a"], None, 255), Masks())
    mask = tmp_path / "m.png"
    mask.write_bytes(b"x")
    path = scan._find_file(tmp_path, [Pair("m", mask, mask)], reader)
    record = Record("m", str(mask), str(mask), (2, 3), (2, 3), pixels={0: 6}, raw={"0": 6})
    scan._write_records(path, {"m": ([1, 2], record)})
    assert scan._read_records(path) == {"m": ([1, 2], record)}
    rows = json.loads(path.read_text())
    for change in (
        *({"pixels": counts} for counts in ([1], {"a": 1}, {"0": "x"})),
        *({"image_size": 3}, {"unknown": 1}, {"edges": 3}, {"problems": ["a"]}, {"raw": None}),
    ):
        changed = {"m": {**rows["m"], "record": {**rows["m"]["record"], **change}}}
        path.write_text(json.dumps(changed))
        caplog.clear()
        assert scan._read_records(path) == {} and "is damaged (" in caplog.text, change


ROWS = forms.record(rows=forms.list_of(forms.row(forms.whole(0, 9), forms.maybe(forms.text)), length=2))
test_forms_say_where_and_what = refusals(
    {
        "a number above": (
            lambda: parse_json('{"rows": [[0, null], [10, "a"]]}', ROWS),
            "it.rows[1][0] is 10; it must be a whole number from 0 to 9",
        ),
        "no text": (lambda: parse_json('{"rows": [[0, null], [9, 1]]}', ROWS), "it.rows[1][1] is 1; it must be text"),
        "a row too few": (lambda: parse_json('{"rows": [[0, null]]}', ROWS), "it.rows is ", "; it must be a list of 2"),
        "a row too many": (
            lambda: parse_json('{"rows": [[0, null], [9, "a"], [9, "a"]]}', ROWS),
            "it.rows is ",
            "; it must be a list of 2",
        ),
        "too deep": (lambda: parse_json("[[[[]]]]", forms.max_depth(3)), "it must be nested at most 3 levels deep"),
        "a short row": (lambda: parse_json('{"rows": [[0, null], [9]]}', ROWS), "it.rows[1] is [9]; it must be a list"),
        "another key": (lambda: parse_json('{"row": []}', ROWS), "must be an object of rows"),
        "a key more": (lambda: parse_json('{"rows": [[0, null], [9, "a"]], "more": 1}', ROWS), "an object of rows"),
        "a number too large": (lambda: parse_json("1e999", forms.number()), "is inf; it must be a number"),
        "a name twice": (lambda: parse_json('{"rows": [], "rows": []}', ROWS), "a name occurs twice"),
        "no number": (lambda: parse_json("NaN", forms.number()), "is nan; it must be a number"),
        "a number above 1": (lambda: parse_json("2", forms.number(0, 1)), "is 2; it must be a number from 0 to 1"),
        "no float": (lambda: parse_json("1" + "0" * 400, forms.number()), "must be a number"),
        "a long value": (
            lambda: parse_json(f'["{"a" * 99}"]', forms.list_of(forms.whole())),
            f"it[0] is '{'a' * 56}...; it must be",
        ),
        "no flag": (lambda: parse_json("1", forms.flag), "must be true or false"),
        "no bit": (lambda: parse_json("1.0", forms.bit), "it is 1.0; it must be 0, 1, true or false"),
    },
    error=SchemaError,
)


def test_values_of_a_form_are_accepted():
    parse_json('{"rows": [[0, null], [9, "a"]]}', ROWS)
    parse_json("[0, 0.5, 1]", forms.list_of(forms.number(0, 1)))
    parse_json("[[[]]]", forms.max_depth(3))


def test_a_long_name_is_not_repeated_for_each_entry_below_it():
    seen = []
    form = forms.table(forms.list_of(lambda _, where: seen.append(len(where))))
    parse_json(json.dumps({"k" * 10_000: [1] * 5}), form)
    assert len(seen) == 5 and max(seen) < 80


def test_names_that_lead_elsewhere_are_invalid():
    assert all(map(is_name, ("a", "...", ".hidden", "a b", "é", "-a")))
    assert not any(map(is_name, ("", ".", "..", "/", "a/b", "/etc", "a\0b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, "a is torch.float64"),
        ({"a": torch.zeros(2, 4)}, r"b is .* \[3\] instead of torch.int64 \[n\]"),
        ({"a": torch.zeros(2, 3, 1)}, "a is"),
        ({"a": torch.full((2, 3), torch.nan)}, "a holds numbers from nan"),
        ({"a": torch.full((2, 3), torch.inf)}, "a holds numbers from inf"),
        ({"b": torch.tensor([0, 1, 5])}, "b holds numbers from 0.0 to 5.0; allowed are 0 to 4"),
        ({"b": torch.zeros(0, dtype=torch.int64), "a": torch.zeros(2, 0)}, "a is"),
        ({"c": torch.zeros(1)}, "it holds a, b, c instead of a, b"),
    ],
)
def test_tensors_of_a_state_have_their_form(change, message):
    forms = {"a": TensorForm(torch.float32, "2 n"), "b": TensorForm(torch.int64, "n", 0, 4)}
    state = {"a": torch.zeros(2, 3), "b": torch.tensor([0, 1, 4])}
    check_state(state, forms)
    with pytest.raises(ValueError, match=message):
        check_state({**state, **change}, forms)
