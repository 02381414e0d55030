"""Objects where options are named: head and backbone of create_model, dataset and loss of train."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from command_line import SMALL
from making import save
from mistakes import assert_refused, refusals
from torch import nn

import dinoseg
from dinoseg.core.contracts import Backbone, Head, Loss
from dinoseg.core.geometry import concatenate, widths
from dinoseg.experiment.objects import OPTION, lend_objects, take_module
from dinoseg.models.backbones.normalisation import register_colours
from dinoseg.utils.errors import UserError

WORDS = tuple(word for word in SMALL if not word.startswith("data."))
QUIET = {"mode.report": False, "mode.pictures": 0, "data.batch_size": 2, "trainer.steps": 2, "logger": []}
QUICK = {"metrics_only": True}
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
    classes = CLASSES
    palette = [(0, 0, 0), (255, 200, 0)]
    ignore_index = 255

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


def test_a_model_of_objects_trains_predicts_and_is_scored(tmp_path):
    parts = {"backbone": PatchBackbone(), "head": BottleneckHead(16, 2, 2)}
    model = dinoseg.create_model(**parts, adapter="full", classes=CLASSES)
    assert all(getattr(model, name) is part for name, part in parts.items())
    item = Discs(["a"])[0]
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    before = copy.deepcopy(model.state_dict())
    dinoseg.losses.cross_entropy_loss(model(item["image"][None]), item["mask"][None]).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(any(name.startswith(f"model.{part}") for name in moved) for part in parts)
    trained = copy.deepcopy(model.eval().state_dict())
    expected = dinoseg.metrics.ConfusionMatrix(2)
    expected.update(model.predict(item["image"]).mask, item["mask"])
    scores = dinoseg.evaluate(model, data=Discs(["a"]), out_dir=tmp_path / "scores", mode={"metrics_only": True})
    assert np.array_equal(scores.confusion, expected.compute()["matrix"])
    # modes build copies: the objects of the caller are unchanged
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


@pytest.mark.heavy
def test_a_model_of_objects_is_exported(tmp_path):
    model = dinoseg.create_model(PatchBackbone(), head=BottleneckHead(16, 2, 2), adapter="full", classes=CLASSES).eval()
    nn.init.normal_(model.head.layers[2].weight)
    images = [*np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)]
    exported = dinoseg.load(dinoseg.export_onnx(model, images, out_dir=tmp_path / "onnx")["path"])
    # the file computes in float32, the model in bfloat16 on some processors
    for found, expected in zip(model.predict(images), exported.predict(images), strict=True):
        assert (found.mask == expected.mask).mean() > 0.98


def test_saving_a_model_with_objects_is_refused_with_a_remedy(tmp_path):
    model = dinoseg.create_model("rgb", head=BottleneckHead(3, 1, 2), classes=CLASSES)
    for write in (model.save, model.save_pretrained, lambda path: model.push_to_hub("org/name")):
        with pytest.raises(
            UserError, match=r"head=_object is an object .*docs/extending.md.*torch.save\(model.state_dict"
        ):
            write(tmp_path / "model")
    assert not [*tmp_path.iterdir()]
    assert "head=BottleneckHead" in repr(model)
    same = copy.deepcopy(model)
    assert torch.equal(same.eval()(torch.zeros(1, 3, 8, 8)), model.eval()(torch.zeros(1, 3, 8, 8)))


def test_lora_of_a_backbone_object_is_merged_before_modes(tmp_path):
    model = dinoseg.create_model(PatchBackbone(), adapter={"name": "lora", "targets": "all_linear"}, classes=CLASSES)
    score = partial(dinoseg.evaluate, model, data=Discs(["a"]), out_dir=tmp_path / "scores", mode=QUICK)
    assert_refused(score, "model.merge()")
    model.merge()
    assert 0 <= score()["miou"] <= 1


def create(**options):
    return lambda: dinoseg.create_model(**{"backbone": "rgb", "classes": CLASSES, **options})


test_objects_that_do_not_fit_are_refused = refusals(
    {
        "classes": (create(head=BottleneckHead(3, 1, 7)), "BottleneckHead scores 7 classes, and the model has 2"),
        "class of a head": (
            create(head=BottleneckHead),
            "head: <class ",
            "BottleneckHead'> is not an object of dinoseg.core.contracts.Head",
        ),
        "a module": (
            create(head=nn.Conv2d(3, 2, 1)),
            "head: Conv2d(3, 2",
            " is not an object of dinoseg.core.contracts.Head",
        ),
        "a function": (create(head=lambda maps: maps), "is not an object of dinoseg.core.contracts.Head"),
        "an option without its object": (create(head=OPTION), "head=_object is an object of a Python call"),
        "no backbone": (
            create(backbone=nn.Conv2d(3, 2, 1)),
            "backbone: Conv2d(3, 2",
            " is not an object of dinoseg.core.contracts.Backbone",
        ),
        "maps": (create(backbone=PatchBackbone(num_layers=3)), "PatchBackbone returns maps ", " promise"),
        "weights": (create(backbone=PatchBackbone(), weights="random"), "weights has no effect on a backbone that is"),
        "layers": (create(backbone=PatchBackbone(), head={"layers": [0]}), "head.layers has no effect"),
    }
)


def test_lent_object_is_not_moved_by_the_device_of_a_build():
    part = nn.Linear(2, 2)
    with lend_objects({"head": part}):
        assert take_module("head", in_dim=3) is part
        with torch.device("meta"):
            assert take_module("head").weight.is_meta
    assert not part.weight.is_meta


@pytest.mark.heavy
def test_datasets_and_a_loss_train_resume_and_are_scored(tmp_path):
    loss = CountedLoss()
    run = train(tmp_path / "run", data=data(), loss=loss)
    assert run.step == 2 and loss.calls >= 2 and 0 <= run.scores["miou"] <= 1
    assert run.load_model().classes == tuple(CLASSES)
    scores = dinoseg.evaluate(run, data=data()["val"], out_dir=tmp_path / "scores", mode={"metrics_only": True})
    assert np.array_equal(scores.confusion, run.scores.confusion)
    assert run.resume(data=data(), loss=loss, trainer={"steps": 3}).step == 3


@pytest.fixture
def files(tmp_path):
    """Write the datasets as files, and return the arguments that open them."""
    for split, dataset in data().items():
        for item in dataset:
            for kind, pixels in (("images", item["image"].movedim(0, -1)), ("masks", item["mask"])):
                save(tmp_path / "data" / split / kind / f"{item['name']}.png", pixels)
    return {"root": tmp_path / "data", "classes": CLASSES}


def assert_same_weights(runs):
    weights = [run.load_model("last").state_dict() for run in runs]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_datasets_train_the_weights_of_the_same_files(files, tmp_path):
    loss = CountedLoss()
    of_files = train(tmp_path / "of_files", data=files, loss=loss, mode=QUICK)
    calls = loss.calls
    of_objects = train(tmp_path / "of_objects", data=data(), loss=loss, mode=QUICK)
    assert_same_weights([of_files, of_objects])
    assert calls >= 2 and loss.calls == 2 * calls
    assert_refused(lambda: dinoseg.evaluate(of_objects, out_dir=tmp_path / "none"), 'lacks data={"val": DATASET}')
    assert_refused(lambda: of_objects.resume(loss=loss), 'lacks data={"train": DATASET}')
    assert_refused(lambda: of_objects.resume(data=data()), "lacks loss=MODULE")


@pytest.mark.heavy
def test_transformed_parts_train_the_weights_of_their_files(files, tmp_path):
    val = dinoseg.open_dataset(**files, split="val")
    shown = dinoseg.open_dataset(**files, transform=dict)
    parts = {"train": torch.utils.data.Subset(shown, [0, 1, 2]), "val": val}
    kinds = {"files": files, "parts": parts}
    assert_same_weights([train(tmp_path / name, data=kind, mode=QUICK) for name, kind in kinds.items()])


class LayeredDiscs(Discs):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "mask": torch.stack([item["mask"] == 0, item["mask"] == 1]).long()}


MULTILABEL = {"task": "multilabel", "loss": "bce"}


@pytest.mark.heavy
def test_datasets_of_layers_train_a_multilabel_model(tmp_path):
    layered = {split: LayeredDiscs(dataset.names) for split, dataset in data().items()}
    run = train(tmp_path / "run", data=layered, mode=QUICK, **MULTILABEL)
    assert run.step == 2 and 0 <= run.scores["accuracy"] <= 1
    assert run.load_model("last").palette[0] == (255, 255, 255)  # instead of black


class OtherClasses(Discs):
    classes = ["ground", "leaf"]


class FloatDiscs(Discs):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "image": item["image"].float() / 255}


def fit(**overrides):
    return lambda: train("run", **{"data": data(), **overrides})


FOLDERS = {"train": "FOLDER/train", "val": "FOLDER/val"}
test_wrong_objects_of_a_training_are_refused = refusals(
    {
        "one dataset": (fit(data=Discs(["a"])), "data is one dataset", "random_split"),
        "no dataset of val": (fit(data={"train": Discs(["a"])}), "lacks data=", '"val": DATASET}'),
        "another split": (
            fit(data=data() | {"valid": Discs(["a"])}),
            "data: valid is not a dataset of a split",
            " train, val, test",
        ),
        "folders": (fit(data=FOLDERS), "data: train is not a dataset of a split", 'data={"root": FOLDER}'),
        "classes": (fit(data=data() | {"val": OtherClasses(["d"])}), "of train is ", "'disc'", " of val ", "'leaf'"),
        "type": (fit(data=data() | {"val": FloatDiscs(["d"])}), "data, val: ", "FloatDiscs: the image of d is float32"),
        "layers": (fit(**MULTILABEL), "data, ", "the mask of ", " int64 (", "Return an integer tensor (2, "),
        "loss": (fit(loss=lambda logits, masks: 0), "is not an object of dinoseg.core.contracts.Loss"),
        "weights": (fit(loss=CountedLoss(), **{"loss.weights": {"disc": 2}}), "loss.weights has no effect"),
        "head": (fit(head=BottleneckHead(3, 1, 2)), "head is an object", "extending.md#head", "create_model"),
    }
)
