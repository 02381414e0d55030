"""Objects where options are named: head and backbone of create_model, dataset and loss of train."""

import copy

import numpy as np
import pytest
import torch
from command_line import SMALL
from torch import nn

import dinoseg
from dinoseg.core.contracts import Backbone, Head, Loss
from dinoseg.core.geometry import concatenate, widths
from dinoseg.experiment.objects import OPTION, lend_objects, take_module
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.utils.errors import UserError

WORDS = tuple(word for word in SMALL if not word.startswith("data."))
QUIET = {"mode.report": False, "mode.pictures": 0, "data.batch_size": 2, "trainer.steps": 2, "logger": []}
CLASSES = ["ground", "disc"]


class BottleneckHead(Head):
    def __init__(self, in_dim, num_layers, num_classes, hidden=8):
        super().__init__()
        width = sum(widths(in_dim, num_layers))
        self.layers = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, num_classes, 1))

    def forward(self, features):
        return self.layers(concatenate(features))

    def grid_scores(self, outputs):
        return outputs


class PatchBackbone(Backbone):
    def __init__(self, num_layers=2):
        super().__init__()
        self.dim, self.depth, self.patch_size = 16, 2, 8
        self.num_layers = num_layers
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))
        register_colours(self, [0.5] * 3, [0.2] * 3)

    def forward(self, images):
        maps = self.patches(self.pixels(images)).movedim(1, -1)
        found = []
        for block in self.blocks:
            maps = maps + block(maps).relu()
            found.append(maps.movedim(-1, 1))
        return found


class Discs(torch.utils.data.Dataset):
    classes, palette, ignore_index = CLASSES, [(0, 0, 0), (255, 200, 0)], 255

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        mask = torch.zeros(40, 48, dtype=torch.long)
        mask[8 : 20 + 4 * index, 8:24] = 1
        return {"image": (mask * 200).to(torch.uint8).expand(3, -1, -1), "mask": mask, "name": self.names[index]}


class CountedLoss(Loss):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, prediction, batch):
        self.calls += 1
        masks = batch.mask.long()
        return nn.functional.cross_entropy(prediction.logits(masks.shape[-2:]), masks, ignore_index=255), {}


def data():
    return {"train": Discs(["a", "b", "c"]), "val": Discs(["d", "e"])}


def train(folder, **overrides):
    return dinoseg.train(None, *WORDS, out_dir=folder, **{**QUIET, **overrides})


def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 48, 3), dtype=np.uint8) for _ in range(2)]


HEADS = {"head": ("rgb", 3, 1), "backbone": (PatchBackbone, None, None), "both": (PatchBackbone, 16, 2)}


def model_of(parts):
    backbone, dim, num_layers = HEADS[parts]
    head = None if dim is None else BottleneckHead(dim, num_layers, 2)
    backbone = backbone if isinstance(backbone, str) else backbone()
    adapter = "frozen" if parts == "head" else "full"
    model = dinoseg.create_model(backbone, head=head, adapter=adapter, classes=CLASSES)
    assert head is None or model.head is head
    assert isinstance(backbone, str) or model.backbone is backbone
    return model


@pytest.mark.parametrize("parts", HEADS)
def test_a_model_of_objects_trains_predicts_and_is_scored(parts, tmp_path):
    model = model_of(parts)
    item = Discs(["a"])[0]
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    before = copy.deepcopy(model.state_dict())
    dinoseg.losses.cross_entropy_loss(model(item["image"][None]), item["mask"][None]).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("model.head") for name in moved)
    assert any(name.startswith("model.backbone") for name in moved) == (parts != "head")

    trained = copy.deepcopy(model.eval().state_dict())
    expected = dinoseg.metrics.ConfusionMatrix(2)
    expected.update(model.predict(item["image"]).mask, item["mask"])
    scores = dinoseg.evaluate(model, data=Discs(["a"]), out_dir=tmp_path / "scores", mode={"metrics_only": True})
    assert np.array_equal(scores.confusion, expected.compute()["matrix"])
    # modes build copies: the objects of the caller are unchanged
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


@pytest.mark.heavy
def test_a_model_of_objects_is_exported(tmp_path):
    model = model_of("both").eval()
    nn.init.normal_(model.head.layers[2].weight)
    exported = dinoseg.export_onnx(model, images(), out_dir=tmp_path / "onnx")
    masks = [found.mask for found in dinoseg.load(exported["path"]).predict(images())]
    # the file computes in float32, the model in bfloat16 on some processors
    assert all((found.mask == mask).mean() > 0.98 for found, mask in zip(model.predict(images()), masks, strict=True))


def test_saving_a_model_with_objects_is_refused_with_a_remedy(tmp_path):
    model = dinoseg.create_model("rgb", head=BottleneckHead(3, 1, 2), classes=CLASSES)
    for write in (model.save, model.save_pretrained, lambda path: model.push_to_hub("org/name")):
        with pytest.raises(UserError, match=r"head is an object of BottleneckHead.*head/NAME.yaml.*config_dir="):
            write(tmp_path / "model")
    assert not any(tmp_path.iterdir())
    assert "head=BottleneckHead" in repr(model)
    same = copy.deepcopy(model)
    assert torch.equal(same.eval()(torch.zeros(1, 3, 8, 8)), model.eval()(torch.zeros(1, 3, 8, 8)))


def test_lora_of_a_backbone_object_is_merged_before_modes(tmp_path):
    model = dinoseg.create_model(PatchBackbone(), adapter={"name": "lora", "targets": "all_linear"}, classes=CLASSES)
    with pytest.raises(UserError, match=r"model.merge\(\)"):
        dinoseg.evaluate(model, data=Discs(["a"]), out_dir=tmp_path / "scores")
    model.merge()
    assert 0 <= dinoseg.evaluate(model, data=Discs(["a"]), out_dir=tmp_path / "scores")["miou"] <= 1


class ThreeLayers(PatchBackbone):
    def __init__(self):
        super().__init__(num_layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": BottleneckHead(5, 1, 2)}, r"BottleneckHead fails for maps \[\[1, 3, 2, 2\]\]"),
        ({"head": BottleneckHead(3, 1, 7)}, "BottleneckHead scores 7 classes, and the model has 2"),
        ({"head": BottleneckHead}, "head is the class BottleneckHead. Give an object"),
        ({"head": nn.Conv2d(3, 2, 1)}, "Conv2d is not a dinoseg.core.contracts.Head"),
        ({"head": lambda maps: maps}, "function is not a dinoseg.core.contracts.Head"),
        ({"backbone": nn.Conv2d(3, 2, 1)}, "Conv2d is not a dinoseg.core.contracts.Backbone"),
        ({"backbone": Backbone()}, "Backbone lacks dim, depth"),
        ({"backbone": ThreeLayers()}, "ThreeLayers returns maps .* promise"),
        ({"backbone": PatchBackbone(), "weights": "random"}, "weights has no effect on a backbone that is an object"),
        ({"backbone": PatchBackbone(), "head": {"layers": [0]}}, "head.layers has no effect"),
    ],
)
def test_objects_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        dinoseg.create_model(**{"backbone": "rgb", "classes": CLASSES, **options})


def test_an_option_of_objects_needs_them():
    with pytest.raises(UserError, match="head=_object is an object of a Python call"):
        dinoseg.create_model("rgb", head=OPTION, classes=CLASSES)
    part = nn.Linear(2, 2)
    with lend_objects({"head": part}):
        assert take_module("head", in_dim=3) is part
        with torch.device("meta"):
            assert take_module("head").weight.is_meta
    assert not part.weight.is_meta


def test_datasets_and_a_loss_train_resume_and_are_scored(tmp_path):
    loss = CountedLoss()
    run = train(tmp_path / "run", data=data(), loss=loss)
    assert run.step == 2 and loss.calls >= 2 and 0 <= run.scores["miou"] <= 1
    assert run.load_model().classes == tuple(CLASSES)
    scores = dinoseg.evaluate(run, data=data()["val"], out_dir=tmp_path / "scores", mode={"metrics_only": True})
    assert np.array_equal(scores.confusion, run.scores.confusion)
    with pytest.raises(UserError, match=r'lacks data=\{"val": DATASET\}'):
        dinoseg.evaluate(run, out_dir=tmp_path / "none")
    with pytest.raises(UserError, match=r'lacks data=\{"train": DATASET\}'):
        run.resume(loss=loss, trainer={"steps": 3})
    with pytest.raises(UserError, match="lacks loss=MODULE"):
        run.resume(data=data(), trainer={"steps": 3})
    assert run.resume(data=data(), loss=loss, trainer={"steps": 3}).step == 3


def test_datasets_train_the_weights_of_the_same_files(tmp_path):
    from PIL import Image

    for split, dataset in data().items():
        for item in dataset:
            for kind, pixels in (("images", item["image"].movedim(0, -1)), ("masks", item["mask"].to(torch.uint8))):
                path = tmp_path / "data" / split / kind / f"{item['name']}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)
    files = {"root": tmp_path / "data", "classes": CLASSES}
    opened = {split: dinoseg.open_dataset(**files, split=split) for split in ("train", "val")}
    whole = dinoseg.open_dataset(**files)
    parts = {**opened, "train": torch.utils.data.Subset(whole, [0, 1, 2])}
    shown = dinoseg.open_dataset(**files, transform=dict)
    runs = {
        "files": train(tmp_path / "files", data=files),
        "objects": train(tmp_path / "objects", data=data()),
        "opened": train(tmp_path / "opened", data=parts),
        "transformed": train(tmp_path / "transformed", data={**opened, "train": shown}),
    }
    weights = {name: run.load_model("last").state_dict() for name, run in runs.items()}
    for other in ("objects", "opened", "transformed"):
        assert all(torch.equal(value, weights[other][name]) for name, value in weights["files"].items()), other


class LayeredDiscs(Discs):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "mask": torch.stack([item["mask"] == 0, item["mask"] == 1]).long()}


def test_datasets_of_layers_train_a_multilabel_model(tmp_path):
    options = {"task": "multilabel", "loss": "bce"}
    layered = {split: LayeredDiscs(dataset.names) for split, dataset in data().items()}
    run = train(tmp_path / "run", data=layered, **options)
    assert run.step == 2 and 0 <= run.scores["accuracy"] <= 1
    assert run.load_model("last").palette[0] == (255, 255, 255)  # instead of black
    with pytest.raises(UserError, match=r"data, .*the mask of .* int64 \(.*Return an integer tensor \(2, "):
        train(tmp_path / "other", data=data(), **options)


class OtherClasses(Discs):
    classes = ["ground", "leaf"]


class FloatDiscs(Discs):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "image": item["image"].float() / 255}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": Discs(["a"])}, "data is one dataset.*random_split"),
        ({"data": {"train": Discs(["a"])}}, r'no dataset for val, .* data=\{"train": DATASET, "val": DATASET\}'),
        ({"data": {"train": Discs(["a"]), "valid": Discs(["a"])}}, "and the key valid. Give .* train, val, test"),
        (
            {"data": {"train": "FOLDER/train", "val": "FOLDER/val"}},
            'FOLDER/train is not a dataset.*data={"root": FOLDER}',
        ),
        ({"data": {**data(), "val": OtherClasses(["d"])}}, "classes of train is .*'disc'.* of val .*'leaf'"),
        ({"data": {**data(), "val": torch.utils.data.TensorDataset(torch.zeros(2))}}, "data, val: .* lacks `names`"),
        ({"data": {**data(), "val": FloatDiscs(["d"])}}, "data, val: .*FloatDiscs: the image of d is float32"),
        ({"data": data(), "loss": lambda logits, masks: 0}, "function is not a dinoseg.core.contracts.Loss"),
        ({"data": data(), "loss": CountedLoss(), "loss.weights": {"disc": 2}}, "loss.weights has no effect"),
        ({"data": data(), "head": BottleneckHead(3, 1, 2)}, r"head is an object.*extending.md#head.*create_model"),
    ],
)
def test_wrong_objects_of_a_training_are_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **overrides)
