"""Configs composed from Python: as on the command line, and without a trace in the caller's Hydra."""

import threading

import numpy as np
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import getbase
from omegaconf import OmegaConf

import dinoseg
from dinoseg.api.compose import compose, lent_hydra, words_of
from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow
WORDS = {
    "head": "mlp",
    "data": {"classes": ["a", "b c", "1", "true"], "palette": None},
    "data.root": "/x y/it's ${here}, [1]",
    "seed": 3,
    "optim": {"optimizer": {"lr": 1e-7}},
    "loss": {"weights": {"a": 3}},
    "data.reader": {"masks": {"ids": {11: 255}}, "layout": {"exclude": ()}},
    "shared_cache": True,
}


def test_values_of_python_reach_the_config_unchanged(tmp_path):
    WORDS["data.root"] = tmp_path / 'it\'s a, [1] \\ "x"'
    cfg = compose(words_of(WORDS))
    assert list(cfg.data.classes) == ["a", "b c", "1", "true"] and cfg.data.palette is None and cfg.seed == 3
    assert cfg.data.root == str(WORDS["data.root"]) and cfg.optim.optimizer.lr == 1e-7
    assert cfg.loss.weights == {"a": 3} and cfg.data.reader.masks.ids == {11: 255}
    assert cfg.data.reader.layout.exclude == [] and cfg.shared_cache is True
    assert cfg.choices.head == "mlp" and cfg.data.reader.layout.images == "{split}/images"


def test_the_config_is_that_of_the_command_line(compose):
    words = ("mode=train", "hparam=camvid", "head=mlp", "data.root=x", "trainer.steps=9")
    from dinoseg.api.compose import compose as ours

    assert to_container(ours(words)) == to_container(compose(*words))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head": "mlq"}, "head=mlq is unknown. Did you mean head=mlp|head=mlq is unknown"),
        ({"heda": "mlp"}, "heda is not a key of the config. Did you mean head?"),
        ({"optim": {"optimiser": 3}}, "optim.optimiser is not a key of the config"),
        ({"trainer": 3}, "trainer=3 is unknown"),
        ({"seed": np.zeros(3)}, "seed is of type ndarray. Give text, a number"),
        ({"seed": object}, "seed is of type type"),
    ],
)
def test_mistakes_have_the_messages_of_the_command_line(overrides, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        compose(words_of(overrides))


def test_own_config_folder_provides_options(tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/mine.yaml").write_text("defaults: [mlp, _self_]\nlr: 5.0\n")
    assert compose(["head=mine"], config_dir=tmp_path).head.lr == 5
    assert dinoseg.list_heads("m*", config_dir=tmp_path)[-3:] == ["mine", "mlp", "multiscale"]
    with pytest.raises(UserError, match="head=mine is unknown"):
        compose(["head=mine"])
    for refused in (lambda: compose([], config_dir="nowhere"), lambda: dinoseg.list_heads(config_dir="nowhere")):
        with pytest.raises(UserError, match="config_dir=nowhere is not a folder"):
            refused()


def test_hydra_state_of_the_caller_is_neither_changed_nor_read(tmp_path):
    (tmp_path / "main.yaml").write_text("x: 1\n")
    OmegaConf.register_new_resolver("len", lambda value: "mine", replace=True)
    try:
        with initialize_config_dir(str(tmp_path), version_base="1.2"):
            HydraConfig.instance().set_config(hydra_compose("main", return_hydra_config=True))
            before, hydra = HydraConfig.get(), GlobalHydra.instance().hydra
            compose(["head=mlp"])
            with pytest.raises(UserError):
                compose(["head=mlq"])
            assert HydraConfig.get() is before and GlobalHydra.instance().hydra is hydra
            assert hydra_compose("main").x == 1 and str(getbase()) == "1.2"
        assert OmegaConf.create({"x": "${len:1}"}).x == "mine"
    finally:
        HydraConfig.instance().cfg = None
        OmegaConf.clear_resolver("len")
    assert not GlobalHydra.instance().is_initialized()
    compose(["head=mlp"])
    assert not GlobalHydra.instance().is_initialized() and not OmegaConf.has_resolver("len")


def test_options_are_sorted_names_of_files():
    assert dinoseg.list_backbones("dinov3*") == sorted(dinoseg.list_backbones("dinov3*")) != []
    assert dinoseg.list_adapters() == ["frozen", "full", "last_blocks", "lora", "lora_8bit", "lora_all", "qlora"]
    assert "folder" in dinoseg.list_datasets() and "sarrarp_lora" in dinoseg.list_recipes("sarrarp_*")
    assert not [name for name in dinoseg.list_datasets() if name.startswith("_")] and dinoseg.list_heads("x*") == []


def test_concurrent_composing_is_serialised():
    GlobalHydra.instance().clear()
    inside, end = threading.Event(), threading.Event()

    def hold():
        with lent_hydra():
            inside.set()
            end.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(20)
    composer = threading.Thread(target=compose, args=(["data.classes=[a,b]"],))
    composer.start()
    composer.join(0.3)
    assert composer.is_alive()
    end.set()
    holder.join(20)
    composer.join(20)
    assert not composer.is_alive() and not GlobalHydra.instance().is_initialized()


def test_resolver_error_does_not_blame_the_overrides():
    words = ["data=folder", "data.classes=3", "hydra.run.dir=runs/${len:${data.classes}}"]
    with pytest.raises(UserError, match="^data.classes=3 is not a list. Write it in brackets"):
        compose(words)
