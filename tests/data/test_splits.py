import pytest
from making import Pictures

from dinoseg.data.splits import fraction_split, read_name_list, regex_group, split_table
from dinoseg.errors import UserError

NAMES = [f"v{i // 4}/{i:03d}" for i in range(40)]


def test_parts_are_disjoint_complete_and_independent_of_order():
    parts = fraction_split(NAMES, val_fraction=0.25, seed=3)
    assert len(parts["val"]) == 10
    assert sorted(parts["train"] + parts["val"]) == NAMES
    assert fraction_split(NAMES[::-1], val_fraction=0.25, seed=3) == parts
    assert fraction_split(NAMES, val_fraction=0.25, seed=4) != parts


def test_which_names_are_held_out_never_changes():
    assert fraction_split(list("abcdefgh"), val_fraction=0.25, seed=0)["val"] == ["f", "g"]


def test_groups_stay_together():
    parts = fraction_split(NAMES, val_fraction=0.3, seed=0, group=regex_group(r"^(v\d+)/"))
    groups = {side: {name.split("/")[0] for name in names} for side, names in parts.items()}
    assert len(groups["val"]) == 3 and not groups["val"] & groups["train"]
    assert regex_group(r"\d+")("ab12c3") == "12"


@pytest.mark.parametrize(("fraction", "held_out"), [(0.001, 1), (0.999, 2)])
def test_neither_side_is_empty(fraction, held_out):
    assert len(fraction_split(["a", "b", "c"], val_fraction=fraction, seed=0)["val"]) == held_out


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match="val_fraction=.*between 0 and 1"):
        fraction_split(NAMES, val_fraction=fraction, seed=0)


def test_one_group_cannot_be_split():
    with pytest.raises(UserError, match=r"1 group\(s\).*v0.*two are needed"):
        fraction_split(NAMES[:4], val_fraction=0.5, seed=0, group=regex_group("^v."))


def test_bad_group_patterns():
    with pytest.raises(UserError, match=r"group=\( is no regular expression"):
        regex_group("(")
    with pytest.raises(UserError, match=r"group=x\+ does not match the name v0"):
        regex_group("x+")("v0")


def test_name_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa/b.jpg\r\n\r\n  v1.5 \r\nc.PNG".encode())
    assert read_name_list(path) == ["a/b", "v1.5", "c"]
    path.write_text("a\nb\na\n")
    with pytest.raises(UserError, match="names a more than once"):
        read_name_list(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="is empty"):
        read_name_list(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="Cannot read the file list"):
        read_name_list(path)
    with pytest.raises(UserError, match=r"none\.txt"):
        read_name_list(tmp_path / "none.txt")


def test_split_table():
    table = split_table({"train": Pictures([(2, 2)] * 2), "val": Pictures([(2, 2)])})
    assert table == {"train": ["p0", "p1"], "val": ["p0"]}
