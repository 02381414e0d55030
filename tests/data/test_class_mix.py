"""Half of the classes of one view on another: pixels and ids, never what is ignored."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from making import Pictures

from dinoseg.core.shapes import Sample
from dinoseg.data.loader import train_batches
from dinoseg.data.train_views import ClassUniform, TrainViews, class_mixed
from dinoseg.data.transforms import Affine, Augment

AUGMENT = Augment((12, 10), scale=(0.7, 1.4), affine=Affine(15, 0.1, 5), flip=0.5)
DATA = Pictures([(20 + i, 30 - i) for i in range(7)])


def sample(ids, name):
    mask = torch.tensor(ids, dtype=torch.uint8)
    draw = torch.Generator().manual_seed(len(name))
    image = torch.randint(0, 256, (3, *mask.shape), dtype=torch.uint8, generator=draw)
    return Sample(image=image, mask=mask, name=name)


@pytest.mark.parametrize(
    ("ids", "half"),
    [
        ([[0, 1, 2, 3], [3, 7, 255, 0]], 3),
        ([[0, 1, 1, 1], [0, 0, 255, 255]], 1),
        ([[4, 4, 4, 255], [4, 4, 4, 4]], 1),
        ([[255, 255, 255, 255], [255, 255, 255, 255]], 0),
    ],
)
def test_half_of_the_classes_is_pasted(ids, half):
    source, onto, chosen = sample(ids, "source"), sample([[9, 9, 9, 255], [8, 8, 255, 8]], "onto"), Counter()
    for seed in range(60):
        mixed = class_mixed(source, onto, 255, np.random.default_rng(seed))
        from_source = torch.tensor([[mixed["mask"][y, x] not in (8, 9, 255) for x in range(4)] for y in range(2)])
        classes = set(mixed["mask"][from_source].tolist())
        assert len(classes) == half
        for y, x in itertools.product(range(2), range(4)):
            part = source if int(source["mask"][y, x]) in classes else onto
            assert mixed["mask"][y, x] == part["mask"][y, x]
            assert torch.equal(mixed["image"][:, y, x], part["image"][:, y, x])
        chosen.update(classes)
    expected = set(source["mask"].flatten().tolist()) - {255}
    assert chosen.keys() == expected and mixed["name"] == "onto with classes of source"


def test_a_share_of_the_samples_is_mixed_with_another_anew_in_each_epoch():
    drawn, plain = TrainViews(DATA, AUGMENT, 3, views=2, mix=0.4), TrainViews(DATA, AUGMENT, 3, views=2)
    sources, count = Counter(), 0
    for epoch, index in itertools.product(range(40), range(7)):
        name, _, source = drawn.read(epoch, index)["name"].partition(" with classes of ")
        sources.update([source] if source else [])
        assert name == f"p{index}" != source
        if not source:
            assert torch.equal(drawn.read(epoch, index)["image"], plain.read(epoch, index)["image"])
        count += 1
    assert sources.total() / count == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / count)) and len(sources) == 7
    epochs = [{drawn.read(epoch, index)["name"] for index in range(7)} for epoch in (0, 2)]
    assert epochs[0] != epochs[1]  # of the same views


def test_workers_ranks_and_a_resumption_change_nothing():
    uniform = ClassUniform(0.5, {id: np.arange(7) for id in range(3)}, [""] * 7)
    drawn = TrainViews(DATA, AUGMENT, 3, uniform=uniform, mix=0.6)

    def taken(count=5, **options):
        return list(itertools.islice(train_batches(drawn, batch_size=4, **options), count))

    whole = taken()
    for other in (taken(workers=1), [*taken(2), *taken(3, start=2)]):
        for ours, theirs in zip(whole, other, strict=True):
            assert ours.names == theirs.names and torch.equal(ours.image, theirs.image)
    for ours, *shares in zip(whole, *(taken(rank=rank, world_size=2) for rank in range(2)), strict=True):
        assert torch.equal(ours.mask, torch.cat([share.mask for share in shares]))
