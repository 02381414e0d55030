"""Models for a caller's own loop: logits with gradients, parameter groups, one file, copies and modes."""

import copy
import enum
import operator
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from command_line import TINY_KEYS
from mistakes import assert_refused, refusals
from tiny_parts import BACKBONES
from torch import nn

import dinoseg
from dinoseg.core.shapes import Prediction
from dinoseg.training.optim import parameter_groups
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow
KINDS = {
    "frozen": {},
    "lora": {"adapter": "lora", "head": "linear", "adapter.dropout": 0.5},
    "last blocks": {"adapter": "last_blocks", "adapter.blocks": 1, "head": "cnn"},
    "queries": {"adapter": "full", "head": "eomt", "head.num_queries": 5, "head.blocks": 1},
    "reduced": {"adapter": "full", "head": "mlp", "resolution": {"scale": 0.5, "longest": 40}},
}
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def tiny(**overrides):
    return dinoseg.create_model("tiny", **{"classes": ["dark", "bright", "red"], **TINY_KEYS, **overrides})


def images(height=33, width=50, seed=0):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(map(torch.equal, *(state.values() for state in states)))


PARAMS = [pytest.param(kind, marks=() if kind == "lora" else pytest.mark.heavy) for kind in KINDS]


@pytest.fixture(scope="module", params=PARAMS)
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


def test_files_and_copies_are_equal_and_independent(model, tmp_path):
    model.eval()
    file = tmp_path / "deeper" / "model.safetensors"
    model.save(file)
    back = dinoseg.load(file, device="cpu")
    assert type(back) is dinoseg.Segmenter and isinstance(back, nn.Module) and not back.training
    assert (back.classes, back.palette, back.num_classes) == (model.classes, model.palette, 3)
    assert same(back, model) and torch.equal(back(images()), model(images())) and back.file == file
    trainable = [[name for name, value in each.named_parameters() if value.requires_grad] for each in (back, model)]
    assert trainable[0] == trainable[1] and groups(back) == groups(model)
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    for each in (model, back):
        before = each.predict(IMAGE).probabilities
        for again in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert same(again, each) and torch.equal(again(images()), each(images()))
            assert repr(again) == repr(each) and groups(again) == groups(each)
            with torch.no_grad():
                next(value for value in again.parameters() if value.requires_grad).add_(1)
            assert (each.predict(IMAGE).probabilities == before).all() and not same(again, each)
            assert all(map(operator.is_, again.runtime.predictor.model.parameters(), again.model.parameters()))
            again.load_state_dict(each.state_dict())
            assert same(again, each)
    with pytest.raises(RuntimeError, match="Missing key"):
        back.load_state_dict({})


def groups(model):
    return [(group["lr"], group["weight_decay"], len(group["params"])) for group in model.trainable_parameters()]


def test_parameter_groups_have_the_rates_of_the_config(model):
    found = model.trainable_parameters()
    ids = [id(value) for group in found for value in group["params"]]
    assert sorted(ids) == sorted(id(value) for value in model.parameters() if value.requires_grad)
    config = model._config
    rates = {"lr": config["head"]["lr"], "backbone_lr": config["adapter"].get("lr"), "weight_decay": 0.01}
    expected = parameter_groups(model.model, **rates)
    assert groups(model) == [(group["lr"], group["weight_decay"], len(group["params"])) for group in expected]
    torch.optim.SGD(found, momentum=0.9)


def test_frozen_modules_stay_in_eval_mode():
    model = tiny(adapter="lora", **{"adapter.blocks": 1})
    assert model.training and model.head.training and model.train() is model
    blocks = model.backbone.blocks
    assert not any(part.training for part in blocks[0].modules()) and blocks[-1].training
    frozen = tiny()
    assert frozen.training and not any(part.training for part in frozen.backbone.modules())
    assert not frozen.eval().head.training


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


def test_classes_and_pixels_are_chosen_as_for_a_dataset():
    assert dinoseg.create_model("rgb", num_classes=2).classes == ("class_0", "class_1")
    assert dinoseg.create_model("rgb", data="camvid").num_classes == 11
    assert dinoseg.create_model("rgb", task="multilabel", classes=["a"]).classes == ("a",)  # one is enough
    pixels = {"name": "files", "value_range": [0, 4095]}
    data = {"channels": 1, "pixels": pixels, "palette": [[0, 0, 0], [255, 0, 0]]}
    model = dinoseg.create_model("rgb", classes=["a", "b"], num_classes=2, data=data)
    assert model.palette == ((0, 0, 0), (255, 0, 0)) and model.ignore_index == 255
    assert model.facts.pixels == {"channels": 1, "files": [], "order": None, "value_range": [0, 4095]}


OTHER_FORMS = [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).long(), torch.zeros(0, 3, 8, 8)]


@pytest.mark.parametrize("pixels", [*OTHER_FORMS, np.zeros((8, 8, 3), np.uint8)])
def test_images_of_another_form_are_refused(pixels):
    model = dinoseg.create_model("rgb", num_classes=2)
    for call in (model, model.logits, model.features):
        with pytest.raises(UserError, match=r"Give \(B, 3, H, W\)|Give uint8, or floats|ndarray. Give a tensor"):
            call(pixels)


LEVELS = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "0 to 255": LEVELS * 255,
    "normalised": (LEVELS - 0.45) / 0.22,
    "NaN": torch.where(LEVELS > 0.9, torch.nan, LEVELS),
    "a little negative": LEVELS - 0.1,
}


@pytest.mark.parametrize("image", REFUSED.values(), ids=REFUSED)
def test_floats_outside_0_to_1_are_refused(image):
    model = dinoseg.create_model("rgb", num_classes=2)
    for use in (model.predict, lambda each: model(each[None]), lambda each: model.features(each[None])):
        assert_refused(lambda use=use: use(image), "floats from ", "0..1", "normalise")
    assert_refused(lambda: model.predict(image.permute(1, 2, 0).numpy()), "floats from ", "0..1", "normalise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_that_round_to_0_to_1_are_levels(dtype):
    model = dinoseg.create_model("rgb", num_classes=2)
    image = LEVELS.clone()
    image[0, 0, :2] = torch.tensor([1.0000001, -1e-7])
    assert dtype == torch.float64 or model(image[None].to(dtype)).isfinite().all()
    assert (model.predict(image.to(dtype)).image[0, :2, 0] == [255, 0]).all()


@pytest.mark.parametrize(("head", "size"), [("linear", (1, 7)), ("eomt", (33, 50))])
def test_logits_are_contiguous(head, size):
    model = dinoseg.create_model("tiny_surgical", head=head, num_classes=3).eval()
    logits = model(torch.zeros(2, 3, *size))
    assert logits.is_contiguous() and logits.view(2, 3, -1).shape == (2, 3, size[0] * size[1])
    assert np.asarray(model.predict(np.zeros((*size, 3))).mask).shape == size


def test_the_text_of_a_model_is_one_line():
    model = tiny(adapter="lora", head="mlp")
    text = repr(model)
    assert text.startswith("dinoseg.Segmenter(tiny, adapter=lora, head=mlp; 3 classes: dark, bright, red; ")
    assert text == str(model) and "\n" not in text and "trainable" in text


@pytest.mark.parametrize("weights", ["random", False, None])
def test_weights_come_from_the_option_unless_they_are_random(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()  # which is not read
    whole = dinoseg.create_model("tiny_surgical", num_classes=2, weights=True)
    random = dinoseg.create_model("tiny_surgical", num_classes=2, weights=weights)
    assert not same(whole.backbone, random.backbone) and random.backbone.weights == "random"


def test_a_folder_with_a_card_is_read_back(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"README.md", "model.safetensors"}
    assert "# mine" in (tmp_path / "mine/README.md").read_text()
    for kind in (dinoseg.Model, dinoseg.Segmenter):
        back = kind.from_pretrained(tmp_path / "mine")
        assert type(back) is dinoseg.Segmenter and same(back, model)


def test_weights_of_a_restricted_licence_need_consent(tmp_path):
    packaged = dinoseg.create_model("tiny_surgical", num_classes=2, adapter="lora")
    packaged.save(tmp_path / "delta.safetensors", delta=True)
    whole = dinoseg.load(tmp_path / "delta.safetensors", device="cpu")
    assert whole.facts.delta and same(whole, packaged)
    whole.facts = copy.deepcopy(whole.facts)
    whole.facts.backbone.update(gated=True, licence="DINOv3 License")
    with pytest.raises(UserError, match="DINOv3 License.*: delta=True, or .* Or.*: gated=True"):
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


@pytest.mark.heavy
@pytest.mark.parametrize("adapter", ["qlora", "lora_8bit"])
def test_quantised_model_is_saved_in_float32_and_stays_usable(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    arch = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = tiny(adapter=adapter, head="mlp", **{"backbone.arch": arch}).eval()
    before = model(images())
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(model(images()), before)
    back = dinoseg.load(tmp_path / "model.safetensors", device="cpu")
    assert torch.allclose(back(images()), before, atol=0.05 * float(before.detach().abs().max()))


def test_numbers_and_iterables_of_other_libraries_are_accepted():
    assert dinoseg.create_model("rgb", num_classes=np.int64(3)).num_classes == 3
    assert dinoseg.create_model("rgb", classes=(name for name in "ab")).classes == ("a", "b")
    model = dinoseg.create_model("rgb", num_classes=2, seed=enum.IntEnum("Seed", "ONE").ONE)
    assert model._config["seed"] == 1 and len(model.predict([IMAGE] * 3, batch_size=np.int64(2))) == 3
    for wrong in (True, 2.0, 0):
        with pytest.raises(UserError, match=f"^batch_size={wrong} is .*a whole number"):
            model.predict(IMAGE, batch_size=wrong)


def test_model_that_load_would_refuse_is_not_saved(tmp_path):
    file = tmp_path / "model.safetensors"
    model = tiny()
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    assert_refused(lambda: model.save(file), "The model: 1 of its tensors hold NaN")
    model.head.classify = nn.Conv2d(24, 5, 1)
    assert_refused(lambda: model.save(file), "2 tensors of another shape (such as head.classify.bias")
    model.head.classify = nn.Sequential(nn.Conv2d(24, 3, 1))
    assert_refused(lambda: model.save(file), "2 tensors missing ", "2 tensors unexpected")
    frozen = dinoseg.create_model("tiny_surgical", num_classes=2, adapter="lora")
    frozen.requires_grad_(True)
    save = partial(frozen.save, file)
    assert_refused(lambda: save(delta=True), "tensors unexpected ", "with delta=True frozen or unfrozen, after the")
    assert not any(tmp_path.iterdir())
    save()
    assert same(dinoseg.load(file, device="cpu"), frozen)


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_another_type_of_weights_is_refused_with_the_remedy(change):
    model = dinoseg.create_model("rgb", num_classes=2)
    assert_refused(lambda: change(model), "holds its weights in float32", "torch.autocast")
    assert model.to("cpu") is model and model.float() is model


def test_a_segmentation_holds_its_own_image():
    model = dinoseg.create_model("rgb", num_classes=2)
    image = np.zeros((16, 16, 3), np.uint8)
    found = model.predict(image)
    image[:] = 255
    assert found.image.max() == 0 and (found.probabilities.argmax(0) == found.mask).all()
    alone = pickle.loads(pickle.dumps(model.predict(image)))
    assert_refused(lambda: alone.probabilities, "was pickled without its model")


def test_a_model_on_the_meta_device_has_shapes():
    assert tiny().to("meta")(torch.zeros(1, 3, 32, 48, device="meta")).shape == (1, 3, 32, 48)


def create(**arguments):
    return lambda: dinoseg.create_model(**{"backbone": "tiny_surgical", "num_classes": 2, **arguments})


def create_named(classes, **arguments):
    return create(num_classes=None, classes=classes, **arguments)


test_message_names_value_and_remedy = refusals(
    {
        "no classes": (create_named(None), "has no classes. Give num_classes=2"),
        "0 classes": (create(num_classes=0), "data.classes=[]: give a list of 1 to 255 names"),
        **{f"{count!r} classes": (create(num_classes=count), "2 to 255") for count in (1, True)},
        "256 classes": (create(num_classes=256), "data.classes=[", "give a list of 1 to 255 names"),
        "a single name": (create_named(["a"]), "len(classes)=1: give 2 to 255"),
        "a text as the names": (create_named("ab"), "classes='ab' is not a list"),
        "a name twice": (create_named(["a", "a"]), "classes names a more than once"),
        "names without order": (create_named({"a", "b"}), "classes={", " is not a list"),
        "names by their ids": (create_named({0: "a", 1: "b"}), "classes={0", " is not a list"),
        "names and their number": (create(num_classes=3, classes=["a", "b"]), "num_classes=3, but classes has 2 names"),
        "another number": (create(head={"name": "linear", "num_classes": 7}), "num_classes", "7", "classes has 2"),
        "init that is lacking": (create(init="nowhere"), "init=nowhere: file or folder not found"),
        "init twice": (create(init="nowhere", **{"head.init": "probe"}), "head.init=probe both set"),
        "an argument": (create(num_clases=2), "num_clases is not an argument. Did you mean num_classes"),
        "a key": (create(nonsense=1), "nonsense is not a key of the config"),
        "slots": (create(head="slots"), "head=slots predicts slots, which have no classes"),
        "a backbone": (create(backbone="dinov3_vits61"), "backbone=dinov3_vits61 is unknown. Did you mean"),
        "a layer": (create(**{"head.layers": [99]}), "head.layers=[99]: this backbone has"),
        "no weights": (create(weights="gone.safetensors"), "weights=gone.safetensors: file or folder not found"),
        "weights of no text": (create(weights="a\ud800"), "weights"),
        "a loss": (create(loss="dice"), "loss has no effect"),
        "a schedule": (create(optim={"schedule": {"kind": "poly"}}), "optim.schedule.kind has no effect"),
        "betas": (create(optim={"optimizer": {"betas": [0.9, 0.95]}}), "optim.optimizer.betas has no effect"),
        "a batch size": (create(data={"batch_size": 3}), "data.batch_size has no effect"),
        "an augmentation": (create(data={"augment": {"flip": 0.0}}), "data.augment.flip has no effect"),
    }
)
