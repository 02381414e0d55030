"""Models for a caller's own loop: logits with gradients, parameter groups, one file, copies and modes."""

import copy
import enum
import operator
import pickle

import numpy as np
import pytest
import torch
from tiny_parts import BACKBONES
from torch import nn

import dinoseg
from dinoseg.core.shapes import MaskOutputs, Prediction
from dinoseg.losses import cross_entropy_loss, mask_classification_loss
from dinoseg.training.optim import parameter_groups
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow
TINY = {
    "backbone.patch_size": 8,
    "backbone.arch": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48},
}
QUERIES = {"head.num_queries": 5, "head.blocks": 1}
KINDS = {
    "frozen": {},
    "full": {"adapter": "full", "head": "mlp"},
    "lora": {"adapter": "lora", "head": "linear", "adapter.dropout": 0.5},
    "last blocks": {"adapter": "last_blocks", "adapter.blocks": 1, "head": "cnn"},
    "queries": {"adapter": "full", "head": "eomt", **QUERIES},
    "reduced": {"adapter": "full", "resolution": {"scale": 0.5, "longest": 40}},
}
QUICK = ("lora", "queries")


def tiny(**overrides):
    return dinoseg.create_model("tiny", **{"classes": ["dark", "bright", "red"], **TINY, **overrides})


def images(height=33, width=50, seed=0):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(map(torch.equal, *(state.values() for state in states)))


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=() if kind in QUICK else pytest.mark.heavy) for kind in KINDS],
)
def model(request):
    made = tiny(**KINDS[request.param])
    for value in made.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
    return made


def test_logits_equal_those_of_the_inner_model_at_image_size(model):
    model.eval()
    for pixels in (images(), images() / 255):
        logits = model(pixels)
        assert logits.shape == (2, 3, 33, 50) and torch.equal(logits, model.logits(pixels))
        prediction = model(pixels, as_prediction=True)
        assert isinstance(prediction, Prediction) and torch.equal(prediction.logits(), logits)
    assert torch.equal(model(images()), model(images() / 255)) and logits.std() > 0
    logits.softmax(1)[:, 1].sum().backward()
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained and any(value.grad is not None and value.grad.abs().sum() > 0 for value in trained)
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)
    model.zero_grad()


def test_a_model_comes_back_from_its_file_equal_to_the_bit(model, tmp_path):
    model.eval()
    file = tmp_path / "deeper" / "model.safetensors"
    model.save(file)
    back = dinoseg.load(file, device="cpu")
    assert type(back) is dinoseg.Segmenter and isinstance(back, nn.Module) and not back.training
    assert (back.classes, back.palette, back.num_classes) == (model.classes, model.palette, 3)
    assert same(back, model) and torch.equal(back(images()), model(images())) and back.file == file
    assert [name for name, value in back.named_parameters() if value.requires_grad] == [
        name for name, value in model.named_parameters() if value.requires_grad
    ]
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert groups(back) == groups(model)


def groups(model):
    return [(group["lr"], group["weight_decay"], len(group["params"])) for group in model.trainable_parameters()]


def test_copies_are_equal_and_independent(model, tmp_path):
    model.eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    model.save(tmp_path / "model.safetensors")
    for each in (model, dinoseg.load(tmp_path / "model.safetensors", device="cpu")):
        for again in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert same(again, each) and torch.equal(again(images()), each(images()))
            assert repr(again) == repr(each) and groups(again) == groups(each)
            before = each.predict(image).probabilities
            with torch.no_grad():
                next(value for value in again.parameters() if value.requires_grad).add_(1)
            assert (each.predict(image).probabilities == before).all() and not same(again, each)
            assert all(map(operator.is_, again.runtime.predictor.model.parameters(), again.model.parameters()))


def test_a_state_dict_goes_into_another_model(model):
    other = copy.deepcopy(model)
    for value in other.parameters():
        nn.init.zeros_(value)
    other.load_state_dict(model.state_dict())
    assert same(other, model)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_parameter_groups_have_the_rates_of_the_config(model):
    found = model.trainable_parameters()
    ids = [id(value) for group in found for value in group["params"]]
    assert sorted(ids) == sorted(id(value) for value in model.parameters() if value.requires_grad)
    config = model._config
    rates = {"lr": config["head"]["lr"], "backbone_lr": config["adapter"].get("lr"), "weight_decay": 0.01}
    expected = parameter_groups(model.model, **rates)
    assert [(group["lr"], group["weight_decay"]) for group in found] == [
        (group["lr"], group["weight_decay"]) for group in expected
    ]
    torch.optim.SGD(found, momentum=0.9)


def test_model_learns_in_a_plain_loop_and_predicts_between_steps(model):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW([{**group, "lr": 1e-2} for group in model.trainable_parameters()])
    mask = (images()[:, 0] > 128).to(torch.uint8)
    losses, dropout = [], [part for part in model.modules() if isinstance(part, nn.Dropout) and part.training]
    for _ in range(4):
        prediction = model(images(), as_prediction=True)
        of_masks = isinstance(prediction.outputs, MaskOutputs)
        torch.manual_seed(0)
        loss = (mask_classification_loss if of_masks else cross_entropy_loss)(prediction, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.predict(np.zeros((16, 16, 3), np.uint8))
        assert model.training and all(part.training for part in dropout)
    assert losses[-1] < losses[0]


def test_frozen_modules_stay_in_eval_mode():
    model = tiny(adapter="lora", **{"adapter.blocks": 1})
    assert model.training and model.head.training and model.train() is model
    blocks = model.backbone.blocks
    assert not any(part.training for part in blocks[0].modules()) and blocks[-1].training
    frozen = tiny()
    assert frozen.training and not any(part.training for part in frozen.backbone.modules())
    assert not frozen.eval().head.training


def test_prediction_in_train_mode_is_that_of_eval_mode():
    model = tiny(adapter="lora", head="mlp", **{"adapter.dropout": 0.9})
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    one, other = model.train().predict(image), model.eval().predict(image)
    assert (one.probabilities == other.probabilities).all() and (one.mask == other.mask).all()


def test_seed_sets_weights_and_leaves_the_global_random_state(tmp_path):
    state = torch.get_rng_state()
    models = [tiny(), tiny(), tiny(seed=1)]
    models[0].trainable_parameters()
    models[0].save(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert same(*models[:2]) and not same(*models[1:])


def test_maps_are_those_that_the_head_reads():
    model = tiny(**{"head.layers": [0, 1, 0]})
    maps = model.features(images(33, 50))
    assert [part.shape for part in maps] == [(2, 24, 5, 7)] * 3 and torch.equal(maps[0], maps[2])


def test_classes_by_number_name_or_dataset():
    assert dinoseg.create_model("rgb", num_classes=2).classes == ("class_0", "class_1")
    assert dinoseg.create_model("rgb", data="camvid").num_classes == 11
    red = dinoseg.create_model("rgb", classes=["a", "b"], num_classes=2, **{"data.palette": [[0, 0, 0], [255, 0, 0]]})
    assert red.palette == ((0, 0, 0), (255, 0, 0)) and red.ignore_index == 255


@pytest.mark.parametrize(
    "spelling",
    [
        {"data": {"channels": 1, "pixels": {"name": "files", "value_range": [0, 4095]}}},
        {"data.channels": 1, "data/pixels": "files", "data.pixels.value_range": [0, 4095]},
    ],
)
def test_range_of_values_is_chosen_with_its_option(spelling):
    model = dinoseg.create_model("rgb", num_classes=2, **spelling)
    assert model.facts.pixels == {"channels": 1, "files": [], "order": None, "value_range": [0, 4095]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "has no classes. Give num_classes=2"),
        ({"num_classes": 0}, "num_classes=0: give 2 to 255. For one kind of object, give two"),
        ({"classes": ["a"]}, r"len\(classes\)=1: give 2 to 255"),
        ({"classes": 7}, "classes=7 is not a list"),
        ({"classes": ["${x}", "b"]}, "refers to another key of the config. Rename the class"),
        ({"classes": ["???", "b"]}, "marks a value that a config lacks. Rename the class"),
        ({"data": {"classes": ["a", "???"]}}, r"classes\[1\] is not set"),
        ({"num_classes": 2, "init": {"a": 1}}, "^init=.* names no run. Give a run folder or a checkpoint"),
        ({"num_clases": 2}, "^num_clases is not an argument. Did you mean num_classes"),
        ({"num_classes": 2, "wieghts": "random"}, "^wieghts is not an argument. Did you mean weights"),
        ({"num_classes": 3, "classes": ["a", "b"]}, "num_classes=3, but classes has 2 names"),
        ({"classes": "ab"}, "is one text"),
        ({"classes": ["a", "a"]}, "classes names a more than once"),
        ({"num_classes": 2, "head": "slots"}, "head of slots"),
        ({"num_classes": 2, "backbone": "dinov3_vits61"}, "backbone=dinov3_vits61 is unknown. Did you mean"),
        (
            {"num_classes": 2, "weights": "nowhere.safetensors"},
            "^weights=nowhere.safetensors: file or folder not found",
        ),
        ({"num_classes": 2, "head.layers": [99]}, r'head=\{"layers": \[99\]\}: this backbone has'),
        ({"num_classes": 2, "nonsense": 1}, "nonsense is not a key of the config"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        dinoseg.create_model(**{"backbone": "tiny_surgical", **arguments})


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1, 3, 8, 8).long(),
        torch.zeros(0, 3, 8, 8),
        np.zeros((8, 8, 3), np.uint8),
    ],
)
def test_images_of_another_form_are_refused(pixels):
    model = dinoseg.create_model("rgb", num_classes=2)
    for call in (model, model.logits, model.features):
        with pytest.raises(UserError, match=r"Give \(B, 3, H, W\)|Give uint8, or floats|ndarray. Give a tensor"):
            call(pixels)


def test_the_text_of_a_model_is_one_line():
    text = repr(tiny(adapter="lora", head="mlp"))
    assert text.startswith("dinoseg.Segmenter(tiny, adapter=lora, head=mlp; 3 classes: dark, bright, red; ")
    assert text == str(tiny(adapter="lora", head="mlp")) and "\n" not in text and "trainable" in text


def test_weights_come_from_the_option_or_from_a_file(tmp_path):
    whole = dinoseg.create_model("tiny_surgical", num_classes=2)
    random = dinoseg.create_model("tiny_surgical", num_classes=2, weights="random")
    assert not same(whole.backbone, random.backbone)
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="^weights="):
        dinoseg.create_model("tiny_surgical", num_classes=2, weights=tmp_path / "other.pth")


def test_a_folder_with_a_card_is_read_back(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"README.md", "model.safetensors"}
    assert "# mine" in (tmp_path / "mine/README.md").read_text()
    for back in (
        dinoseg.Model.from_pretrained(tmp_path / "mine"),
        dinoseg.Segmenter.from_pretrained(tmp_path / "mine"),
    ):
        assert type(back) is dinoseg.Segmenter and same(back, model)


def test_weights_of_a_restricted_licence_need_consent(tmp_path):
    packaged = dinoseg.create_model("tiny_surgical", num_classes=2, adapter="lora")
    packaged.save(tmp_path / "delta.safetensors", delta=True)
    whole = dinoseg.load(tmp_path / "delta.safetensors", device="cpu")
    assert whole.facts.delta and same(whole, packaged)
    whole.facts = dinoseg.load(tmp_path / "delta.safetensors", device="cpu").facts
    whole.facts.backbone.update(gated=True, licence="DINOv3 License")
    with pytest.raises(UserError, match="DINOv3 License.*: delta=True. Or.*: gated=True"):
        whole.save(tmp_path / "refused.safetensors")
    assert not (tmp_path / "refused.safetensors").exists()
    whole.save(tmp_path / "whole.safetensors", gated=True)
    assert same(dinoseg.load(tmp_path / "whole.safetensors", device="cpu"), packaged)


@pytest.mark.heavy
@pytest.mark.parametrize("family", BACKBONES)
def test_each_family_of_backbones_is_created_saved_and_copied(family, tmp_path):
    option, small = BACKBONES[family]
    keys = {f"backbone.{key}": value for key, value in small.items()}
    model = dinoseg.create_model(option, num_classes=2, weights="random", adapter="full", head="mlp", **keys).eval()
    model.save(tmp_path / "model.safetensors")
    back = dinoseg.load(tmp_path / "model.safetensors", device="cpu")
    for again in (back, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(images(40, 48)), model(images(40, 48)))
    model.predict(np.zeros((32, 32, 3), np.uint8))  # in inference mode, after which gradients still reach everything
    model.train()(images(40, 48)).sum().backward()


def test_lightning_style_loop_trains_a_model():
    """A stand-in for Lightning: a module that holds the model, moves it, and toggles its modes."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny(adapter="full")

        def training_step(self, batch):
            return cross_entropy_loss(self.model(batch["image"]), batch["mask"])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.trainable_parameters())

    module = Module().to("cpu").train()
    optimizer = module.configure_optimizers()
    loss = module.training_step({"image": images(), "mask": torch.zeros(2, 33, 50, dtype=torch.uint8)})
    loss.backward()
    optimizer.step()
    assert not module.eval().model.training and {"model.model.head.classify.weight"} <= module.state_dict().keys()


@pytest.mark.heavy
@pytest.mark.parametrize("adapter", ["qlora", "lora_8bit"])
def test_quantised_model_is_saved_in_float32_and_stays_usable(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    arch = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    keys = {**TINY, "backbone.arch": arch}
    model = dinoseg.create_model("tiny", adapter=adapter, head="mlp", num_classes=2, **keys).eval()
    before = model(images())
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(model(images()), before)
    back = dinoseg.load(tmp_path / "model.safetensors", device="cpu")
    assert torch.allclose(back(images()), before, atol=0.05 * float(before.detach().abs().max()))


@pytest.mark.parametrize("count", [1, 0, 256, True, 2.0])
def test_a_model_has_two_to_255_classes(count):
    with pytest.raises(UserError, match="2 to 255"):
        dinoseg.create_model("rgb", num_classes=count)


def test_numbers_and_iterables_of_other_libraries_are_accepted():
    assert dinoseg.create_model("rgb", num_classes=np.int64(3)).num_classes == 3
    assert dinoseg.create_model("rgb", classes=(name for name in "ab")).classes == ("a", "b")
    model, image = dinoseg.create_model("rgb", num_classes=2, seed=enum.IntEnum("Seed", "ONE").ONE), np.zeros((8, 8, 3))
    assert model._config["seed"] == 1 and len(model.predict([image] * 3, batch_size=np.int64(2))) == 3
    for wrong in (True, 2.0, 0):
        with pytest.raises(UserError, match=f"^batch_size={wrong}: give a whole number of at least 1"):
            model.predict(image, batch_size=wrong)


def test_model_that_load_would_refuse_is_not_saved(tmp_path):
    file = tmp_path / "model.safetensors"
    model = tiny()
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="^The model: 1 of its tensors hold NaN"):
        model.save(file)
    model = tiny()
    model.head.classify = nn.Conv2d(24, 5, 1)
    with pytest.raises(UserError, match="2 tensors of another shape .such as head.classify.bias"):
        model.save(file)
    model.head.classify = nn.Sequential(nn.Conv2d(24, 3, 1))
    with pytest.raises(UserError, match="2 tensors missing .*, 2 tensors unexpected"):
        model.save(file)
    model = dinoseg.create_model("tiny_surgical", num_classes=2, adapter="lora")
    model.requires_grad_(True)
    with pytest.raises(UserError, match="tensors unexpected .*with delta=True frozen or unfrozen, after the model was"):
        model.save(file, delta=True)
    assert not any(tmp_path.iterdir())
    model.save(file)
    assert same(dinoseg.load(file, device="cpu"), model)


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_another_type_of_weights_is_refused_with_the_remedy(change):
    model = dinoseg.create_model("rgb", num_classes=2)
    with pytest.raises(UserError, match="holds its weights in float32.*torch.autocast"):
        change(model)
    assert model.to("cpu") is model and model.float() is model


def test_a_segmentation_holds_its_own_image():
    model, image = dinoseg.create_model("rgb", num_classes=2), np.zeros((16, 16, 3), np.uint8)
    found = model.predict(image)
    image[:] = 255
    assert found.image.max() == 0 and (found.probabilities.argmax(0) == found.mask).all()
    alone = pickle.loads(pickle.dumps(model.predict(image)))
    with pytest.raises(UserError, match="was pickled without its model"):
        alone.probabilities  # noqa: B018


def test_unfrozen_blocks_are_trained_at_the_rate_of_the_backbone():
    model = tiny(**{"optim.optimizer.backbone_lr": 1e-5})
    model.backbone.blocks[1].requires_grad_(True)
    groups = model.train().trainable_parameters()
    found = {id(value): group["lr"] for group in groups for value in group["params"]}
    blocks = {id(value): 1e-5 for value in model.backbone.blocks[1].parameters()}
    assert found == blocks | {id(value): model._config["head"]["lr"] for value in model.head.parameters()}
    assert [part.training for part in model.backbone.blocks] == [False, True]
    model(images()).sum().backward()
    assert all(value.grad is not None for value in model.backbone.blocks[1].parameters())


@pytest.mark.parametrize("weights", ["~nosuchuser/x", "x" * 5000, "a\ud800", 5, None])
def test_invalid_weights_are_one_error_or_the_default(weights):
    if weights is None:
        assert dinoseg.create_model("tiny", num_classes=2, weights=None).num_classes == 2
        return
    with pytest.raises(UserError, match="weights"):
        dinoseg.create_model("tiny", num_classes=2, weights=weights)


def test_a_folder_named_random_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    assert dinoseg.create_model("tiny", num_classes=2, weights="random").num_classes == 2


def test_a_model_on_the_meta_device_has_shapes_but_no_values(tmp_path):
    model = tiny().to("meta")
    assert model(torch.zeros(1, 3, 32, 48, device="meta")).shape == (1, 3, 32, 48)
    reads = (lambda: model.save(tmp_path / "model.safetensors"), lambda: model.predict(np.zeros((32, 48, 3), np.uint8)))
    for read in reads:
        with pytest.raises(UserError, match="meta device, which holds no values.*to_empty"):
            read()


def test_one_class_of_a_key_is_refused():
    with pytest.raises(UserError, match="give 2 to 255"):
        dinoseg.create_model("tiny_surgical", **{"data.classes": ["a"]})
    assert dinoseg.create_model("tiny_surgical", task="multilabel", **{"data.classes": ["a"]}).classes == ("a",)


@pytest.mark.parametrize("classes", [{"a", "b"}, {0: "a", 1: "b"}, {"a": 0, "b": 1}, [1, 2], ["a", None], [b"a", b"b"]])
def test_names_without_order_or_text_are_refused(classes):
    with pytest.raises(UserError, match="^classes"):
        dinoseg.create_model("tiny_surgical", classes=classes)


def test_another_number_of_classes_of_the_head_is_refused():
    with pytest.raises(UserError, match="num_classes.*7.*classes has 2"):
        dinoseg.create_model("tiny_surgical", num_classes=2, head={"name": "linear", "num_classes": 7})
