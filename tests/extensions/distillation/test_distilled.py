"""Scores of whole images follow each view, are kept as they are used, and go with their samples."""

from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import assert_refused

from dinoseg.core.shapes import Batch, FeatureBatch, FrozenFeatures, Prediction
from dinoseg.data.loader import TrainViews
from dinoseg.data.transforms import Affine, Augment
from dinoseg.extensions.distillation.distil import (
    CachedScores,
    DistillationDataModule,
    DistilledLoss,
    Part,
    ScoredBatch,
)
from dinoseg.extensions.distillation.loss import TeacherView, divergence
from dinoseg.extensions.feature_cache.form import to_bytes
from dinoseg.extensions.feature_cache.store import DiskStore, MemoryStore
from dinoseg.extensions.feature_cache.unlabelled import Unmasked
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.images import write_png

CPU = torch.device("cpu")


class Ramps:
    """Images in which the pixels say where they lie, and masks of two classes."""

    classes = ["a", "b"]
    palette = [(0, 0, 0), (9, 9, 9)]
    ignore_index = 255
    names = ["0", "1"]
    skipped = {}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        across, down = np.meshgrid(np.arange(80 - 8 * index), np.arange(60))
        image = np.stack([3 * across, 4 * down, np.full_like(down, index)]).astype(np.uint8)
        mask = ((across // 9 + down // 7) % 5 == 0).astype(np.uint8)
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "name": str(index)}


def where(image):
    """Return scores (2, h, w), cells of 2 px, that say where a cell lies: x and y."""
    scores = image[:2].float().unflatten(1, (-1, 2)).mean(2).unflatten(2, (-1, 2)).mean(3)
    return scores, (1.0, 1.0)


def in_memory():
    return MemoryStore("float32", 0)


def views(cat_max_ratio=None):
    augment = Augment((24, 20), scale=(0.8, 2), affine=Affine(degrees=15), flip=0.5, cat_max_ratio=cat_max_ratio)
    return TrainViews(Ramps(), augment, 3)


@pytest.mark.parametrize("ratio", [None, 0.7])
def test_scores_of_a_view_are_those_of_the_pixels_that_it_shows(ratio):
    drawn = views(ratio)
    kept = CachedScores(where, in_memory(), 2)
    for epoch, sample in ((0, 0), (0, 1), (5, 1)):
        view = drawn.read(epoch, sample)
        seen = kept.look(drawn, epoch, sample).to(CPU)
        scores = seen.at(slice(0, 24), slice(0, 20))
        inside = (view["mask"] != 255) & (view["image"][:2] > 12).all(0) & (view["image"][:2] < 215).all(0)
        assert inside.sum() > 40 and (scores[:, inside] - view["image"][:2, inside]).abs().max() < 1.5
        assert ((view["mask"] != 255) != seen.inside((24, 20))).float().mean() < 0.03  # but for the border itself


def test_each_image_of_a_batch_comes_with_its_own_scores(tmp_path):
    """Of either kind, in any share of a batch, from any batch on."""
    augment = Augment((24, 20), scale=(1, 2), flip=0.5)
    for index in range(2):
        write_png(tmp_path / f"{index}.png", Ramps()[index]["image"].permute(1, 2, 0).numpy())
    others = Unmasked(["u0", "u1"], [tmp_path / "0.png", tmp_path / "1.png"], Ramps())
    for rank in range(2):
        own = {"augment": augment, "batch_size": 2, "seed": 4, "workers": 0, "rank": rank, "world_size": 2}
        without = ImageDataModule(others, Ramps(), **own)
        scores = CachedScores(where, in_memory(), 2)
        data_module = DistillationDataModule(Ramps(), Ramps(), **own, scores=scores, others=without, views=3)
        for drawn in islice(data_module.train_batches(start=3), 4):
            batch = drawn.to(CPU)
            assert len(batch.seen) == batch.count == 2 and batch.labelled == 1 and batch.names[1][0] == "u"
            assert (batch.mask[1] == 255).all() and (batch.mask[0] != 255).any()
            for image, seen in zip(batch.image, batch.seen, strict=True):
                shown = (image[:2] > 12).all(0) & (image[:2] < 215).all(0) & seen.inside((24, 20))
                far = (seen.at(slice(0, 24), slice(0, 20)) - image[:2]).abs().amax(0)
                assert shown.sum() > 40 and far[shown].median() < 1.5


def test_teacher_scores_are_computed_once_and_then_cached(tmp_path):
    asked = []

    def ask(image):
        asked.append(image)
        return where(image)[0] / 3, (1.0, 0.75)

    drawn = views()
    store = DiskStore(tmp_path, "o", "float16")
    first = CachedScores(ask, store, 2).look(drawn, 0, 1)
    again = CachedScores(ask, DiskStore(tmp_path, "o", "float16"), 2).look(drawn, 0, 1)
    assert len(asked) == 1 and first.scores.dtype == again.scores.dtype == torch.float16
    assert torch.equal(first.scores, again.scores) and torch.equal(first.place, again.place)
    assert first.valid == again.valid == (1.0, 0.75)
    (path,) = (tmp_path / "o").glob("*.features")
    half = torch.zeros(2, 4, 4).half()
    for scores, facts in (  # of other shapes, or facts that are none
        (torch.zeros(3, 4, 4).half(), [60, 72, 1, 1]),
        (torch.zeros(2, 4).half(), [60, 72, 1, 1]),
        (half, [60, 0, 1, 1]),
        (half, [60, 72, 1, 1.5]),
        (half, [60, 72, 0, 1]),
        (half, [60, 2.0**24 + 1, 1, 1]),
        (half, [60, 72, 1]),
        (half, None),
        (None, None),
    ):
        parts = [] if facts is None else [torch.tensor(facts, dtype=torch.float64).view(torch.uint8)]
        damaged = path.read_bytes()[:-3] if scores is None else to_bytes(path.stem, [scores, *parts])
        path.write_bytes(damaged)
        count = len(asked)
        anew = CachedScores(ask, DiskStore(tmp_path, "o", "float16"), 2).look(drawn, 0, 1)
        assert len(asked) == count + 1 and torch.equal(anew.scores, first.scores)


def test_scores_above_the_memory_limit_are_refused_by_image_name():
    kept = CachedScores(lambda image: (torch.zeros(2, 1, 1).expand(2, 2**14, 2**14), (1.0, 1.0)), in_memory(), 2)
    words = "scores of 1 are 2 x 16384 x 16384 numbers, 2048 MiB, above the limit of 1024"
    assert_refused(lambda: kept.look(views(), 0, 1), words)


def batch_of(count, first, features=False):
    draw = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (count, 3, 6, 5), generator=draw).to(torch.uint8)
    masks = torch.randint(0, 2, (count, 6, 5), generator=draw).to(torch.uint8)
    numbers = range(first, first + count)
    names = [str(number) for number in numbers]
    scores = [torch.full((2, 1, 1), 1.0 * number) for number in numbers]
    looks = [partial(TeacherView.of, each, (1.0, 1.0), np.eye(3), (6, 5)) for each in scores]
    if features:
        frozen = FrozenFeatures([images.float(), images.flatten(2)], (6, 5), (12, 10))
        ready = FeatureBatch(frozen, masks, names)
        return Part(SimpleNamespace(names=names, to=lambda device: ready), looks)
    return Part(Batch(images, masks, names), looks)


@pytest.mark.parametrize("counts", [(3, 5), (5, 3)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_each_sample_has_its_own_scores_in_any_split_of_a_batch(parts, counts):
    whole = ScoredBatch([batch_of(counts[0], 0), batch_of(counts[1], 10)])
    assert len(whole.names) == 3  # in more parts than these a batch would have some without one kind
    names = []
    for part in whole.split(parts):
        batch = part.to(CPU)
        assert [int(seen.scores.max()) for seen in batch.seen] == [int(name) for name in batch.names]
        assert batch.with_masks.names == batch.names[: batch.labelled] and batch.count == len(batch.names)
        assert all((int(name) < 10) == (place < batch.labelled) for place, name in enumerate(batch.names))
        without = sum(int(name) >= 10 for name in batch.names)
        assert len(batch.image) == len(batch.mask) == len(batch.with_masks.mask) + without
        names += batch.names
    assert sorted(map(int, names)) == [*range(counts[0]), *range(10, 10 + counts[1])]


def test_frozen_features_are_joined_like_images():
    batch = ScoredBatch([batch_of(1, 0, features=True), batch_of(2, 10, features=True)]).to(CPU)
    assert [len(part) for part in batch.image.tensors] == [3, 3] and batch.image.seen == (12, 10)
    assert [len(part) for part in batch.with_masks.image.tensors] == [1, 1]


@pytest.fixture
def predicted():
    """Return a prediction for a batch with two labelled images and one without labels, and the batch."""
    batch = ScoredBatch([batch_of(2, 0), batch_of(1, 10)]).to(CPU)
    grid = torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    return Prediction(grid, (6, 5), (1.0, 1.0), lambda *_: grid, grid=grid), batch


def test_distilled_loss_adds_weighted_divergence_on_all_images(predicted):
    prediction, batch = predicted
    criterion = CrossEntropy(torch.ones(2))
    value, parts = DistilledLoss(criterion, 0.5, 2.0)(prediction, batch)
    own, _ = criterion(prediction.of_images(slice(0, 2)), batch.with_masks)
    with_labels = divergence(prediction, batch.seen, (6, 5), 2.0)
    assert value.item() == pytest.approx(own.item() + 0.5 * with_labels.item()) and parts["teacher"] == with_labels
    plain = Batch(batch.image, batch.mask, batch.names)  # of a validation
    assert DistilledLoss(criterion)(prediction, plain)[0] == criterion(prediction, plain)[0]


def test_fully_ignored_batch_still_learns_from_the_teacher(predicted):
    prediction, batch = predicted
    batch.mask[:] = 255
    loss = DistilledLoss(CrossEntropy(torch.ones(2)))
    value, parts = loss(prediction, batch)
    assert value == parts["teacher"] > 0
    part, alone, _ = loss.step_loss(prediction, batch, torch.tensor([0.0, 6.0]))
    assert alone == value and part.item() == pytest.approx(value.item() / 2)
    assert DistilledLoss(CrossEntropy(torch.ones(2)), 0.0)(prediction, batch)[1]["weight"] == 0


def test_distilled_loss_has_the_requirements_of_its_mask_loss():
    plain, sums = CrossEntropy(torch.ones(2)), CrossEntropy(torch.ones(2))
    sums.needs, sums.sums_over_batch = frozenset({"masks"}), True
    for own in (plain, sums):
        loss = DistilledLoss(own)
        assert (loss.needs, loss.sums_over_batch) == (own.needs, own.sums_over_batch)


def test_views_without_a_place_are_refused():
    class Other(Augment):
        def __call__(self, image, mask, rng):
            return image, mask

    module = partial(DistillationDataModule, Ramps(), Ramps(), batch_size=1, seed=0, workers=0)
    scores = CachedScores(where, in_memory(), 2)
    for augment in (Other((4, 4)), lambda image, mask, rng: (image, mask)):
        refuse = partial(module, augment, scores=scores)
        assert_refused(refuse, "does not return the position of a view in its image")
