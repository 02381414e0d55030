"""Maps of samples reach the loss in each way that a batch takes."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import Pictures
from mapped import KINDS, MappedLoss, MappedPictures, check_twins, maps_of
from mistakes import assert_refused
from small_trainings import SHORT, segmenter, train_model, write_pairs

from dinoseg.core.sample_maps import DistanceMap, LabelMap, check_needed_maps
from dinoseg.core.shapes import Batch, join_batches
from dinoseg.data.custom import CustomDataset
from dinoseg.data.transforms import Affine, Augment
from dinoseg.extensions.auto.random_batch import random_batch
from dinoseg.extensions.distillation.distil import DistilledLoss, Part, ScoredBatch
from dinoseg.extensions.distillation.loss import TeacherView
from dinoseg.extensions.feature_cache.choice import CacheOptions, feature_cache
from dinoseg.extensions.packed.pack import pack
from dinoseg.inference.windows import Windows
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.models.adapters import Frozen, Full
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.optim import parameter_groups, schedule
from dinoseg.training.validation import evaluate

MLP = partial(MlpHead, 24, 1, 3, 8)


def pictures(count=6):
    return CustomDataset(MappedPictures([(24, 32)] * count))


class Cramped(MappedLoss):
    """A machine that holds two images."""

    def forward(self, prediction, batch):
        if len(batch.names) > 2:
            raise RuntimeError(SHORT)
        return super().forward(prediction, batch)


def train(folder, *, data=None, cache="off", adapter=Frozen, accumulate=1, loss=MappedLoss, steps=4):
    """Train with plain SGD; return losses, the gradient norms and the scores of validation."""
    engine = Engine("cpu", "fp32", workers=0, cache=cache)
    model = engine.place(segmenter(MLP, adapter))
    augment = Augment((16, 24), scale=(0.5, 2), affine=Affine(30, 0.2), flip=0.5)
    order = {"batch_size": 4, "seed": 0, "workers": 0, "rank": engine.rank, "world_size": engine.world_size}
    train = data or pictures()
    data_module = ImageDataModule(train, train, augment, **order, views=2)
    plan = CacheOptions(folder / "cache", 9.0, "", {}, dtype="float32")
    data_module.cache = feature_cache(data_module, model, engine, plan)
    assert (data_module.cache is None) == (cache == "off")
    parts = {"engine": engine, "loss": loss(), "schedule": schedule("constant"), "writes": engine.is_main}
    parts["optimizer"] = torch.optim.SGD(parameter_groups(model, lr=0.01, weight_decay=0.0))
    settings = {"steps": steps, "val_every": steps, "clip": None, "score": "loss", "accumulate": accumulate}
    done = train_model(model, data_module, folder, **parts, **settings)
    assert done.loss.batches >= steps
    names = ("train/loss", "train/gradient_norm", "val/loss")
    return [row[name] for row in done.rows for name in names if name in row]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_cached_features_come_with_the_maps_of_their_views(tmp_path, place):
    first = train(tmp_path, cache=place)
    again = train(tmp_path, cache=place)  # from disk, all features are read
    assert first == again == pytest.approx(train(tmp_path / "images"), rel=1e-4)


def test_windows_of_a_validation_have_their_part_of_the_maps():
    for strategy in (Windows((16, 24), overlap=0.5), Windows((16, 24), overlap=0.5, shortest=30)):
        loss = MappedLoss()
        engine = Engine("cpu", "fp32", workers=0, eval_batch_size=2)
        evaluate(segmenter(MLP).eval(), pictures(3), engine, strategy=strategy, loss=loss)
        assert loss.batches > 6


def test_distances_in_windows_grow_with_the_resized_image():
    loss = MappedLoss()
    engine = Engine("cpu", "fp32", workers=0)
    seen = []
    loss.register_forward_pre_hook(lambda _, given: seen.append(given[1].maps["distance"]))
    evaluate(
        segmenter(MLP).eval(), pictures(1), engine, strategy=Windows((32, 48), shortest=48, overlap=0.5), loss=loss
    )
    rows = torch.arange(16.0, 48.0)  # of the last window
    assert len(seen) == 4 and seen[-1].shape == (1, 32, 48)
    torch.testing.assert_close(seen[-1][0, :-1, 5], (2 * ((rows + 0.5) / 2 - 0.5 - 7.5))[:-1])


def test_batches_that_are_split_keep_their_maps(tmp_path):
    data = pictures(5)
    batch = Batch.stack([data[index] for index in range(5)])
    parts = batch.split(3)
    assert [part.names for part in parts] == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    joined = join_batches(parts)
    for part in [*parts, joined]:
        check_twins(part)
    assert all(torch.equal(joined.maps[name], values) for name, values in batch.maps.items())
    assert train(tmp_path, loss=Cramped, adapter=Full, steps=2) == pytest.approx(
        train(tmp_path, adapter=Full, steps=2), rel=1e-4
    )


def test_distilled_batches_have_maps_of_both_kinds_of_images():
    def part(first):
        data = pictures(first + 2)
        view = TeacherView.of(torch.zeros(3, 1, 1), (1.0, 1.0), np.eye(3), (24, 32))
        return Part(Batch.stack([data[index] for index in range(first, first + 2)]), [lambda: view] * 2)

    batch = ScoredBatch([part(0), part(3)]).to(torch.device("cpu"))
    assert batch.maps["values"].shape == (4, 2, 24, 32) and batch.count == 4
    for each in (batch, batch.with_masks):
        check_twins(each)
    assert batch.with_masks.names == ["p0", "p1"]
    assert DistilledLoss(MappedLoss()).divisors(batch).shape == (3,)


def test_packed_files_train_as_files_do(tmp_path):
    files = write_pairs(tmp_path, [(24, 32)] * 6).with_maps(KINDS, maps_of)
    packed = pack(files, cache_dir=tmp_path / "packed", workers=1)
    assert train(tmp_path / "a", data=packed) == train(tmp_path / "b", data=files)
    assert train(tmp_path / "c", data=packed, cache="disk") == train(tmp_path / "d", data=files, cache="memory")


def test_estimates_use_random_maps_of_the_loss():
    parts = {"shape": (3, 8, 12), "crop": (8, 12), "has_masks": True, "num_classes": 3, "loss": MappedLoss}
    parts = SimpleNamespace(**parts, has_layers=False)
    shapes = {name: values.shape for name, values in random_batch(parts, 2).maps.items()}
    assert shapes == {**dict.fromkeys(("twin", "ids", "distance"), (2, 8, 12)), "values": (2, 2, 8, 12)}
    parts.has_layers = True
    layers = random_batch(parts, 2).mask
    assert layers.shape == (2, 3, 8, 12) and layers.max() == 1


class Turned(Augment):
    """Changes the geometry in a way of its own."""

    def __call__(self, image, mask, rng):
        return image[::-1].copy(), mask[::-1].copy()


def test_augmentations_that_cannot_move_maps_are_refused():
    module = partial(ImageDataModule, batch_size=2, seed=0, workers=0)
    mapped = pictures()
    plain = CustomDataset(Pictures([(24, 32)] * 2))
    for augment in (Turned((24, 32)), lambda image, mask, rng: (image, mask)):
        words = ("data.augment, a ", "cannot move the maps", "override `maps`")
        assert_refused(lambda augment=augment: module(mapped, mapped, augment), *words)
        batch = next(module(plain, plain, augment).train_batches(0))
        assert batch.maps == {} and batch.image.shape == (2, 3, 24, 32)
    sheared = Augment((24, 32), affine=Affine(shear=3))
    assert_refused(lambda: module(mapped, mapped, sheared), "data.augment.affine.shear=3", "map distance")
    assert_refused(lambda: module(mapped, plain, Augment((24, 32))), "the same maps for each split")


def test_a_dataset_without_the_maps_of_a_loss_is_refused():
    terms = {"ce": partial(CrossEntropy, torch.ones(3)), "mapped": MappedLoss}
    needed = WeightedSum(terms, dict.fromkeys(terms, 1.0), torch.ones(3)).needs_maps
    assert needed == KINDS
    check_needed_maps(needed, KINDS, "loss=mapped", "data=own")
    check = partial(check_needed_maps, {"d": DistanceMap()}, loss="loss=mapped", data="data=own")
    check({"d": DistanceMap(fill=3.0)})
    for wrong in ({}, {"d": LabelMap()}, {"d": DistanceMap(layers=2)}):
        assert_refused(partial(check, wrong), "loss=mapped reads the map d, DistanceMap", "data=own declares")
