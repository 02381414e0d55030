"""hparam=auto, from a command line to a training by what was chosen."""

import pytest
from command_line import SMALL, call, in_this_process, write_data

AUTO = ("mode=train", "hparam=auto", *(word for word in SMALL if word.split("=")[0] not in (
    "trainer.steps", "adapter", "data.batch_size", "resolution.crop")))


def test_it(tmp_path, monkeypatch):
    write_data(tmp_path / "data", train=5)
    done = monkeypatch.setattr("dinoseg.choosing.choice.in_own_process", in_this_process)
    done = call(tmp_path, *AUTO, "budget.minutes=1", "hydra.run.dir=R")
    print(done.out, done.err)
    assert 0
