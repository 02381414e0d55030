"""Arguments and errors of calls in the words of Python: options with keys, devices, numbers, and no command line."""

import re

import numpy as np
import pytest
import torch
from command_line import write_data

import dinoseg
from dinoseg.api.compose import find_tables, split_options, words_of
from dinoseg.api.wording import python_terms
from dinoseg.metrics import ConfusionMatrix
from dinoseg.utils.errors import UserError

OF_COMMAND_LINES = re.compile(r"--cfg job|--help|command line|hydra\.run\.dir|add -m")


def words(**overrides):
    split = split_options(overrides, None)
    return words_of(split, find_tables(("mode=train",), split, None))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"adapter": {"name": "lora", "rank": 4}}, ["adapter=lora", "adapter.rank=4"]),
        ({"data": {"name": "camvid", "root": "R"}}, ["data=camvid", "data.root=R"]),
        (
            {"loss": {"name": "ce_dice"}, "optim": {"optimizer": {"lr": 1.0}}},
            ["loss=ce_dice", "optim.optimizer.lr=1.0"],
        ),
        (
            {"backbone": {"name": "timm", "patch_size": 8}, "backbone.name": "x"},
            ["backbone=timm", "backbone.patch_size=8", "backbone.name=x"],
        ),
        ({"data": {"pixels": "files"}}, ["data/pixels=files"]),
        ({"data/pixels": {"name": "files", "order": [0]}}, ["data/pixels=files", "data.pixels.order=[0]"]),
        ({"data.pixels": "files", "data": {"pixels": {"order": [0]}}}, ["data/pixels=files", "data.pixels.order=[0]"]),
        (
            {"data": {"name": "camvid", "root": "R", "augment": {"color": {"name": "photometric", "space": "hsv"}}}},
            ["data=camvid", "data.root=R", "data/augment/color=photometric", "data.augment.color.space=hsv"],
        ),
        ({"engine": {"device": torch.device("cpu")}}, ["engine.device=cpu"]),
        ({"backbone": {"dtype": torch.bfloat16}}, ["backbone.dtype=bfloat16"]),
        ({"seed": np.int64(3)}, ["seed=3"]),
        ({"data.reader.masks.ids": {3: 4}}, ["data.reader.masks.ids={3:4}"]),
    ],
)
def test_one_argument_holds_an_option_and_its_keys(given, expected):
    assert words(**given) == expected


def test_unknown_option_name_becomes_a_key():
    assert words(backbone={"name": "vit_tiny_patch16_224"}) == ["backbone.name=vit_tiny_patch16_224"]
    assert words_of({"backbone": {"name": "test_vit"}}) == ["backbone.name=test_vit"]


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="^config_dir=nowhere is not a folder"):
        dinoseg.list_heads(config_dir="nowhere")


def test_create_model_takes_options_with_keys():
    model = dinoseg.create_model(
        {"name": "tiny", "patch_size": 8}, adapter={"name": "lora", "rank": 2}, head={"name": "mlp"}, num_classes=2
    )
    lora = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
    assert model.backbone.patch_size == 8 and {len(each) for each in lora} == {2}


@pytest.mark.parametrize("weights", [None, False])
def test_no_weights_are_random_ones(weights):
    model = dinoseg.create_model("tiny_surgical", num_classes=2, weights=weights)
    assert model.backbone.weights == "random"
    assert (
        dinoseg.create_model("tiny_surgical", num_classes=2, weights=True).backbone.weights == "dinoseg:tiny_surgical"
    )


def test_load_takes_a_torch_device(tmp_path):
    dinoseg.create_model("tiny", num_classes=2).save(tmp_path / "model.safetensors")
    assert dinoseg.load(tmp_path / "model.safetensors", device=torch.device("cpu")).device.type == "cpu"


CALLS = {
    "head.layrs": lambda: dinoseg.create_model("tiny", num_classes=2, **{"head.layrs": [1]}),
    "tracker.size": lambda: dinoseg.create_model("tiny", num_classes=2, **{"tracker.size": 1}),
    "trainer.stepz": lambda: dinoseg.train("demo", trainer={"stepz": 3}),
    "clases": lambda: dinoseg.open_dataset(root=".", clases=["a", "b"]),
    "root": lambda: dinoseg.open_dataset("camvid"),
    "backbone.name": lambda: dinoseg.create_model("timm", num_classes=2),
    "linear,mlp": lambda: dinoseg.train("demo", "head=linear,mlp"),
    "head=other": lambda: dinoseg.create_model("tiny", head="other", num_classes=2),
}


@pytest.mark.parametrize("key", CALLS)
def test_errors_of_calls_name_no_command_line(key):
    with pytest.raises(UserError, match=re.escape(key)) as caught:
        CALLS[key]()
    assert not OF_COMMAND_LINES.search(str(caught.value)), str(caught.value)


def test_errors_of_items_name_no_command_line(tmp_path):
    write_data(tmp_path)
    for mask in (tmp_path / "train/masks").iterdir():
        dinoseg.utils.images.write_png(mask, np.full((32, 48), 7, np.uint8))
    data = dinoseg.open_dataset(root=tmp_path, classes=["dark", "bright"])
    with pytest.raises(UserError, match="7") as caught:
        data[0]
    assert not OF_COMMAND_LINES.search(str(caught.value)), str(caught.value)


def test_scores_are_found_in_any_spelling():
    ours = dinoseg.Scores({"miou": 0.5}, "folder")
    official = dinoseg.Scores({"scores": {"mIoU": 0.25}}, "folder")
    assert ours["mIoU"] == ours["miou"] == 0.5 and official["mIoU"] == official["miou"] == 0.25
    assert "mIoU" in ours and ours.get("dice") is None and list(ours) == ["miou"]
    with pytest.raises(KeyError, match="dise"):
        ours["dise"]
    assert ours._ipython_key_completions_() == ["miou"]


def test_confusion_matrices_add_move_and_print():
    first, second = ConfusionMatrix(2), ConfusionMatrix(2)
    first.update(torch.tensor([[0, 1]]), torch.tensor([[0, 255]]))
    second.update(torch.tensor([[1, 1]]), torch.tensor([[1, 0]]))
    total = first + second
    assert total.compute()["pixels"] == 3 and first.compute()["pixels"] == 1 and second.compute()["pixels"] == 2
    assert total.to("cpu") is total and first.to(torch.device("meta")).counts.is_meta
    assert repr(total) == "dinoseg.metrics.ConfusionMatrix(2 classes, 3 pixels, 1 ignored)"
    with pytest.raises(ValueError, match="Cannot merge 3 classes"):
        second + ConfusionMatrix(3)


def test_one_patch_in_train_mode_is_refused():
    model = dinoseg.create_model("tiny", num_classes=2).train()
    with pytest.raises(UserError, match="1 image of 16 x 16 is one patch.*model.eval"):
        model(torch.rand(1, 3, 16, 16))
    assert model.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 2, 16, 16)


def test_partial_backbone_names_its_line(tmp_path):
    (tmp_path / "backbone").mkdir()
    text = "defaults: [rgb]\n_partial_: true\n"
    (tmp_path / "backbone/part.yaml").write_text(text)
    with pytest.raises(UserError, match="backbone: its YAML file sets `_partial_: true`.*Remove"):
        dinoseg.create_model("part", num_classes=2, config_dir=tmp_path)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Set it: data.root=FOLDER.", 'Set it: data={"root": FOLDER}.'),
        ("Give data.root=A data.classes=[ground,leaf].", 'Give data={"root": A, "classes": ["ground", "leaf"]}.'),
        ("adapter.rank=four is text.", 'adapter={"rank": "four"} is text.'),
        ("resolution.crop=[4, 4] is small.", 'resolution={"crop": [4, 4]} is small.'),
        ("Add adapter=lora adapter.rank=4.", 'Add adapter={"name": "lora", "rank": 4}.'),
        ("Use hparam=demo head.weights=null.", 'Use hparam="demo", head={"weights": None}.'),
        ("Set optim.optimizer.lr=1e-3 (or lower).", 'Set optim={"optimizer": {"lr": 0.001}} (or lower).'),
        ("Choose heads=[linear,mlp].", 'Choose heads=["linear", "mlp"].'),
        ("head=lin is unknown.", "head=lin is unknown."),
        ("Did you mean data/pixels=files?", 'Did you mean data={"pixels": "files"}?'),
        (
            "Write data/pixels=files data.pixels.order=[0], or none.",
            'Write data={"pixels": {"name": "files", "order": [0]}}, or none.',
        ),
        ("outputs/lr=3 holds files.", "outputs/lr=3 holds files."),
        ("resume=/a/b.c/d.pt: damaged", "resume=/a/b.c/d.pt: damaged"),
        ("++trainer.stepz=3 is unknown.", "++trainer.stepz=3 is unknown."),
    ],
)
def test_errors_write_keys_as_keyword_arguments(message, expected):
    with pytest.raises(UserError) as caught, python_terms():
        raise UserError(message)
    assert str(caught.value) == expected


def test_errors_name_arguments_of_the_call(tmp_path):
    write_data(tmp_path)
    calls = {
        r"^root=\S*nowhere is not a folder": lambda: dinoseg.open_dataset(
            root=tmp_path / "nowhere", classes=["a", "b"]
        ),
        r"^root and classes are not set": lambda: dinoseg.open_dataset(),
        r"^weights=nowhere.pt: file": lambda: dinoseg.create_model("tiny", num_classes=2, weights="nowhere.pt"),
        r'^adapter=\{"rank": 0\} is out of': lambda: dinoseg.create_model(
            "tiny", adapter={"name": "lora", "rank": 0}, num_classes=2
        ),
        r'^data=\{"root": ".*nowhere"\} is not': lambda: dinoseg.train(
            data={"root": tmp_path / "nowhere", "classes": ["a", "b"]}, out_dir=tmp_path / "run"
        ),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            call()
