"""Each part of a run is made once: a config node is instantiated once on the device, and once on meta at most."""

from collections import Counter

import pytest
import torch
from command_line import SMALL, succeed, write_data

from dinoseg.config import nodes
from dinoseg.data import custom
from dinoseg.experiment.builder import Builder

WORDS = ("mode=train", *SMALL, "metric=[boundary_iou]", "loss.weights=median", "mode.report=false", "mode.pictures=0")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Count config nodes by key and device, losses and optimizers by device, and readers by split."""
    write_data(tmp_path / "data")
    counts = Counter()

    def count(owner, name, key):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[key(*args, **kwargs), str(torch.get_default_device())] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(nodes, "_call_target", lambda values, where, keys: where)
    count(Builder, "criterion", lambda *_, **__: "a loss")
    count(Builder, "optimizer", lambda *_: "an optimizer")
    count(custom, "check_custom_dataset", lambda data, *_, **__: f"split of {data.names}")
    return counts


@pytest.mark.parametrize("words", [(), ("adapter=lora", "head=mlp")])
def test_each_part_of_a_run_is_made_once(made, tmp_path, words):
    for run in ((*WORDS, *words), (*WORDS, *words, "trainer.steps=3", "resume=run"), ("mode=eval", "resume=run")):
        made.clear()
        folder = "evaluated" if run[0] == "mode=eval" else "run"
        succeed(tmp_path, *run, "engine=cpu", f"hydra.run.dir={folder}")
        twice = [key for key, count in made.items() if count > 1 and key[0]]
        assert twice == [] and len(made) > 8
