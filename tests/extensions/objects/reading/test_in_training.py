"""A data option with objects is read by every mode, and a semantic training with it is unchanged."""

import pytest
import torch
from command_line import SMALL, write_data
from finished_runs import train_run

from dinoseg.api.compose import compose
from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.experiment.builder import Builder

WORDS = (*SMALL, "data=folder_instances", "data.background=dark")


def test_the_builder_adds_objects(tmp_path):
    write_data(tmp_path / "data", train=3, val=2)
    data = Builder(compose([*WORDS, "mode=train", f"data.root={tmp_path}/data"])).dataset("train")
    assert data.maps == {OBJECTS: ObjectMap(things=(1,))}
    for sample in data:
        assert ((sample["maps"][OBJECTS].sum(dim=0) > 0) == (sample["mask"] == 1)).all()


@pytest.mark.parametrize("words", [(), ("data.cache=packed",), ("adapter=frozen", "data.views=2", "engine.cache=disk")])
def test_objects_change_no_semantic_training(tmp_path, words):
    write_data(tmp_path / "data", train=4, val=2)
    shared = ("mode=train", "mode.report=false", "mode.metrics_only=true", *words)
    plain, _ = train_run(tmp_path, "plain", *SMALL, *shared)
    mapped, _ = train_run(tmp_path, "mapped", *WORDS, *shared)
    assert all(torch.equal(plain[name], mapped[name]) for name in plain) and len(plain) == len(mapped)
