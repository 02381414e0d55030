"""Samples that are drawn for a class: which, of what image, and a crop that shows a pixel of it."""

import itertools
import logging
import math
from collections import Counter

import numpy as np
import pytest
import torch
from making import Pictures, save, train_batches

from dinoseg.data.class_uniform import class_uniform
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.packed.pack import pack
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.train_views import ClassUniform, TrainViews
from dinoseg.data.transforms import Affine, Augment
from dinoseg.utils.errors import UserError

CLASSES = ["road", "pole", "sign", "train"]
SIZE = (40, 60)
AUGMENT = Augment((8, 12), scale=(0.4, 1.6), affine=Affine(30, 0.3, 10), flip=0.5)


def masks():
    """Return six masks of road: a pole of one pixel in one, a sign in two, void in one, which has nothing else."""
    ids = np.zeros((6, *SIZE), dtype=np.uint8)
    ids[1, 33, 58] = 1
    ids[2, 5:9, 3:9] = 2
    ids[4, 30:, 50:] = 2
    ids[5] = 255
    return ids


@pytest.fixture
def data(tmp_path):
    pairs = []
    for number, mask in enumerate(masks()):
        image = np.random.default_rng(number).integers(0, 256, (*SIZE, 3))
        paths = save(tmp_path / f"{number}.png", image), save(tmp_path / f"mask_{number}.png", mask)
        pairs.append(Pair(str(number), *paths))
    return PairDataset(pairs, Labels(CLASSES, [(0, 0, 0)] * 4, 255), Masks())


def test_classes_are_looked_up_in_every_mask_and_absent_ones_told(data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = class_uniform(data, 0.5, cache_dir=tmp_path)
    assert {id: images.tolist() for id, images in found.images.items()} == {0: [0, 1, 2, 3, 4], 1: [1], 2: [2, 4]}
    assert len(found.digests) == 6 and len(set(found.digests)) == 5  # two masks are the same
    assert "no training mask has a pixel of train" in caplog.text and "sign" not in caplog.text
    void = PairDataset(data.pairs, Labels(CLASSES, [(0, 0, 0)] * 4, 2), Masks())  # a class that is not labelled
    assert class_uniform(void, 0.5, cache_dir=tmp_path).images.keys() == {0, 1}
    packed = class_uniform(pack(data, cache_dir=tmp_path, longest=10, workers=1), 0.5, cache_dir=tmp_path)
    assert packed.digests == found.digests and packed.images.keys() == found.images.keys()


def test_data_that_is_no_pairs_of_files_is_read():
    found = class_uniform(Pictures([(4, 5)] * 3), 1.0, cache_dir="unused")
    assert {id: images.tolist() for id, images in found.images.items()} == dict.fromkeys(range(3), [0, 1, 2])
    assert len(set(found.digests)) == 3


def test_nothing_labelled_is_refused(data, tmp_path):
    void = data.keep(["5"])
    with pytest.raises(UserError, match=r"data.class_uniform=0.5: no training mask has a pixel of a class.*=0\."):
        class_uniform(void, 0.5, cache_dir=tmp_path)


def test_a_share_is_drawn_evenly_over_classes_then_over_their_images(data, tmp_path):
    found = class_uniform(data, 0.25, cache_dir=tmp_path)
    drawn = TrainViews(data, AUGMENT, 3, uniform=found)
    draws = [drawn.draw(epoch, sample) for epoch in range(500) for sample in range(6)]
    aimed = [draw for draw in draws if draw.shown]
    assert len(aimed) / len(draws) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / len(draws)))
    for id, count in Counter(draw.shown for draw in aimed).items():
        assert count / len(aimed) == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / len(aimed))), id
    images = Counter(draw.image for draw in aimed if draw.shown == (2,))
    assert images.keys() == {2, 4} and images[2] / images.total() == pytest.approx(0.5, abs=0.15)
    others = [(draw.image, sample % 6) for sample, draw in enumerate(draws) if not draw.shown]
    assert all(image == sample for image, sample in others)
    plain = TrainViews(data, AUGMENT, 3)
    for sample, draw in enumerate(draws[:30]):  # the other samples are those of a training without
        if not draw.shown:
            first, second = drawn.read(*divmod(sample, 6)), plain.read(*divmod(sample, 6))
            assert torch.equal(first["image"], second["image"]) and torch.equal(first["mask"], second["mask"])


@pytest.mark.parametrize(
    ("crop", "longest"),
    [((8, 12), None), ((1, 1), 45), ((40, 60), None), ((70, 20), 70), ((40, 45), 45), ((90, 20), None)],
)
@pytest.mark.parametrize("affine", [Affine(), Affine(180, 0.9, 45)])
def test_the_crop_shows_a_pixel_of_the_class(crop, affine, longest):
    for scale in ((1, 1), (0.3, 0.5), (0.5, 3)):
        augment = Augment(crop, scale=scale, longest=longest, affine=affine, flip=0.5)
        for seed, (image, id) in itertools.product(range(6), ((1, 1), (2, 2), (4, 2), (0, 0))):
            chance, again = (np.random.default_rng(seed) for _ in range(2))
            mask = masks()[image]
            _, seen = augment(np.zeros((*SIZE, 3), np.uint8), mask, chance, id)
            assert (seen == id).any() and seen.shape == crop
            assert np.array_equal(augment.mask(mask, again, id), seen)


def test_a_crop_lies_anywhere_it_shows_the_pixel_and_within_the_image():
    mask, augment = masks()[1], Augment((8, 12))  # its pole is at row 33, column 58 of 40 x 60
    seen = [augment(np.zeros((*SIZE, 3), np.uint8), mask, np.random.default_rng(seed), 1)[1] for seed in range(400)]
    places = {tuple(np.argwhere(view == 1)[0].tolist()) for view in seen}
    assert all((view == 1).sum() == 1 and (view != 255).all() for view in seen)
    assert places == {(row, column) for row in range(1, 8) for column in (10, 11)}


def test_a_class_that_the_image_lacks_changes_nothing():
    image, mask = np.zeros((*SIZE, 3), np.uint8), masks()[0]
    for seed in range(5):
        views = [AUGMENT(image, mask, np.random.default_rng(seed), *shown) for shown in ((), (3,))]
        assert all(np.array_equal(*parts) for parts in zip(*views, strict=True))


def test_a_sample_of_two_views_is_drawn_twice_and_comes_again(data, tmp_path):
    drawn = TrainViews(data, AUGMENT, 3, views=2, uniform=class_uniform(data, 0.7, cache_dir=tmp_path))
    epochs = [[(*drawn.draw(epoch, sample)[:3],) for sample in range(6)] for epoch in range(5)]
    assert epochs[0] == epochs[2] == epochs[4] and epochs[1] == epochs[3]
    assert [draw[1:] for draw in epochs[0]] != [draw[1:] for draw in epochs[1]]


@pytest.mark.parametrize("views", [None, 2])
def test_workers_ranks_and_a_resumption_change_nothing(data, tmp_path, views):
    found = class_uniform(data, 0.7, cache_dir=tmp_path)
    options = {"seed": 1, "views": views, "uniform": found, "batch_size": 4}
    packed = pack(data, cache_dir=tmp_path, workers=1)

    def taken(data_set=data, count=7, **others):
        return list(itertools.islice(train_batches(data_set, AUGMENT, **options | others), count))

    whole = taken()
    for other in (taken(workers=1), taken(packed), [*taken(count=3), *taken(start=3, count=4)]):
        for ours, theirs in zip(whole, other, strict=True):
            assert ours.names == theirs.names
            assert torch.equal(ours.image, theirs.image) and torch.equal(ours.mask, theirs.mask)
    for ours, *shares in zip(whole, *(taken(rank=rank, world_size=2) for rank in range(2)), strict=True):
        assert torch.equal(ours.mask, torch.cat([share.mask for share in shares]))
    assert views is None or {name for batch in whole for name in batch.names} <= set(data.names)


def test_an_image_whose_packed_mask_has_lost_the_class_is_seen_anywhere(data, tmp_path):
    reduced = pack(data, cache_dir=tmp_path, longest=10, workers=1)
    poles = ClassUniform(1.0, {1: np.array([1])}, [""] * 6)
    drawn = TrainViews(reduced, Augment((8, 10), longest=10), 0, uniform=poles)
    assert drawn.read(0, 0)["name"] == "1" and drawn.read(0, 0)["mask"].shape == (8, 10)
