"""Decision of `resume=auto` over plain data about runs, and identifiers of scheduler jobs."""

from dataclasses import replace
from pathlib import Path

import pytest

from dinoseg.checkpoints.auto_resume import (
    Action,
    PastRun,
    Plan,
    Request,
    decide,
    decide_in_folder,
    find_near_misses,
    scheduler_job,
)
from dinoseg.utils.errors import UserError

PLAN = Plan({"seed": 0, "head.width": 8, "trainer.clip": 1.0}, {"steps": 10}, {"head": "mlp"})
LONGER = replace(PLAN, length={"steps": 20})
OTHER = Plan({"seed": 0, "head.depth": 2, "trainer.clip": 7}, {"steps": 10}, {"head": "cnn"})
REQUEST = Request(PLAN, {})
FOLDER = Path("mine")


def run(name="run", plan=PLAN, **state):
    return PastRun(Path(name), plan, **{"step": 4, **state})


ENDED = {"step": 10, "end": 10}
FINISHED = {**ENDED, "is_evaluated": True}


@pytest.mark.parametrize(
    ("request_", "runs", "action", "chosen"),
    [
        (REQUEST, [], Action.START, None),
        (REQUEST, [run("new"), run("old")], Action.RESUME, "new"),
        (REQUEST, [run("new", **FINISHED), run("old")], Action.RESUME, "old"),
        (REQUEST, [run(**FINISHED)], Action.START, None),
        (REQUEST, [run(**ENDED)], Action.EVALUATE, "run"),
        (REQUEST, [run(**{**FINISHED, "step": 12})], Action.RESUME, "run"),  # extended since
        (REQUEST, [run(step=None)], Action.START, None),
        (REQUEST, [run(in_sweep=True), run(plan=OTHER), run(plan=LONGER)], Action.START, None),
        (replace(REQUEST, job="7"), [run("new"), run("mine", jobs={"7"})], Action.RESUME, "mine"),
        (replace(REQUEST, job="7"), [run("new"), run("mine", jobs={"7"}, **FINISHED)], Action.NOTHING, "mine"),
        (replace(REQUEST, job="7"), [run("new"), run("mine", jobs={"7"}, step=None)], Action.START, "mine"),
        (replace(REQUEST, job="7"), [run("new"), run("mine", plan=LONGER, jobs={"7"})], Action.RESUME, "new"),
        (replace(REQUEST, in_sweep=True), [run("2", OTHER), run("1", **FINISHED)], Action.NOTHING, "1"),
        (replace(REQUEST, in_sweep=True), [run("0", in_sweep=True)], Action.RESUME, "0"),
        (replace(REQUEST, in_sweep=True, words={"a=2"}), [run("0", words={"a=1"})], Action.START, None),
        (replace(REQUEST, in_sweep=True, words={"a=2"}), [run("1", words={"a=2"}, **ENDED)], Action.EVALUATE, "1"),
        (replace(REQUEST, words={"a=2"}), [run("0", words={"a=1"})], Action.RESUME, "0"),
    ],
)
def test_decision_among_runs(request_, runs, action, chosen):
    decision = decide(request_, runs)
    assert (decision.action, decision.run and decision.run.folder.name) == (action, chosen)


@pytest.mark.parametrize(
    ("typed", "found", "action"),
    [
        ({}, None, Action.START),
        ({}, run(step=None), Action.START),
        ({}, run(plan=LONGER), Action.RESUME),
        ({}, run(**FINISHED), Action.NOTHING),
        ({}, run(**ENDED), Action.EVALUATE),
        ({"steps": 10}, run(**FINISHED), Action.NOTHING),
        ({"steps": 5}, run(**FINISHED), Action.NOTHING),
        ({"steps": 20}, run(**FINISHED), Action.RESUME),
        ({"epochs": 3}, run(**ENDED), Action.RESUME),
        ({"steps": 10}, run(plan=replace(PLAN, length={"epochs": 3}), **FINISHED), Action.NOTHING),  # as many steps
    ],
)
def test_decision_in_given_folder(typed, found, action):
    assert decide_in_folder(Request(PLAN, typed), FOLDER, found).action is action


def test_other_recipe_in_given_folder_names_keys_and_options():
    with pytest.raises(UserError) as raised:
        decide_in_folder(REQUEST, FOLDER, run(plan=OTHER))
    message = str(raised.value)
    assert all(part in message for part in ("mine", "head (cnn there, mlp here)", "trainer.clip (7 there, 1.0 here)"))
    assert "head.width" not in message and "seed" not in message


def test_near_misses_name_differing_keys_of_newest_runs():
    far = Plan({"a": 1, "b": 2, "c": 3}, {"steps": 10}, {"head": "mlp"})
    runs = [run("far", far), run("swept", LONGER, in_sweep=True), run("long", LONGER), run("done", **FINISHED)]
    long, done = find_near_misses(REQUEST, runs)
    assert "long differs in trainer.steps (20 there, 10 here)" in long and "done is finished" in done
    assert len(find_near_misses(REQUEST, [run(str(number), LONGER) for number in range(9)])) == 3


def test_a_near_miss_differs_in_three_keys_at_most():
    here = Plan(dict.fromkeys("abcd", 1), {"steps": 10}, {})
    others = [here.settings | dict.fromkeys("abcd"[:count], 2) for count in (3, 4)]
    runs = [run(str(count), replace(here, settings=other)) for count, other in zip((3, 4), others, strict=True)]
    (near,) = find_near_misses(Request(here, {}), runs)
    assert "3 differs in a (2 there, 1 here); b " in near


def test_near_misses_of_a_sweep_name_differing_words():
    runs = [run("0", words={"a=1", "b"}), run("1", LONGER, words={"b"})]
    request = replace(REQUEST, in_sweep=True, words={"a=2", "b"})
    assert find_near_misses(request, runs) == ["not resumed: 0 differs in a=1 a=2"]


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, "slurm  7"),
        ({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "a"}, "slurm a 7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "slurm  7_2"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun x"),
        ({"TORCHELASTIC_RUN_ID": "none"}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "SLURM_JOB_ID": "7"}, "slurm  7"),
    ],
)
def test_scheduler_job_is_stable_over_requeues(environment, job):
    assert scheduler_job(environment) == job
