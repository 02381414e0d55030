"""What is drawn to train on and what counts, by the keys of a config: trained, gone on with, and refused."""

import pytest
import torch
from command_line import SMALL, call, write_data
from refused_trainings import refusal

from dinoseg.training import checkpoint

DRAWN = ("data.class_uniform=0.5", "loss=ce_dice", "loss.criterion.terms.ce.hard_fraction=0.3")


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn_samples")
    write_data(folder / "data")
    return folder


def train(where, name, *words):
    return call(where, "mode=train", *SMALL, f"hydra.run.dir={name}", "mode.metrics_only=true", *words)


def weights(where, name):
    return checkpoint.read(where / name / "checkpoints/last.safetensors").tensors


def test_a_stopped_run_goes_on_to_the_bit(where):
    rate = "optim.schedule.kind=constant", "optim.schedule.warmup=0"
    for name, words in (("whole", ["trainer.steps=4"]), ("parts", []), ("parts", ["resume=parts", "trainer.steps=4"])):
        done = train(where, name, *DRAWN, *rate, *words)
        assert done.status == 0, done.err
    ours, theirs = weights(where, "parts"), weights(where, "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.heavy
def test_each_key_changes_what_is_learnt(where):
    found = []
    for number, words in enumerate([(), *zip((DRAWN[0], DRAWN[2]), strict=True)]):
        done = train(where, f"key_{number}", "loss=ce_dice", *words)
        assert done.status == 0, done.err
        found.append(b"".join(part.numpy().tobytes() for part in weights(where, f"key_{number}").values()))
    assert len({*found}) == len(found) == 3


def test_features_are_kept_of_crops_for_a_class(where):
    words = ("adapter=frozen", "data.views=2", "data.class_uniform=0.7", "features.dtype=float32", "trainer.steps=6")
    for name in ("off", "disk"):
        done = train(where, name, *words, f"engine.cache={name}")
        assert done.status == 0, done.err
    ours, theirs = weights(where, "off"), weights(where, "disk")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.class_uniform=-1",), "data.class_uniform=-1 is out of range"),
        (("data.class_uniform=true",), "data.class_uniform=True is of type bool"),
        (("data.class_uniform=null",), "data.class_uniform=null is of type NoneType"),
        (("loss.criterion.hard_fraction=0",), "hard_fraction=0 is out of range. Give a number above 0 and at most 1."),
        (("loss=lovasz", "+loss.criterion.hard_fraction=0.5"), "does not take hard_fraction"),
    ],
)
def test_what_cannot_be_is_refused(where, compose, words, message):
    assert message in refusal(compose, where, ("mode=train", *SMALL), words).replace("\n", " ")


def test_a_command_that_draws_no_such_share_is_refused(where):
    done = train(where, "refused", "data.class_uniform=1.5")
    assert done.status == 1 and "error: data.class_uniform=1.5 is out of range. Give a number above 0" in done.err


def test_a_class_that_no_mask_has_is_told(where):
    done = train(where, "absent", "data.classes=[dark,bright,green]", "data.class_uniform=1")
    assert done.status == 0 and "data.class_uniform=1: no training mask has a pixel of green" in done.err
