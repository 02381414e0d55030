"""What tests compose once is what Hydra composes anew."""

import pytest
from cached_composition import PATCHES
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from dinoseg.__main__ import CONFIGS
from dinoseg.config.resolvers import register_resolvers

COMMANDS = (
    ("mode=train", "hparam=sarrarp_lora", "data.root=DATA"),
    ("mode=train", "hparam=sarrarp_lora", "trainer.steps=7", "data.root=OTHER"),
    ("mode=train", "head=dpt", "+data.extra=1", "~optim.schedule.warmup"),
    pytest.param(("mode=train", "hparam=dinosavi_control", "hydra.run.dir=HERE"), marks=pytest.mark.heavy),
    ("mode=train", "hydra/job_logging=stdout", "hydra.verbose=true"),
    ("mode=train", "~optim"),
)


def compose_with_flags(words):
    """Return the config and every flag in it."""
    register_resolvers()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("main", list(words), return_hydra_config=True)
    nodes = [cfg]
    for node in nodes:
        children = [node._get_node(key) for key in node] if not (node._is_none() or node._is_missing()) else []
        nodes.extend(child for child in children if OmegaConf.is_dict(child))
    return OmegaConf.to_container(cfg), [node._metadata.flags for node in nodes]


@pytest.fixture
def anew():
    """Compose without the cache."""

    def compose_anew(words):
        for each in PATCHES:
            each.stop()
        try:
            return compose_with_flags(words)
        finally:
            for each in PATCHES:
                each.start()

    return compose_anew


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_cached_composition_equals_hydra(anew, words):
    first, second = compose_with_flags(words), compose_with_flags(words)
    assert first == second == anew(words)


def test_changed_options_in_a_folder_are_read_again(anew, tmp_path):
    path = tmp_path / "head/mine.yaml"
    path.parent.mkdir()
    words = (f"hydra.searchpath=['file://{tmp_path}']", "mode=train", "head=mine")
    found = []
    for text in ("defaults: [linear]\nlr: 0.5\n", "# @package other\ndefaults: [mlp]\nlr: 0.25\n"):
        path.write_text(text)
        found.append(compose_with_flags(words))
        assert found[-1] == compose_with_flags(words) == anew(words)
    assert found[0] != found[1] and found[0][0]["head"]["lr"] == 0.5
    path.unlink()
    with pytest.raises(ConfigCompositionException, match="mine"):
        compose_with_flags(words)
