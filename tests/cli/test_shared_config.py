"""Ranks that others start take the config of rank 0 as names of options and plain values."""

import json

import pytest
from omegaconf import OmegaConf

from dinoseg.cli import launch
from dinoseg.cli.shared import describe_job
from dinoseg.config.plain import to_container
from dinoseg.runs.location import RunLocation
from dinoseg.utils.errors import UserError


@pytest.fixture
def receive(compose, tmp_path, monkeypatch):
    """Return a function that launches rank 1 of 2 with another config of rank 0, and returns the config that it ran."""
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launch, "run_mode", lambda cfg, folder: to_container(cfg))

    def run(words, change, further=()):
        shared = describe_job(compose(*words, *further))
        change(shared)
        text = json.dumps([OmegaConf.to_yaml(OmegaConf.create(shared)), str(tmp_path / "run"), None])
        monkeypatch.setattr("dinoseg.training.rendezvous.share_from_rank0", lambda *_, **__: text)
        return launch.launch(launch.Job(compose(*words), RunLocation(tmp_path / "own", tmp_path), list(words)))

    return run


def resolve(config):
    return OmegaConf.to_container(OmegaConf.create(config), resolve=True)


WORDS = ("mode=train", "data=folder", "data.root=x", "data.classes=[a,b]")


def test_a_rank_takes_plain_values_and_options_of_rank_0(receive, compose):
    def resume(shared):
        shared["config"]["resume"] = "outputs/base/train/checkpoints/last.safetensors"
        shared["config"]["optim"]["optimizer"]["lr"] = 0.5

    further = ("head=mlp", "hparam=demo", "data.batch_size=3", "inference.size=${resolution.crop}")
    found = receive(WORDS, resume, further)
    cfg = compose(*WORDS, *further)
    cfg.optim.optimizer.lr, cfg.resume = 0.5, found["resume"]
    assert found["resume"].endswith("last.safetensors") and found["choices"] == to_container(cfg.choices)
    theirs, ours = (resolve({**to_container(cfg), **each}) for each in (found, {}))
    for key in {*cfg} - {"data"}:
        assert theirs[key] == ours[key], key


@pytest.mark.parametrize("place", ["loss", "mode"])
def test_a_rank_refuses_names_of_classes(receive, place):
    def attack(shared):
        shared["config"][place] |= {"_target_": "os.system", "command": "true"}

    with pytest.raises(UserError, match="the config of rank 0: .*_target_=.* is refused"):
        receive(WORDS, attack)


def test_a_rank_takes_weights_that_rank_0_trusts(receive):
    further = ("backbone.weights=my-org/my-dino",)
    assert receive(WORDS, lambda shared: None, further)["backbone"]["weights"] == "my-org/my-dino"
