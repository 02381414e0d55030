import time
from dataclasses import dataclass
from pathlib import Path

from mistakes import assert_refused, refusals

from dinoseg.data.splits import Partition, divide, fraction_split, labelled_names, read_name_list, regex_group

NAMES = [f"v{i // 4}/{i:03d}" for i in range(40)]
SPLITS = ("train", "val", "test")


def test_parts_are_disjoint_complete_and_stable():
    parts = fraction_split(NAMES, val_fraction=0.25, seed=3)
    assert len(parts["val"]) == 10
    assert sorted(parts["train"] + parts["val"]) == NAMES
    assert fraction_split(NAMES[::-1], val_fraction=0.25, seed=3) == parts
    assert fraction_split(NAMES, val_fraction=0.25, seed=4) != parts
    assert fraction_split(list("abcdefgh"), val_fraction=0.25, seed=0)["val"] == ["f", "g"]
    for fraction, held_out in ((0.001, 1), (0.999, 2)):  # neither side is empty
        assert len(fraction_split(["a", "b", "c"], val_fraction=fraction, seed=0)["val"]) == held_out


def test_labelled_subsets_are_nested_and_span_few_groups():
    video = regex_group(r"^(v\d+)/")
    taken = []
    for share, videos in ((0.001, 1), (0.04, 1), (0.1, 1), (0.25, 3), (0.5, 5), (1.0, 10)):
        names = labelled_names(NAMES[::-1], share, seed=2, group=r"^(v\d+)/")
        assert len(names) == max(1, round(share * 40)) and names[: len(taken)] == taken
        assert names == labelled_names(NAMES, share, seed=2, group=r"^(v\d+)/")
        assert len(set(map(video, names))) == videos
        taken = names
    first = [name for name in taken if video(name) == video(taken[0])]
    assert first != sorted(first)  # of a group that is cut it is not the beginning
    assert sorted(taken) == NAMES and labelled_names(NAMES, 0.2, seed=1) != labelled_names(NAMES, 0.2, seed=0)
    assert len(set(map(video, labelled_names(NAMES, 0.25)))) > 3  # without groups, of anywhere


def test_groups_stay_together():
    parts = fraction_split(NAMES, val_fraction=0.3, seed=0, group=regex_group(r"^(v\d+)/"))
    groups = {side: {name.split("/")[0] for name in names} for side, names in parts.items()}
    assert len(groups["val"]) == 3 and not groups["val"] & groups["train"]
    assert regex_group(r"\d+")("ab12c3") == "12" and regex_group("^(x*)v")("v0") == ""


def test_name_lists_are_read(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa/b.jpg\r\n\r\n  v1.5 \r\nc.PNG".encode())
    assert read_name_list(path) == ["a/b", "v1.5", "c"]
    path.write_text("v3/013\nv0/000.png\n")
    assert labelled_names(NAMES, str(path)) == ["v3/013", "v0/000"]
    begin = time.process_time()
    path.write_text("".join(f"{number}\n" for number in range(100_000)) + "7\n")
    assert_refused(lambda: read_name_list(path), "has 100001 names, more than once: 7. ")
    assert time.process_time() - begin < 2


def list_of(content):
    """Write a list of names, and return its path."""
    path = Path("names.txt")
    path.write_bytes(content)
    return path


@dataclass(frozen=True)
class Thing:
    name: str
    origin: str = ""


def find_things(split):
    return [Thing(f"v{video}/{split}_{frame}") for video in range(7) for frame in range(video + 1)]


def folds(fold, count, group=r"^(v\d+)/"):
    partition = Partition(group=group, fold=fold, folds=count)
    return {split: [thing.name for thing in divide(split, find_things, partition)] for split in SPLITS}


def test_folds_divide_train_and_val_together_by_group():
    everything = sorted(thing.name for split in ("train", "val") for thing in find_things(split))
    held_out = []
    for fold in range(3):
        parts = folds(fold, 3)
        assert sorted(parts["train"] + parts["val"]) == everything
        assert not {n.split("/")[0] for n in parts["train"]} & {n.split("/")[0] for n in parts["val"]}
        assert parts["test"] == [thing.name for thing in find_things("test")]
        held_out.append(parts["val"])
    assert sorted(sum(held_out, [])) == everything
    sizes = [len(names) for names in held_out]
    assert max(sizes) - min(sizes) <= 4
    alone = [folds(fold, 56, group=None)["val"] for fold in range(56)]
    assert sorted(map(len, alone)) == [1] * 56
    assert len(fold_both("fraction")) == 1  # which divides train alone


def test_folds_of_equal_groups_depend_on_the_seed():
    def equal(split):
        return [Thing(f"{split}{number}") for number in range(20)]

    parts = [divide("val", equal, Partition(fold=0, folds=5, seed=seed)) for seed in range(5)]
    assert len({tuple(thing.name for thing in part) for part in parts}) == 5 and {*map(len, parts)} == {8}


def fold_both(by):
    """Return one of two folds of the same two names in both splits."""
    return divide("val", lambda split: [Thing("a"), Thing("b")], Partition(by=by, fold=0, folds=2))


def share(split, group=None):
    return divide(split, find_things, Partition("fraction", group=group))


test_message_names_value_and_remedy = refusals(
    {
        "fold alone": (lambda: Partition(fold=0), "fold=0 with folds=None: k-fold cross-validation needs"),
        "folds alone": (lambda: Partition(folds=3), "fold=None with folds=3"),
        "a fold too much": (
            lambda: Partition(fold=3, folds=3),
            "fold=3 with folds=3: ",
            "two folds or more",
        ),
        "a fold below 0": (lambda: Partition(fold=-1, folds=3), "fold=-1 with folds=3: ", "from 0"),
        "one fold": (lambda: Partition(fold=0, folds=1), "fold=0 with folds=1"),
        "more folds than groups": (lambda: folds(0, 9), "partition.folds=9: there are only 7 groups"),
        "no group": (lambda: folds(0, 2, "^w"), "partition.group=", "does not match the name v0/train_0"),
        "a split of no share": (lambda: share("test"), "train and val only, not test"),
        "one file twice": (lambda: fold_both("folder"), "2 names in train and in val (a, b) with the same file"),
        "one group": (lambda: share("val", "^v"), "1 group(s)", "two are needed"),
        "no expression": (lambda: regex_group("("), "group=( is not a regular expression"),
        "a group without match": (
            lambda: regex_group(r"^(w\d+_)?v\d")("v0"),
            *("does not match the name v0, or its first parenthesised group, ", "(?:...)"),
        ),
        "unknown names": (
            lambda: labelled_names(NAMES, str(list_of(b"v3/013\nv3/999\n"))),
            "1 of its names are not in the training split: v3/999. Names have the form",
        ),
        "no list of masks": (lambda: labelled_names(NAMES, "absent.txt"), "labelled=", "absent.txt: cannot read this"),
        "a name twice": (lambda: labelled_names(["a"], str(list_of(b"a\nb\na\n"))), "labelled=", "more than once: a."),
        "empty list": (lambda: read_name_list(list_of(b"\n \n")), "has 0 names. Write"),
        "no text": (lambda: read_name_list(list_of(b"\xff\xfe\x00")), "cannot read this file list"),
    }
)
