"""Trainings on the hardest pixels alone, by the key of a config: they resume exactly, and wrong shares are refused."""

import pytest
import torch
from command_line import SMALL, call, write_data
from refused_trainings import refusal

from dinoseg.training import checkpoint

HARD = "loss.criterion.terms.ce.hard_fraction=0.3"


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard_pixels")
    write_data(folder / "data")
    return folder


def train(where, name, *words):
    words = "mode=train", *SMALL, f"hydra.run.dir={name}", "mode.metrics_only=true", "loss=ce_dice", *words
    done = call(where, *words)
    assert done.status == 0, done.err


def weights(where, name):
    return checkpoint.read(where / name / "checkpoints/last.safetensors").tensors


def test_a_stopped_run_resumes_exactly(where):
    rate = "optim.schedule.kind=constant", "optim.schedule.warmup=0"
    train(where, "whole", HARD, *rate, "trainer.steps=4")
    train(where, "parts", HARD, *rate)
    train(where, "parts", HARD, *rate, "resume=parts", "trainer.steps=4")
    ours, theirs = weights(where, "parts"), weights(where, "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.heavy
def test_the_key_changes_the_weights(where):
    train(where, "all")
    train(where, "hard", HARD)
    ours, theirs = weights(where, "all"), weights(where, "hard")
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("loss.criterion.hard_fraction=0",), "hard_fraction=0 is out of range. Give a number above 0 and at most 1."),
        (("loss=lovasz", "+loss.criterion.hard_fraction=0.5"), "does not take hard_fraction"),
    ],
)
def test_wrong_shares_are_refused(where, compose, words, message):
    assert message in refusal(compose, where, ("mode=train", *SMALL), words).replace("\n", " ")
