"""What runs and sides of a comparison are called and cost, by what stands in their folders."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from mistakes import assert_refused

from dinoseg.extensions.compare import compare_mode as compare
from dinoseg.extensions.compare.side_names import side_names
from dinoseg.extensions.compare.sides import Side, rename_sides
from dinoseg.runs.folder import RunFolder
from dinoseg.training.cost import COST


def run_names(folders):
    return side_names(folders, [[index] for index in range(len(folders))])


@pytest.fixture
def swept(tmp_path):
    """Return a function that makes a sweep of jobs with these words, and returns their folders."""

    def write_sweep(*jobs, name="sweep"):
        folders = [tmp_path / name / str(number) for number in range(len(jobs))]
        for folder, words in zip(folders, jobs, strict=True):
            folder.mkdir(parents=True)
            RunFolder(folder).write_config({}, ["mode=train", *words, f"hydra.run.dir={folder}"])
        (tmp_path / name / "multirun.yaml").touch()
        return folders

    return write_sweep


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("head=mlp", "head=linear"), ["mlp", "linear"]),
        (("loss=focal", "metric@metrics=[ece]"), ["focal", "[ece]"]),
        (("+a.b=1", "++a.b=2"), ["a.b=1", "a.b=2"]),
        (("+data.x=1", "~data.x"), ["data.x=1", "~data.x"]),
        (("k=[a,'b, c']", "k={a:1,b:[x=y]}"), ["k=[a,'b, c']", "k={a:1,b:[x=y]}"]),
        (("k=a\u2028b=1", "k=a\u2028b=2"), ["k=a\u2028b=1", "k=a\u2028b=2"]),  # which ends no line of ours
        (("k=", "k=''"), ["k=", "k=''"]),
        (("k=" + "9" * 58, "k=1"), ["k=" + "9" * 58, "k=1"]),
        (("k=" + "9" * 59, "k=1"), ["0", "k=1"]),  # too long for a heading
        (("hydra.verbose=1", "hydra.verbose=2"), ["0", "1"]),
        (("resume=a", "resume=b"), ["0", "1"]),
        (("k=1", "k=1"), ["0", "1"]),
    ],
)
def test_jobs_are_named_by_the_overrides_that_differ(swept, words, names):
    folders = swept(*([word, "same=1"] for word in words))
    assert run_names(folders) == side_names(folders, [[0], [1]]) == names


def test_side_names_omit_seeds_if_unique_without_them(swept):
    folders = swept(*([f"head={head}", f"+seed={seed}"] for head in "ab" for seed in (0, 1)))
    assert side_names(folders, [[0, 1], [2, 3]]) == ["a", "b"]
    assert run_names(folders) == ["a seed=0", "a seed=1", "b seed=0", "b seed=1"]
    assert side_names(folders[:2], [[0], [1]]) == ["seed=0", "seed=1"]
    assert side_names(folders, [[0, 2], [1], [3]]) == ["seed=0", "a seed=1", "b seed=1"]


def test_equal_names_of_sides_are_refused():
    sides = [SimpleNamespace(name=name) for name in "ab"]
    words = "mode.names=[x,x]: give a different name for each side, in this order: a, b"
    assert_refused(lambda: rename_sides(sides, ["x", "x"]), words)


def test_links_and_resumed_jobs_are_named_as_the_job(swept, tmp_path):
    folders = swept(["head=a"], ["head=b", "resume=auto"])
    (tmp_path / "linked").symlink_to(folders[0])
    assert run_names(folders) == run_names([tmp_path / "linked", folders[1]]) == ["a", "b"]


def test_single_run_is_named_by_its_folder(swept, tmp_path):
    alone = tmp_path / ("alone" * 20)
    alone.mkdir()
    RunFolder(alone).write_config({}, ["mode=train", "head=c", "data.root=elsewhere"])
    folders = [alone, *swept(*([f"head={head}", f"seed={seed}"] for head in "ab" for seed in (0, 1)))]
    assert side_names(folders, [[0], [1, 2], [3, 4]]) == [alone.name, "a", "b"]
    assert run_names(folders)[:2] == [alone.name, "a seed=0"]
    assert side_names(folders, [[0, 1], [2], [3, 4]]) == [f"{alone.name}+0", "a seed=1", "b"]
    assert side_names(folders[:2], [[0], [1]]) == [alone.name, "0"]
    named_so = tmp_path / "a"
    named_so.mkdir()
    assert side_names([named_so, *folders[1:]], [[0], [1, 2], [3, 4]]) == ["a", "head=a", "head=b"]


def test_unreadable_command_gives_no_run_name(swept, monkeypatch):
    folders = swept(["k=1"], ["k=2"])
    typed = folders[0] / "config/overrides.txt"
    typed.unlink()
    os.mkfifo(typed)
    assert run_names(folders) == ["0", "1"]

    def refuse_access(path):
        raise PermissionError(path)

    typed.unlink()
    typed.touch()
    monkeypatch.setattr(Path, "read_bytes", refuse_access)
    assert run_names(folders) == ["0", "1"]


def test_names_of_several_folders_are_joined_and_stay_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/0", "a/1", "a/0+1", "a/2", "a/3", "a/4", "a/5", "a/6")]
    assert side_names(folders[1:], [[0, 1], [2, 3, 4, 5, 6]]) == ["1+0+1", "2+... (5 runs)"]
    assert side_names(folders, [[0, 1], [2], [3]]) == ["0", "0+1", "2"]
    others = [tmp_path / name for name in ("a/0", "a/1", "b/0", "b/1")]
    assert side_names(others, [[0, 1], [2, 3]]) == ["a/0+1", "b/0+1"]
    assert side_names(others, [[0, 3], [1], [2]]) == ["a/0+b/1", "a/1", "b/0"]
    same = [tmp_path / name for name in ("a/eval_1", "b/eval_1", "b/eval_2")]  # by their shortest different paths
    assert run_names(same) == ["a/eval_1", "b/eval_1", "b/eval_2"] and run_names(same[1:]) == ["eval_1", "eval_2"]


@pytest.fixture
def make_row(tmp_path, monkeypatch):
    """Return a function that makes the row of a run whose record of costs has some other values."""
    monkeypatch.setattr(compare, "scores_of", lambda records: {"miou": 0.5, "accuracy": 0.6})

    def make_row(**changes):
        costs = {"parameters": 5, "trainable": 1, "images_per_s": 4.0, "memory_gib": 0.5}
        (tmp_path / COST).write_text(json.dumps(costs | changes))
        record = SimpleNamespace(source=str(tmp_path / "checkpoints/best.safetensors"))
        return compare.run_rows([Side("a", [tmp_path], ["a"], [tmp_path], [record])])[0]

    return make_row


def test_row_has_costs_and_scores(make_row, caplog):
    costs = {"parameters": 5, "trainable": 1, "memory_gib": 0.5, "seconds": 0.25}
    assert make_row() == {"run": "a", "miou": 0.5, "accuracy": 0.6, **costs} and not caplog.text


@pytest.mark.parametrize("damaged", [{"images_per_s": 1e-320}, {"parameters": 10**30}])
def test_damaged_costs_are_dropped_with_a_warning(make_row, caplog, damaged):
    row = make_row(**damaged)
    assert row["miou"] == 0.5
    assert [row[key] for key in ("parameters", "trainable", "memory_gib", "seconds")] == [None] * 4
    assert "cost.json is damaged" in caplog.text and "costs are left out" in caplog.text
