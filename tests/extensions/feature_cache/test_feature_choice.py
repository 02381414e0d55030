"""Training on features that are kept: as on the images themselves, without asking the frozen part again."""

import itertools
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from small_trainings import segmenter, train_model, write_pairs
from torch import nn

from dinoseg.data import loader
from dinoseg.data.pairs import dataset as pairs
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Affine, Augment, ColorJitter
from dinoseg.extensions.feature_cache import choice as choice
from dinoseg.extensions.feature_cache.choice import CacheOptions, feature_cache, has_frozen_part, measure_features
from dinoseg.extensions.packed.pack import pack
from dinoseg.extensions.query_heads.pmt import PmtHead
from dinoseg.inference.windows import Whole, Windows
from dinoseg.models.adapters import Frozen, LastBlocks, Lora
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import read
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.optim import adamw, schedule
from dinoseg.utils.images import read_image, write_png

AUGMENT = Augment((24, 33), scale=(0.5, 1.5), affine=Affine(20), flip=0.5, color=ColorJitter(0.2, 0.2))
FROZEN = Frozen()
MEASURED = 1  # forward passes before a training
CPU = torch.device("cpu")


class Upside(Augment):
    def __call__(self, image, mask, rng):
        return tuple(part[::-1].copy() for part in super().__call__(image, mask, rng))


class Inverted(PairDataset):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"image": 255 - sample["image"], "mask": 2 - sample["mask"]}


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "data", [(32, 40), (19, 23), (32, 40), (1, 9), (40, 8)])


@pytest.fixture
def train(data, tmp_path):
    """Return a function that trains for some steps and returns its losses and scores, its feed and its model."""

    def run(cache="off", *, adapter=FROZEN, head=None, seed=0, scale=1.0, steps=6, epochs=None, start=None, **options):
        plain = segmenter(adapter=lambda: adapter)
        torch.manual_seed(seed)
        model = SegmentationModel(plain.backbone, head or LinearHead(24, 1, 3), scale=scale)
        for parameter in model.head.parameters():
            nn.init.normal_(parameter, std=0.1)
        if seed:
            nn.init.normal_(next(model.backbone.parameters()))
        engine = Engine("cpu", "fp32", workers=0, cache=cache)
        share = {"batch_size": 2, "seed": 5, "workers": options.pop("workers", 0), "pictures": 1}
        share |= {"views": options.pop("views", 2), "strategy": options.pop("strategy", None)}
        data_set, augment = options.pop("data", data), options.pop("augment", AUGMENT)
        data_module = ImageDataModule(data_set, data_set, augment, **share)
        options = {"dtype": "float32", **options}
        plan = CacheOptions(tmp_path / "cache", epochs or steps * 2 / 5, "drawing", {}, **options)
        if has_frozen_part(model, engine):
            data_module.cache = feature_cache(data_module, model, engine, plan)
        if epochs:
            return [], data_module, model
        parts = {"engine": engine, "optimizer": adamw(model, lr=0.05, weight_decay=0.0)}
        parts |= {"schedule": schedule("constant"), "start": start and read(start)}
        folder = tmp_path / f"run_{cache}_{steps}_{start}"
        rows = train_model(model, data_module, folder, steps=steps, val_every=3, **parts).rows
        kept = ("step", "train/loss", "train/grad", "val/")  # the others tell of the machine
        rows = [{key: value for key, value in row.items() if key.startswith(kept)} for row in rows]
        return rows, data_module, model

    return run


@pytest.fixture
def counted_images(monkeypatch):
    """Count the images that pass the frozen part."""
    passed = []
    frozen = SegmentationModel.frozen
    monkeypatch.setattr(
        SegmentationModel, "frozen", lambda model, images: passed.append(len(images)) or frozen(model, images)
    )
    return passed


@pytest.mark.parametrize(
    "adapter", [Frozen(), pytest.param(LastBlocks(1), marks=pytest.mark.heavy), Lora(2, 4, blocks=1, dropout=0.3)]
)
def test_training_on_features_is_training_on_images(train, adapter, monkeypatch, tmp_path):
    live = train(adapter=adapter)[0]
    assert train("disk", adapter=adapter)[0] == live
    if isinstance(adapter, Lora):  # the place is none of the adapter's business
        assert train("memory", adapter=adapter)[0] == live
    assert len(list((tmp_path / "cache/features").iterdir())) == 1  # nothing of what was measured
    opened = []
    read_pair = pairs.read_pair
    monkeypatch.setattr(pairs, "read_pair", lambda pair, reader: opened.append(pair.name) or read_pair(pair, reader))
    assert train("disk", adapter=adapter)[0] == live
    assert opened == ["0"] * 4  # what is measured, the size of the validation images, and the picture of each of two


def test_checked_crops_are_cached_and_known_by_their_masks(train, data, counted_images):
    checked = Augment((12, 11), scale=(0.8, 1.5), flip=0.5, cat_max_ratio=0.4)
    live = train(augment=checked)[0]
    assert train("disk", augment=checked)[0] == live
    counted_images.clear()
    assert train("disk", augment=checked)[0] == live and sum(counted_images) == MEASURED
    for pair in data.pairs[:2]:  # other labels may move the crops
        write_png(pair.mask, np.eye(*read_image(pair.mask).shape[:2], dtype=np.uint8))
    live = train(augment=checked)[0]
    counted_images.clear()
    assert train("disk", augment=checked)[0] == live and MEASURED < sum(counted_images) < MEASURED + 10


def test_views_are_computed_and_their_masks_decoded_once(train, counted_images, monkeypatch):
    train("disk", steps=9)
    assert sum(counted_images) == MEASURED + 10 + 5  # two views of each of five images, and these as they are
    decoded = []
    mask = PairDataset.mask
    with monkeypatch.context() as patch:
        patch.setattr(PairDataset, "mask", lambda data, index: decoded.append(index) or mask(data, index))
        counted_images.clear()
        train("disk", steps=12)
    assert sum(counted_images) == MEASURED and sorted(decoded) == sorted([*range(5)] * 3)
    counted_images.clear()
    train("disk", steps=9, views=3)
    assert sum(counted_images) == MEASURED + 5  # the third view of each


def test_cached_views_are_read_in_the_main_process(train, monkeypatch):
    loaded = []
    start = loader.WorkerIterator
    monkeypatch.setattr(loader, "WorkerIterator", lambda made: loaded.append(made.num_workers) or start(made))
    live_rows, live, _ = train(steps=9)
    expected = [batch.names for batch in itertools.islice(live.train_batches(1), 8)]
    rows, data_module, _ = train("disk", workers=2, steps=9)
    assert rows == live_rows
    assert loaded == [2, 2]  # 6 batches hold both views of all, with a validation; later ones are read here
    train("memory", workers=2, steps=1)
    assert loaded == [2, 2]  # another process would see nothing of the cache in memory
    monkeypatch.setattr(PairDataset, "mask", lambda *_: pytest.fail("a mask is decoded once more"))
    assert [batch.names for batch in itertools.islice(data_module.train_batches(1), 8)] == expected


def test_resumed_run_equals_an_uninterrupted_one(train, tmp_path):
    whole, _, model = train("disk")
    first = train("disk", steps=3)[0]
    later, _, resumed = train("disk", start=tmp_path / "run_disk_3_None/last.safetensors")
    assert first + later == whole or later == whole[-len(later) :]
    for one, other in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("other", "told"), [({"seed": 1}, "weights"), pytest.param({"scale": 2.0}, "sizes", marks=pytest.mark.heavy)]
)
def test_features_of_other_weights_or_preprocessing_are_not_used(train, counted_images, caplog, other, told):
    train("disk", steps=3)
    counted_images.clear()
    with caplog.at_level(logging.INFO):
        rows = train("disk", steps=3, **other)[0]
    assert sum(counted_images) == 1 + 6 + 5 and f"with other {told}:" in caplog.text
    assert rows == train(steps=3, **other)[0]


@pytest.fixture
def folder(tmp_path):
    """Return a function that gives the folder for the features of a model and its settings."""

    def folder_of(*, augment=AUGMENT, head=LinearHead, longest=None, blocks=0, parts=(), dtype="float16", **other):
        plain = segmenter(adapter=lambda: LastBlocks(blocks) if blocks else FROZEN)
        settings = {"compile": False, "precision": "fp32", "tf32": False, "device": CPU, **other}
        model = SegmentationModel(plain.backbone, head(24, 1, 3), longest=longest)
        plan = CacheOptions(tmp_path, 1.0, "", {"backbone": "b", "head": "h", **dict(parts)}, dtype=dtype)
        views = SimpleNamespace(augment=augment)
        return choice._open_store(False, views, model, SimpleNamespace(**settings), plan).folder

    return folder_of


@pytest.mark.parametrize(
    "change",
    [
        *({"compile": True}, {"precision": "bf16"}, {"tf32": True}, {"device": torch.device("meta")}),
        *({"dtype": "int8"}, {"longest": 9}, {"augment": Upside((24, 33))}, {"blocks": 1}),
        {"parts": {"backbone": "other"}},
    ],
)
def test_features_of_other_settings_have_their_own_folder(change, folder):
    assert folder() == folder() != folder(**change)


def test_where_a_backbone_is_cut_counts(folder, monkeypatch):
    whole = folder()
    monkeypatch.setattr(TransformersVit, "first_trained", 1)
    assert folder() != whole


def test_head_settings_count_only_for_features_of_the_head(folder):
    class Cut(LinearHead):
        def forward_frozen(self, backbone, images):
            return super().forward_frozen(backbone, images)

    other = {"parts": {"head": "other"}}
    assert folder() == folder(**other)
    assert len({folder(), folder(head=Cut), folder(head=Cut, **other)}) == 3


def test_unused_views_are_not_counted_in_the_cache_size(train, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(choice, "in_bytes", str)
    for epochs in (0.5, 3.5):
        assert train("disk", views=4, epochs=epochs)[2].training
    assert not (tmp_path / "cache/features").exists()
    told = [int(size) for message in caplog.messages for size in re.findall(r"take about (\d+) as", message)]
    assert told[0] < told[1]  # one view of each, and all four


@pytest.mark.parametrize("training", [True, False])
def test_measuring_features_keeps_the_mode_of_the_model(train, training):
    _, data_module, model = train("off", epochs=2)
    measure_features(data_module, model.train(training), Engine("cpu", "fp32", workers=0), "float32")
    assert model.training == model.head.training == training


def test_image_predicted_in_windows_is_read_by_its_own_index(data):
    strategy = SimpleNamespace(is_single_pass=lambda model, size, autocast: size != (1, 9))
    share = {"batch_size": 2, "seed": 0, "workers": 0, "strategy": strategy, "rank": 1, "world_size": 2}
    views = [SimpleNamespace(size=size) for size in ((19, 23), (1, 9))]
    cache = SimpleNamespace(eval_batches=lambda *_, **__: iter(views))
    data_module = ImageDataModule(data, data, AUGMENT, **share)
    whole, read = data_module._cached_batches(cache, None, SimpleNamespace(autocast=None))
    assert whole is views[0] and read.names == ["3"]


def test_ranks_of_a_machine_share_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "free_bytes", lambda device: 1200)
    plan = CacheOptions(tmp_path, 1.0, "", {})
    assert [choice._memory_room(plan, SimpleNamespace(world_size=world_size)) for world_size in (1, 3)] == [600, 200]


def test_masks_go_with_images_that_a_class_of_ones_own_changes(train, data):
    inverted = Inverted(data.pairs, data.reader.labels, data.reader.masks)
    train("disk", views=1, steps=5)
    for options in ({"augment": Upside((24, 33), flip=0.5)}, {"data": inverted}):
        live = train(views=1, steps=5, **options)[0]
        assert train("disk", views=1, steps=5, **options)[0] == live


def test_concurrent_trainings_share_the_cache(train, counted_images):
    feeds = [train("disk", epochs=9)[1] for _ in range(2)]
    counted_images.clear()
    for ours, theirs in itertools.islice(zip(*(data_module.train_batches(0) for data_module in feeds), strict=True), 5):
        assert torch.equal(ours.to(CPU).image.tensors[0], theirs.to(CPU).image.tensors[0])
    assert sum(counted_images) == 10  # by one of the two
    assert not any(view.features is None for view in next(feeds[0].train_batches(0)).views)


def test_heads_of_the_same_maps_share_the_cache(train, counted_images):
    train("disk")
    counted_images.clear()
    train("disk", head=MlpHead(24, 1, 3, 8))
    assert sum(counted_images) == MEASURED


@pytest.mark.parametrize("names", [("maps", "tokens"), ("tokens", "maps")])
def test_heads_of_maps_and_of_tokens_share_the_cache(train, counted_images, names):
    heads = {"maps": lambda: LinearHead(24, 1, 3), "tokens": lambda: PmtHead(24, 1, 3, patch_size=8, blocks=1)}
    train("disk", head=heads[names[0]]())
    counted_images.clear()
    cached, *_ = train("disk", head=heads[names[1]]())
    assert sum(counted_images) == MEASURED
    assert cached == train(head=heads[names[1]]())[0]


def test_remedy_for_slow_loading_depends_on_the_source(train, data, tmp_path):
    _, live, _ = train(epochs=2, workers=2)
    assert live.remedy.startswith("Decode images only once (data.cache=packed). If cores are idle, use more")
    _, kept, _ = train("disk", epochs=2, workers=2)
    assert kept.remedy.startswith("Features are cached: ") and "packed" not in kept.remedy
    assert kept.remedy.endswith("use more loading processes (engine.workers is 2).")
    _, kept, _ = train("memory", epochs=2, workers=2)
    assert kept.remedy.startswith("Features are cached in memory: ") and "disk" not in kept.remedy
    live.train = pack(data, cache_dir=tmp_path, workers=1)
    assert "Images are packed: " in live.remedy and "resolution.longest" in live.remedy


@pytest.mark.parametrize("adapter", [FROZEN, pytest.param(LastBlocks(1), marks=pytest.mark.heavy)])
def test_detail_head_trains_from_cached_features_as_live(train, counted_images, adapter):
    def rows(cache="off"):
        torch.manual_seed(1)
        head = DetailHead(24, 1, 3, patch_size=8, fine=4, width=8, jitter=0.3, linear_skip=True)
        return train(cache, head=head, adapter=adapter, steps=3)[0]

    live = rows()
    for _ in range(2):
        counted_images.clear()
        assert rows("disk") == live
    assert len(counted_images) == MEASURED, "the second one reads what the first has kept"


def test_rounded_features_train_nearly_the_same(train):
    live, kept = (train(*options, steps=1)[0][0]["train/loss"] for options in ((), ("memory",)))
    assert live == kept
    for dtype, error in (("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 2e-2)):
        rounded = train("memory", dtype=dtype, steps=1)[0][0]["train/loss"]
        assert rounded == pytest.approx(live, rel=error) and rounded != live, dtype


def test_images_in_windows_are_not_validated_by_features(train, counted_images):
    windows = {"strategy": Windows(16)}
    live = train(**windows)[0]
    counted_images.clear()
    assert train("memory", **windows)[0] == live
    assert sum(counted_images) == 1 + 10
    assert not Whole(flips="horizontal").is_single_pass(None, (1, 1), None)
    assert Whole().is_single_pass(None, (1, 1), None)


def test_batches_are_halved_where_memory_is_short(train):
    _, data_module, _ = train("memory", epochs=2)
    views = next(data_module.train_batches(0))
    views.views.append(views.views[0])
    parts = [part.names for part in views.split(2)]
    assert [len(part) for part in parts] == [2, 1] and sum(parts, []) == views.names


def test_auto_explains_why_it_trains_on_images(train, caplog):
    def explain(**options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert train("auto", **options)[1].cache is None
        return caplog.text

    assert "data.views=4 to cache 4 fixed augmentations" in explain(views=None, epochs=9)
    assert "adapter.blocks=4" in explain(adapter=Lora(2, 4), epochs=9)
    assert "repeat no view" in explain(epochs=2.0)


def test_resumed_run_preserves_its_cache_choice_unless_changed(train, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for previous in ("disk", "memory"):
        assert train("auto", epochs=20, previous=previous)[1].cache.place == previous
        assert "Feature cache: on (engine.cache=auto), in" in caplog.text
        assert "as at the start of this run" in caplog.text
        caplog.clear()
    assert train("disk", epochs=20, previous="off")[1].cache.place == "disk" and "at the start" not in caplog.text
    for previous in (None, "elsewhere"):  # unknown, or of a file that somebody has written: the rule decides
        assert train("auto", epochs=20, previous=previous)[1].cache.place == "memory"
        assert "at the start" not in caplog.text
    monkeypatch.setattr(choice, "measure_features", lambda *_: pytest.fail("what is known is measured"))
    assert train("auto", epochs=20, previous="off")[1].cache is None
    assert "This run started without a cache: set engine.cache=disk or memory to use one." in caplog.text


@pytest.mark.parametrize(("memory", "disk", "place"), [(10**6, 10**6, "memory"), (10, 10**6, "disk"), (10, 10, None)])
def test_auto_caches_in_memory_or_else_on_disk(train, monkeypatch, caplog, memory, disk, place):
    monkeypatch.setattr(choice, "free_bytes", lambda _: memory)
    monkeypatch.setattr(choice.DiskStore, "room", lambda _: disk)
    with caplog.at_level(logging.INFO):
        _, data_module, _ = train("auto", epochs=20)
    assert (data_module.cache and data_module.cache.place) == place
    (line,) = (line for line in caplog.messages if line.startswith("Feature cache: "))
    assert "engine.cache=auto" in line and "as float32" in line
    assert place or "MiB are free in memory and 0.0 MiB in files" in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cache": "disk", "views": None}, "engine.cache=disk: Random augmentation makes every view unique"),
        ({"cache": "memory", "adapter": Lora(2, 4)}, "engine.cache=memory: The first block is trained"),
        ({"cache": "disk", "dtype": "int4"}, "features.dtype=int4 is unknown"),
    ],
)
def test_impossible_cache_is_refused(train, options, told):
    assert_refused(lambda: train(**options), told)
