"""Each part of a run is made once: a config node is instantiated once on the device, and once on meta at most."""

from collections import Counter

import pytest
import torch
from command_line import SMALL, succeed, write_data
from omegaconf import OmegaConf

from dinoseg.api.compose import compose
from dinoseg.config import nodes
from dinoseg.data import custom
from dinoseg.experiment.builder import Builder
from dinoseg.models.heads.linear import LinearHead

WORDS = ("mode=train", *SMALL, "metric=[boundary_iou]", "loss.weights=median", "mode.report=false", "mode.pictures=0")
INNER = """
defaults: [linear]
_target_: test_parts_once.InnerHead
inner: {_target_: torch.nn.Linear, in_features: 3, out_features: 3}
"""


class InnerHead(LinearHead):
    """Head with a part that its config instantiates."""

    def __init__(self, in_dim, num_layers, num_classes, inner, dropout=0.0, init=None):
        super().__init__(in_dim, num_layers, num_classes, dropout, init)
        self.inner = inner


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

    count(nodes, "argument_keys", lambda node: node._get_full_key(None) if OmegaConf.is_config(node) else "")
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


def test_a_model_has_parts_of_its_own_initialised_by_the_seed(tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/inner.yaml").write_text(INNER)
    build = Builder(compose(["mode=train", *SMALL, "head=inner"], config_dir=tmp_path))
    training = build.make_training()
    training.check_values()
    training.check_config(build.outline(), 1, None)
    assert build.outline().head.inner.weight.is_meta
    first, second = build.model().head.inner, build.model().head.inner
    assert first is not second and torch.equal(first.weight, second.weight)
