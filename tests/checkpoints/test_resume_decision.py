"""Decision of `resume=auto` over plain data about runs."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from mistakes import assert_refused

from dinoseg.checkpoints.auto_resume import Action, PastRun, Plan, decide_in_folder

PLAN = Plan({"seed": 0, "head.width": 8, "trainer.clip": 1.0}, {"steps": 10}, {"head": "mlp"})
LONGER = replace(PLAN, length={"steps": 20})
OTHER = Plan({"seed": 0, "head.depth": 2, "trainer.clip": 7}, {"steps": 10}, {"head": "cnn"})
ENDED = {"step": 10, "end": 10}
FINISHED = {**ENDED, "is_evaluated": True}


def run(plan=PLAN, **state):
    return PastRun(Path("mine"), plan, **{"step": 4, **state})


@pytest.mark.parametrize(
    ("state", "action"),
    [
        ({}, Action.RESUME),
        (ENDED, Action.EVALUATE),
        (FINISHED, Action.NOTHING),
        ({**FINISHED, "step": 12}, Action.RESUME),  # extended since
    ],
)
def test_remaining_work_follows_from_checkpoint_and_end(state, action):
    assert run(**state).remaining is action


@pytest.mark.parametrize(
    ("length", "found", "action"),
    [
        ({}, run(plan=LONGER), Action.RESUME),
        ({}, run(**FINISHED), Action.NOTHING),
        ({}, run(**ENDED), Action.EVALUATE),
        ({"steps": 10}, run(**FINISHED), Action.NOTHING),
        ({"steps": 5}, run(**FINISHED), Action.NOTHING),
        ({"steps": 20}, run(**FINISHED), Action.RESUME),
        ({"steps": "abc"}, run(**FINISHED), Action.RESUME),  # which refuses the value
        ({"epochs": 3}, run(**ENDED), Action.RESUME),
        ({"epochs": 3}, run(replace(PLAN, length={"epochs": 5}), **FINISHED), Action.NOTHING),
        ({"steps": 10}, run(replace(PLAN, length={"epochs": 3}), **FINISHED), Action.NOTHING),  # as many steps
        ({"steps": 10}, run(step=6, end=6, is_evaluated=True), Action.NOTHING),  # ended early, by patience
    ],
)
def test_typed_greater_length_extends_a_run_in_its_folder(length, found, action):
    assert decide_in_folder(found, replace(PLAN, length=length or PLAN.length), typed=length) is action


def test_length_that_is_not_typed_extends_no_finished_run():
    assert decide_in_folder(run(**FINISHED), LONGER, typed=()) is Action.NOTHING


def test_other_recipe_in_given_folder_names_keys_and_options():
    words = ("mine", "head (cnn there, mlp here)", "trainer.clip (7 there, 1.0 here)", "resume=mine")
    message = assert_refused(lambda: decide_in_folder(run(plan=OTHER), PLAN, typed=()), *words)
    assert "head.width" not in message and "seed" not in message


@pytest.mark.parametrize(
    ("plan", "typed", "words", "found", "action"),
    [
        (PLAN, (), ["a=1", "resume=auto"], run(words=["a=1"]), Action.RESUME),
        (PLAN, (), [], run(**FINISHED), Action.NOTHING),
        (LONGER, ("steps",), ["trainer.steps=20"], run(**FINISHED, words=["trainer.steps=10"]), Action.RESUME),
    ],
)
def test_job_of_a_sweep_resumes_the_run_of_its_words(plan, typed, words, found, action):
    assert decide_in_folder(found, plan, typed=typed, words=words) is action


@pytest.mark.parametrize(
    ("plan", "typed", "words", "found", "named"),
    [
        (PLAN, (), ["a=2"], run(words=["a=1"]), "a=1 only there; a=2 only here"),
        (PLAN, (), [], run(OTHER, words=["a=1"]), "head (cnn there, mlp here)"),
        (PLAN, ("steps",), [], run(LONGER, step=20, end=20), "trainer.steps (20 there, 10 here)"),
        (PLAN, ("steps",), [], run(LONGER, step=12), "trainer.steps (20 there, 10 here)"),
        (LONGER, (), [], run(**FINISHED), "trainer.steps (10 there, 20 here)"),
    ],
)
def test_job_of_a_sweep_refuses_the_run_of_another_job(plan, typed, words, found, named):
    decide = partial(decide_in_folder, found, plan, typed=typed, words=words)
    assert_refused(decide, named, "in their order", "hydra.sweep.dir")


def test_added_lengths_tell_no_jobs_apart():
    there = run(words=["+trainer.max_minutes=9"])
    assert decide_in_folder(there, PLAN, typed=(), words=[]) is Action.RESUME
