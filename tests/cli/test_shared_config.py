"""Ranks that others start take the config of rank 0, but build only what config files name."""

import json

import pytest
from omegaconf import OmegaConf

from dinoseg.cli import launch
from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError


@pytest.fixture
def receive(compose, tmp_path, monkeypatch):
    """Return a function that launches rank 1 of 2 with another config of rank 0, and returns the config that it ran."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launch, "run_mode", lambda cfg, folder: to_container(cfg))

    def run(words, change):
        cfg = compose(*words)
        shared = to_container(cfg)
        change(shared)
        text = json.dumps([OmegaConf.to_yaml(OmegaConf.create(shared)), str(tmp_path / "run"), None])
        monkeypatch.setattr("dinoseg.training.rendezvous.share_from_rank0", lambda *_, **__: text)
        return launch.launch(cfg, tmp_path / "own", list(words))

    return run


WORDS = ("mode=train", "data=folder", "data.root=x", "data.classes=[a,b]")


def test_a_rank_takes_plain_values_of_rank_0(receive):
    def resume(shared):
        shared["resume"] = "outputs/base/train/checkpoints/last.safetensors"
        shared["optim"]["optimizer"]["lr"] = 0.5
        shared["solo"] = {"mlp": to_container(OmegaConf.create(dict(shared)))}

    found = receive(WORDS, resume)
    assert found["optim"]["optimizer"]["lr"] == 0.5 and found["resume"].endswith("last.safetensors")


@pytest.mark.parametrize("place", ["loss", "mode", "solo"])
def test_a_rank_refuses_targets_that_no_config_file_names(receive, place):
    def attack(shared):
        node = shared.setdefault("solo", {}).setdefault("mlp", {"loss": {}}) if place == "solo" else shared
        node["loss" if place == "solo" else place] |= {"_target_": "os.system", "command": "true"}

    with pytest.raises(UserError, match=r"the config of rank 0: \w+.*os\.system"):
        receive(WORDS, attack)
