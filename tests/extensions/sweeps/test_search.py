"""hydra/sweeper=optuna: values are searched for, and a search that was ended goes on."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hydra.core.plugins import Plugins
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.extensions.sweeps.job_results import JobResults
from dinoseg.utils import locks
from dinoseg.utils.errors import UserError

pytest.importorskip("optuna")
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from dinoseg.extensions.sweeps.search import Search, _values, open_study  # noqa: E402

WORDS = ["mode=train", "lr=tag(log,interval(1e-4,1e-1))", "head=linear,mlp"]


class Jobs:
    """A launcher whose jobs score by their learning rate."""

    def __init__(self, does=None):
        self.done, self.does = {}, does or (lambda number, rate: {"miou": rate, "loss": -rate})

    def launch(self, jobs, initial_job_idx):
        returned = []
        for number, words in enumerate(jobs, start=initial_job_idx):
            assert words[0] == "mode=train"
            self.done[number] = dict(word.split("=") for word in words)
            returned.append(SimpleNamespace(return_value=self.does(number, float(self.done[number]["lr"]))))
        return returned


def search(folder, jobs=None, words=WORDS, **options):
    """Search by jobs, and return these."""
    jobs = jobs or Jobs()
    defaults = dict(trials=4, at_once=1, score="miou", direction="maximize", sampler="tpe", seed=0)
    made = Search(**{"storage": str(folder / "search.log"), **defaults, **options})
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    with patch.object(Plugins, "instantiate_launcher", lambda *_, **__: jobs):
        made.setup(hydra_context=SimpleNamespace(config_loader=None), task_function=None, config=config)
    made.sweep(list(words))
    return jobs


def test_search_exploits_good_values_and_is_reproducible(tmp_path):
    first, second = (search(tmp_path / name, trials=40) for name in "ab")
    other = search(tmp_path / "c", trials=4, seed=1)
    rates = [float(job["lr"]) for job in first.done.values()]
    assert first.done == second.done and [*first.done] == list(range(40))
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert {job["head"] for job in first.done.values()} == {"linear", "mlp"}
    later, sooner = (sum(rate > 0.02 for rate in part) / len(part) for part in (rates[20:], rates[:10]))
    assert later > 2 * sooner and other.done[0] != first.done[0]
    lowest = search(tmp_path / "d", trials=40, score="loss", direction="maximize")
    assert sum(float(job["lr"]) < 1e-3 for job in [*lowest.done.values()][20:]) > 10


def test_killed_search_repeats_its_running_job_and_finishes(tmp_path):
    def interrupt_fourth(number, rate):
        if number == 3:
            raise KeyboardInterrupt
        return {"miou": rate}

    whole = search(tmp_path / "whole", trials=6)
    begun = Jobs(interrupt_fourth)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", begun, trials=6)
    with open(tmp_path / "cut/search.log", "a", encoding="utf-8") as file:
        file.write('{"op_code":6,"worker')  # cut off by the kill
    rest = search(tmp_path / "cut", trials=6)
    assert [*begun.done] == [0, 1, 2, 3] and [*rest.done] == [3, 4, 5]  # in its own folder
    assert begun.done | rest.done == whole.done
    assert not search(tmp_path / "cut", trials=6).done
    more = search(tmp_path / "cut", trials=7)
    assert [*more.done] == [6] and more.done[6]["lr"] != begun.done[3]["lr"]


def test_killed_jobs_of_a_search_run_again_together(tmp_path):
    batches = []

    class Recorded(Jobs):
        def launch(self, jobs, initial_job_idx):
            batches.append([*range(initial_job_idx, initial_job_idx + len(jobs))])
            return super().launch(jobs, initial_job_idx)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Jobs(interrupt), at_once=4)
    JobResults(tmp_path).store(
        1, {"words": {}, "job": 1, "process": 1, "note": "", "returned": {"miou": 0.5}, "further": []}
    )
    search(tmp_path, Recorded(), at_once=4)
    assert batches == [[0], [2, 3]]


def test_concurrent_jobs_never_exceed_the_limit(tmp_path):
    jobs = Jobs()
    batches = []
    launch = jobs.launch
    jobs.launch = lambda several, initial_job_idx: (batches.append(len(several)), launch(several, initial_job_idx))[1]
    search(tmp_path, jobs, trials=5, at_once=2, sampler="random")
    assert batches == [2, 2, 1] and len({job["lr"] for job in jobs.done.values()}) == 5


@pytest.mark.parametrize(("at_once", "apart"), [(1, False), (2, True)])
def test_concurrent_jobs_are_sampled_apart(tmp_path, monkeypatch, at_once, apart):
    import optuna

    given = {}
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **options: given.update(options))
    Search("search.log", 4, at_once, "miou", "maximize", "tpe", 7)._sampler(3)
    assert given == {"seed": 10, "constant_liar": apart}


@pytest.mark.parametrize("fault", [{"error": "no"}, {"loss": 1.0}, {"miou": float("nan")}, {"miou": None}, None])
def test_three_jobs_without_a_score_end_the_search(tmp_path, fault, capsys):
    hopeless = search(tmp_path / "a", Jobs(lambda number, rate: fault), trials=9)
    once = search(tmp_path / "b", Jobs(lambda number, rate: {"miou": 0.5} if number else fault), trials=5)
    later = search(tmp_path / "c", Jobs(lambda number, rate: fault if number else {"miou": 0.5}), trials=5)
    assert [*hopeless.done] == [0, 1, 2] and [*once.done] == [*later.done] == [0, 1, 2, 3, 4]
    assert "No job has a score after 3 jobs" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_an_infinite_score_is_the_worst_of_a_search(tmp_path, direction):
    jobs = Jobs(lambda number, rate: {"x": None, "x_infinite_images": 2.0} if number % 2 else {"x": rate})
    search(tmp_path, jobs, score="x", direction=direction)
    study = open_study(tmp_path / "search.log", direction, ["x", direction, *WORDS[1:]], ["mode=train"])
    worst = math.inf if direction == "minimize" else -math.inf
    assert [trial.value == worst for trial in study.trials] == [False, True, False, True]


def test_a_search_by_finite_images_alone_is_refused(tmp_path, capsys):
    jobs = Jobs(lambda number, rate: {"x": None, "x_infinite_images": 2.0, "x_finite_mean": rate})
    search(tmp_path, jobs, score="x_finite_mean")
    study = open_study(tmp_path / "search.log", "maximize", ["x_finite_mean", "maximize", *WORDS[1:]], ["mode=train"])
    assert [trial.value for trial in study.trials] == [None] * 3
    assert "Set hydra.sweeper.score=x." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trials": 0}, "hydra.sweeper.trials=0 is out of range. Give a whole number of at least 1"),
        ({"seed": -1}, "hydra.sweeper.seed=-1 is out of range. Give a whole number from 0 to"),
        ({"score": None}, "hydra.sweeper.score=null is of type NoneType. Give text"),
        ({"words": ["mode=train", "lr=range(5,1)"]}, "holds no value"),
        ({"direction": "up"}, "Choose maximize or minimize"),
        ({"sampler": "grid"}, "Choose tpe or random"),
        ({"words": ["mode=train", "lr=0.1"]}, "no key has several values"),
        ({"words": ["mode=train", "lr=tag(log,interval(0,1))"]}, "of numbers above 0"),
        ({"words": ["mode=train", "lr=interval(2,1)"]}, "from the lower to the higher end"),
    ],
)
def test_invalid_search_is_refused(tmp_path, options, said):
    jobs = Jobs()
    assert_refused(lambda: search(tmp_path, jobs, **options), said)
    assert not jobs.done


def test_search_storage_belongs_to_one_search_and_process(tmp_path):
    search(tmp_path, trials=1)
    assert_refused(lambda: search(tmp_path, words=[*WORDS[:2], "head=linear"]), "holds another search")
    assert_refused(lambda: search(tmp_path, score="loss"), "holds another search")
    held = locks.acquire(tmp_path / "search.log.own")
    try:
        assert_refused(lambda: search(tmp_path), "Another process searches with")
    finally:
        locks.release(held)


def interrupt(number, rate):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("note", "numbers"), [("", {"miou": 0.5}), ("broken", {})])
def test_a_job_that_outlived_its_search_is_not_run_again(tmp_path, capsys, note, numbers):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Jobs(interrupt))
    row = {"words": {}, "job": 0, "process": 1, "note": note, "returned": numbers, "further": []}
    JobResults(tmp_path).store(0, row)
    rest = search(tmp_path)
    assert [*rest.done] == [1, 2, 3] and not capsys.readouterr().err  # that failed: it says itself why


@pytest.mark.parametrize("text", [b"notes", b"\x80weights\n\n", b"[]\n", b'{"op_code":6,"w":1}\n'])
def test_foreign_file_at_the_search_log_is_unchanged(tmp_path, text):
    (tmp_path / "search.log").write_bytes(text)
    assert_refused(lambda: search(tmp_path), "search.log does not hold a search")
    assert (tmp_path / "search.log").read_bytes() == text


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [line | {"op_code": 99} for line in lines],
        lambda lines: [line for line in lines if "user_attr" not in line],
        lambda lines: [*lines, 5],
        lambda lines: [*lines, {}],
    ],
)
def test_a_damaged_storage_is_refused(tmp_path, damage):
    search(tmp_path, trials=1)
    path = tmp_path / "search.log"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in damage(lines)))
    jobs = Jobs()
    with pytest.raises(UserError, match="search.log (is damaged|holds another search|does not hold a search)"):
        search(tmp_path, jobs)
    assert not jobs.done


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_storage_that_is_not_a_file_is_refused(tmp_path, make):
    make(tmp_path / "search.log")
    with pytest.raises(UserError, match="search.log is a (folder|named pipe). Put a file there"):
        search(tmp_path)


@pytest.mark.parametrize("left", [b"", b'{"op_co', b'{"op_code":0,"worker'])
def test_truncated_first_line_of_the_log_restarts_the_search(tmp_path, left):
    (tmp_path / "search.log").write_bytes(left)
    (tmp_path / "search.log.lock").symlink_to("somewhere/search.log")  # of a killed process
    assert [*search(tmp_path, trials=1).done] == [0]


def test_search_resumes_with_other_fixed_overrides(tmp_path, capsys):
    assert_refused(lambda: search(tmp_path, words=["mode=train", "lr=interval(2,1)"]), "from the lower")
    search(tmp_path, words=["mode=train", "lr=interval(1,2)"], trials=1)
    jobs = search(tmp_path, words=["mode=train", "lr=interval(1,2)", "a=1"], trials=2)
    assert [*jobs.done] == [1] and "differ in a=1: are scores comparable?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "space"),
    [
        ("a=interval(0.5,2)", FloatDistribution(0.5, 2)),
        ("a=interval(1,8)", FloatDistribution(1, 8)),
        ("a=int(interval(1,8))", IntDistribution(1, 8)),
        ("a=tag(log,int(interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("a=range(1,8,3)", IntDistribution(1, 7, step=3)),
        ("a=range(0.5,1.5,0.5)", CategoricalDistribution(["0.5", "1.0"])),
        ("a=shuffle(range(1,3))", CategoricalDistribution(["1", "2"])),
        ("a=x,'y z',[1,2]", CategoricalDistribution(["x", "'y z'", "[1,2]"])),
    ],
)
def test_sweep_syntax_of_hydra_maps_to_optuna(word, space):
    found = _values(OverridesParser.create().parse_override(word))
    assert type(found) is type(space)
    if isinstance(space, CategoricalDistribution):
        assert sorted(map(str, found.choices)) == sorted(space.choices)
    else:
        assert found == space
