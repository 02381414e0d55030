"""Models with parts or weights of one's own are loaded from any folder, and without what only trained them."""

import sys
from functools import partial

import pytest
import torch
from command_line import SMALL, TINY_KEYS, write_data
from finished_runs import train_run
from mistakes import assert_refused

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


class LaterHead(LinearHead):
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
    for part in (MyHead, LaterHead, MyLoss, read_mine):
        monkeypatch.setattr(sys.modules["__main__"], part.__name__, part, raising=False)
    for name, text in MINE.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / f"{name}.yaml").write_text(text)
    return tmp_path / "mine"


def create(config_dir, **options):
    own = {"head": "mine", "adapter": "full", "classes": ["dark", "bright"], "config_dir": config_dir}
    return dinoseg.create_model("tiny", **TINY_KEYS, **{**own, **options})


def train(config_dir, **options):
    words = [word for word in SMALL if not word.startswith("data=")]
    mode = {"report": False, "metrics_only": True}
    return dinoseg.train(None, *words, mode=mode, config_dir=config_dir, out_dir="run", **options)


def test_a_head_of_ones_own_is_loaded_in_the_same_process(mine):
    model = create(mine).eval()
    model.save("model.safetensors")
    load = partial(dinoseg.load, "model.safetensors", device="cpu")
    assert_refused(load, "head=mine is not an option on this machine", "config_dir")
    assert_refused(lambda: load(config_dir="nowhere"), "config_dir=nowhere is not a folder")
    loaded = load(config_dir=str(mine))
    for again in (loaded, create(mine, init="model.safetensors")):
        assert torch.equal(again.eval()(IMAGES), model(IMAGES)) and type(again.head) is MyHead
    (mine / "head/later.yaml").write_text(MINE["head/mine"].replace("MyHead", "LaterHead"))
    create(mine, head="later").save("later.safetensors")
    assert type(dinoseg.load("later.safetensors", device="cpu", config_dir=mine).head) is LaterHead


@pytest.mark.heavy
def test_a_run_with_a_head_of_ones_own_is_loaded(mine):
    run = train("mine", head="mine", data="folder")
    assert_refused(lambda: run.load_model(device="cpu"), "head=mine is not an option on this machine", "config_dir")
    assert type(run.load_model(device="cpu", config_dir=mine).head) is MyHead
    assert_refused(lambda: run.load_model(config_dir="nowhere"), "config_dir=nowhere is not a folder")


def test_a_head_may_name_parameters_like_those_of_lora(mine, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "MyHead", GainHead)
    model = create(mine, adapter="frozen")
    assert_refused(model.merge, "no LoRA layers")
    with torch.no_grad():
        model.head.lora_gain.fill_(7)
    model.save("model.safetensors")
    assert create(mine, adapter="lora", init="model.safetensors").head.lora_gain == 7


def test_options_of_parts_that_only_train_are_not_needed(tmp_path):
    file = tmp_path / "model.safetensors"
    dinoseg.create_model("rgb", num_classes=2).save(file)
    held = checkpoint.read(file)
    for group in ("loss", "data"):
        held.info["choices"][group] = "mine"
    checkpoint.write(file, held.tensors, {name: value for name, value in held.info.items() if name != "format"})
    model = dinoseg.load(file, device="cpu")
    model.save(file)
    assert torch.equal(dinoseg.load(file, device="cpu")(IMAGES), model(IMAGES)) and model.trainable_parameters()


@pytest.mark.heavy
def test_parts_that_only_train_are_not_needed_to_predict(mine, monkeypatch):
    run = train(mine, loss="mine", data="mine")
    with monkeypatch.context() as patch:
        for name in ("MyLoss", "read_mine"):
            patch.delattr(sys.modules["__main__"], name)
        model = run.load_model(device="cpu")
        assert model.predict("data/val/images/0.png").mask.shape == (32, 48) and model.trainable_parameters()
        model.save("model.safetensors")
        again = dinoseg.load("model.safetensors", device="cpu")
        again.save("again.safetensors")
        assert torch.equal(again(IMAGES), model(IMAGES))
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
        with pytest.raises(UserError, match="is refused: saved configs set no key"):
            dinoseg.load(file, device="cpu")
    assert not ran.exists()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a folder with weights/backbone.pth, which is the current one, and another folder."""
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "weights").mkdir(parents=True)
    model = dinoseg.create_model("tiny_surgical", num_classes=2)
    torch.save(model.backbone.export_state(), folder / "weights/backbone.pth")
    monkeypatch.chdir(folder)
    return folder, elsewhere


def test_a_delta_finds_its_backbone_from_another_folder(project, monkeypatch):
    folder, elsewhere = project
    model = dinoseg.create_model("tiny_surgical", num_classes=2, adapter="lora", weights="weights/backbone.pth").eval()
    model.save("out/delta.safetensors", delta=True, gated=True)
    monkeypatch.chdir(elsewhere)
    model.save("later.safetensors", delta=True, gated=True)
    loaded = dinoseg.load(folder / "out/delta.safetensors", device="cpu")
    loaded.save("again.safetensors", delta=True, gated=True)
    later, again = (dinoseg.load(f"{name}.safetensors", device="cpu") for name in ("later", "again"))
    for each in (loaded, later, again):
        assert str(folder).encode() not in each.file.read_bytes()
        assert torch.equal(each(IMAGES), model(IMAGES))
    (folder / "weights").rename(elsewhere / "moved")
    load = partial(dinoseg.load, folder / "out/delta.safetensors", device="cpu")
    assert_refused(load, "weights/backbone.pth", "backbone=PATH")
    assert torch.equal(load(backbone="moved/backbone.pth")(IMAGES), model(IMAGES))


@pytest.mark.heavy
def test_a_run_finds_its_backbone_from_another_folder(project, monkeypatch):
    folder, elsewhere = project
    write_data(folder / "data")
    words = [word for word in SMALL if not word.startswith(("backbone", "adapter"))]
    words = ["mode=train", "backbone=tiny_surgical", "backbone.weights=weights/backbone.pth", *words]
    train_run(folder, "run", *words, "mode.report=false", "mode.metrics_only=true")
    expected = dinoseg.load("run", device="cpu")(IMAGES)
    monkeypatch.chdir(elsewhere)
    assert torch.equal(dinoseg.load(folder / "run", device="cpu")(IMAGES), expected)
    train_run(folder, "run", *words, "resume=auto")
    assert not (folder / "run_2").exists()
