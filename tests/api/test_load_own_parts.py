"""Models with parts of one's own are loaded by naming their config folder, and parts that only train are not needed."""

import sys

import pytest
import torch
from command_line import SMALL, write_data

import dinoseg
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.heads.linear import LinearHead
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MINE = {
    "head/mine": "_target_: __main__.MyHead\n_partial_: true\nlayers: [-1]\nnum_classes: ${data.num_classes}\n",
    "loss/mine": "defaults: [cross_entropy, _self_]\ncriterion:\n  _target_: __main__.MyLoss\n",
    "data/mine": "defaults: [folder, _self_]\nreader:\n  _target_: __main__.read_mine\n",
}


class MyHead(LinearHead):
    pass


class GainHead(LinearHead):
    """Head with a parameter that is named like those of LoRA."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.lora_gain = torch.nn.Parameter(torch.rand(()))


class MyLoss(CrossEntropy):
    pass


def read_mine(*arguments, **options):
    return folder_dataset(*arguments, **options)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Define the parts in __main__, as a notebook does, and return the folder of their options."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    for part in (MyHead, MyLoss, read_mine):
        monkeypatch.setattr(sys.modules["__main__"], part.__name__, part, raising=False)
    for name, text in MINE.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / f"{name}.yaml").write_text(text)
    return tmp_path / "mine"


def train(config_dir, **options):
    words = [word for word in SMALL if not word.startswith("data=")]
    mode = {"report": False, "metrics_only": True}
    return dinoseg.train(None, *words, mode=mode, config_dir=config_dir, **options)


def test_a_head_of_ones_own_is_loaded_in_the_same_process(mine):
    run = train(mine, head="mine", data="folder", out_dir="run")
    with pytest.raises(UserError, match="head=mine is not an option on this machine.*config_dir"):
        run.load_model(device="cpu")
    model = run.load_model(device="cpu", config_dir=mine)
    assert type(model.head) is MyHead
    model.save("model.safetensors")
    for again in (
        dinoseg.load("model.safetensors", device="cpu", config_dir=str(mine)),
        dinoseg.create_model(init="model.safetensors", config_dir=mine, **create_arguments()),
    ):
        assert torch.equal(again.eval()(IMAGES), model(IMAGES)) and type(again.head) is MyHead
    (mine / "head/later.yaml").write_text(MINE["head/mine"].replace("MyHead", "MyLater"))
    sys.modules["__main__"].MyLater = type("MyLater", (LinearHead,), {})
    try:
        later = train(mine, head="later", data="folder", out_dir="later")
        assert type(later.load_model(device="cpu", config_dir=mine).head).__name__ == "MyLater"
    finally:
        del sys.modules["__main__"].MyLater
    with pytest.raises(UserError, match="config_dir=nowhere is not a folder"):
        run.load_model(config_dir="nowhere")


def test_a_head_may_name_parameters_like_those_of_lora(mine, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "MyHead", GainHead)
    options = create_arguments() | {"config_dir": mine}
    model = dinoseg.create_model(**options | {"adapter": "frozen"})
    with pytest.raises(UserError, match="no LoRA layers"):
        model.merge()
    with torch.no_grad():
        model.head.lora_gain.fill_(7)
    model.save("model.safetensors")
    tuned = dinoseg.create_model(**options | {"adapter": "lora", "init": "model.safetensors"})
    assert tuned.head.lora_gain == 7


def create_arguments():
    arch = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    own = {"backbone.patch_size": 8, "backbone.arch": arch, "classes": ["dark", "bright"]}
    return {"backbone": "tiny", "head": "mine", "adapter": "full", **own}


def test_parts_that_only_train_are_not_needed_to_predict(mine, monkeypatch):
    run = train(mine, loss="mine", data="mine", out_dir="run")
    for name in ("MyLoss", "read_mine"):
        monkeypatch.delattr(sys.modules["__main__"], name)
    model = run.load_model(device="cpu")
    assert model.predict("data/val/images/0.png").mask.shape == (32, 48) and model.trainable_parameters()
    model.save("model.safetensors")
    again = dinoseg.load("model.safetensors", device="cpu")
    again.save("again.safetensors")
    assert torch.equal(again(IMAGES), model(IMAGES))
    for name, part in (("MyLoss", MyLoss), ("read_mine", read_mine)):
        monkeypatch.setattr(sys.modules["__main__"], name, part, raising=False)
    scores = dinoseg.evaluate("again.safetensors", data={"root": "data"}, config_dir=mine, mode={"metrics_only": True})
    assert scores["miou"] == run.scores["miou"]


@pytest.mark.parametrize("place", ["trainer/method", "loss/criterion", "data/reader"])
def test_loading_never_instantiates_targets_from_a_file(place, tmp_path):
    """Nor of the parts that loading leaves out."""
    file, ran = tmp_path / "model.safetensors", tmp_path / "ran"
    dinoseg.create_model("rgb", num_classes=2).save(file)
    held = checkpoint.read(file)
    group, key = place.split("/")
    path = {"_target_": "pathlib.Path", "_args_": [str(ran)]}
    evil = {"evil": {"_target_": "pathlib.Path.touch", "self": path}}
    for of_group, of_optimizer in ((evil, [0.9, 0.999]), ({}, f"${{{group}.{key}.evil}}")):
        held.info["config"][group][key] = of_group
        held.info["config"]["optim"]["optimizer"]["betas"] = of_optimizer
        checkpoint.write(file, held.tensors, {name: value for name, value in held.info.items() if name != "format"})
        with pytest.raises(UserError, match="stores no key _target_|interpolation is refused"):
            dinoseg.load(file, device="cpu")
    assert not ran.exists()
