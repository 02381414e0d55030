"""Objects keep their numbers, classes and crowds wherever their mask goes, and cost nothing where there are none."""

import numpy as np
import pytest
import torch
from making import save, train_batches
from mistakes import assert_refused

from dinoseg.core.object_ids import (
    CROWD,
    MAX_CLASSES,
    MAX_OBJECTS,
    OBJECTS,
    check_object_range,
    crowd_flags,
    encode_object,
    object_classes,
    object_numbers,
    stack_objects,
)
from dinoseg.core.sample_maps import IdMap, ObjectMap, check_maps, make_random_maps, resize_map
from dinoseg.core.shapes import Batch, join_batches
from dinoseg.core.sources import ObjectSource
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.transforms import Affine, Augment
from dinoseg.extensions.packed.pack import pack

KIND = {OBJECTS: ObjectMap()}
LAST = encode_object(MAX_OBJECTS, MAX_CLASSES - 1, crowd=True)


class Stored(ObjectSource):
    """Objects of an array; their file is that of the image."""

    def __init__(self, path, objects):
        self.path, self.objects = path, objects

    def read(self):
        return self.objects

    def digest(self):
        return str(hash(self.objects.tobytes()))


def overlapping(size, count, rng):
    """Return objects of rectangles, some of which overlap."""
    found = []
    for number in range(1, count + 1):
        canvas = np.zeros(size, bool)
        top, left = (int(rng.integers(side)) for side in size)
        canvas[top : top + size[0] // 2 + 1, left : left + size[1] // 2 + 1] = True
        found.append((encode_object(number, number % 5, crowd=number % 3 == 0), np.flatnonzero(canvas)))
    return stack_objects(found, size)


@pytest.fixture
def dataset(tmp_path):
    """Images of one size with 0, 3, 1 and 6 objects."""
    rng = np.random.default_rng(0)
    pairs, sources = [], []
    for index, count in enumerate((0, 3, 1, 6)):
        image, mask = tmp_path / f"{index}.jpg", tmp_path / f"{index}.png"
        save(image, rng.integers(0, 256, (33, 47, 3)))
        objects = overlapping((33, 47), count, rng)
        save(mask, object_classes(objects).max(axis=0, initial=0))
        pairs.append(Pair(str(index), image, mask))
        sources.append(Stored(image, objects))
    plain = PairDataset(pairs, Labels.of(list("abcde"), None, 255), Masks())
    return plain.with_objects(sources, {3, 1})


@pytest.mark.parametrize("crowd", [False, True])
def test_values_hold_number_class_and_crowd(crowd):
    for number in (1, 77, MAX_OBJECTS):
        for class_id in (0, 5, MAX_CLASSES - 1):
            value = encode_object(number, class_id, crowd=crowd)
            for each in (value, np.array([value], np.int32), torch.tensor([value], dtype=torch.int32)):
                assert object_numbers(each) == number and object_classes(each) == class_id
                assert crowd_flags(each) == crowd
    assert 0 < LAST < 2**31 and LAST & CROWD


def test_too_many_objects_are_refused():
    check_object_range(MAX_OBJECTS, "a.png")
    assert_refused(lambda: check_object_range(2**20, "a.png"), "a.png", "1048576 objects", "1048575")


def test_each_object_lies_whole_in_the_first_free_layer():
    rng = np.random.default_rng(1)
    for _ in range(30):
        size = tuple(map(int, rng.integers(1, 12, 2)))
        shown = [(encode_object(n, 0), np.flatnonzero(rng.random(size) < rng.random() / 2)) for n in range(1, 9)]
        layers = stack_objects(shown, size)
        place = -1
        for value, pixels in shown:
            where = [layer for layer in range(len(layers)) if (layers[layer] == value).any()]
            assert len(where) == (pixels.size > 0)
            if where:
                np.testing.assert_array_equal(np.flatnonzero(layers[where[0]] == value), pixels)
                earlier = layers[: where[0]].reshape(where[0], layers[0].size)[:, pixels]
                assert (earlier != 0).any(axis=1).all()
                place = max(place, where[0])
        assert len(layers) == place + 1 and layers.dtype == np.int32


@pytest.mark.parametrize("affine", [Affine(), Affine(180, 0.3, 20)])
def test_objects_move_with_their_mask(affine):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size = rng.integers(1, 90, 2)
        crop = tuple(map(int, rng.integers(1, 70, 2)))
        mask = rng.integers(0, 5, size).astype(np.uint8)
        ids = np.where(mask > 0, LAST - mask.astype(np.int32), 0).astype(np.int32)
        objects = np.stack([ids, np.zeros_like(ids), ids[::-1]])
        augment = Augment(crop, affine=affine, scale=(0.3, 3), flip=0.5)
        _, seen = augment(np.zeros((*size, 3), np.uint8), mask, np.random.default_rng(seed))
        view = augment.maps({OBJECTS: objects}, KIND, mask, np.random.default_rng(seed))[OBJECTS]
        expected = np.where((seen > 0) & (seen < 255), LAST - seen.astype(np.int32), 0)
        upside = augment.mask(mask[::-1].copy(), np.random.default_rng(seed))
        other = np.where((upside > 0) & (upside < 255), LAST - upside.astype(np.int32), 0)
        layers = [each for each in (expected, other) if each.any()]
        np.testing.assert_array_equal(view, np.array(layers, np.int32).reshape(-1, *crop))
        assert view.dtype == np.int32


def test_resizing_keeps_ids_and_the_number_of_layers():
    objects = torch.full((2, 3, 4, 6), LAST, dtype=torch.int32)
    assert (resize_map(objects, ObjectMap(), (9, 5)) == LAST).all()
    assert resize_map(objects[:, :0], ObjectMap(), (9, 5)).shape == (2, 0, 9, 5)


def test_batches_are_padded_with_empty_layers(dataset):
    samples = [dataset[index] for index in range(4)]
    layers = [len(sample["maps"][OBJECTS]) for sample in samples]
    assert layers[0] == 0 and layers[2] == 1 and max(layers) == layers[3] > 1
    batch = Batch.stack(samples)
    assert batch.maps[OBJECTS].shape == (4, max(layers), 33, 47) and batch.maps[OBJECTS].dtype == torch.int32
    for index, sample in enumerate(samples):
        assert torch.equal(batch.maps[OBJECTS][index, : layers[index]], sample["maps"][OBJECTS])
        assert not batch.maps[OBJECTS][index, layers[index] :].any()
    joined = join_batches([Batch.stack(samples[:1]), Batch.stack(samples[1:3]), Batch.stack(samples[3:])])
    assert torch.equal(joined.maps[OBJECTS], batch.maps[OBJECTS]) and joined.names == batch.names
    assert Batch.stack(samples[:1]).maps[OBJECTS].shape == (1, 0, 33, 47)


def test_views_of_training_hold_only_layers_with_objects(dataset):
    batches = train_batches(dataset, Augment((8, 8), scale=(0.5, 2.0)), seed=0, batch_size=1)
    for batch in (next(batches) for _ in range(40)):
        objects = batch.maps[OBJECTS][0]
        assert objects.shape[1:] == (8, 8) and objects.any(dim=2).any(dim=1).all()
        assert len(objects) <= len(dataset[int(batch.names[0])]["maps"][OBJECTS])


@pytest.mark.parametrize("longest", [None, 20])
def test_packed_data_hold_the_same_objects(dataset, tmp_path, longest):
    packed = pack(dataset, cache_dir=tmp_path / "cache", longest=longest, workers=1)
    reopened = pack(dataset, cache_dir=tmp_path / "cache", longest=longest, workers=1)
    assert packed.maps == {OBJECTS: ObjectMap(things=(1, 3))} == packed.keep(["1"]).maps
    for index in range(4):
        whole = dataset[index]["maps"][OBJECTS]
        for each in (packed[index], reopened[index]):
            objects = each["maps"][OBJECTS]
            assert objects.shape[1:] == each["mask"].shape
            if longest is None:
                assert torch.equal(objects, whole)
            else:
                assert set(objects.unique().tolist()) <= set(whole.unique().tolist()) | {0}
                assert torch.equal(objects, resize_map(whole, ObjectMap(), objects.shape[1:]))


def test_only_data_with_objects_have_other_fingerprints(dataset):
    plain = PairDataset([Pair(p.name, p.image, p.mask) for p in dataset.pairs], dataset.reader.labels, Masks())
    assert plain.maps == {} and "maps" not in plain[0]
    others = [dataset.fingerprint(), plain.with_objects([Stored(p.image, np.zeros(1)) for p in plain.pairs], {1})]
    assert len({plain.fingerprint(), others[0], others[1].fingerprint()}) == 3


def test_computed_maps_are_added_to_objects(dataset):
    more = dataset.with_maps({"twin": IdMap()}, lambda sample: {"twin": sample["mask"].int()})
    assert list(more[1]["maps"]) == [OBJECTS, "twin"] == list(more.keep(["1", "2"]).maps)


def test_masks_that_are_resized_take_objects_with_them(dataset, tmp_path):
    save(tmp_path / "1.jpg", np.zeros((66, 94, 3)))
    larger = PairDataset(dataset.pairs, dataset.reader.labels, Masks(on_size_mismatch="resize_mask"))
    small = dataset.pairs[1].objects.read()
    np.testing.assert_array_equal(larger[1]["maps"][OBJECTS], small.repeat(2, axis=1).repeat(2, axis=2))
    assert_refused(lambda: dataset[1], "94 x 66", "47 x 33")


def test_maps_of_own_datasets_are_checked():
    size = (4, 5)
    for shape in ((0, *size), (3, *size)):
        check_maps({OBJECTS: torch.zeros(shape, dtype=torch.int32)}, KIND, size, "here")
    for wrong in (torch.zeros(size, dtype=torch.int32), torch.zeros(1, *size), torch.zeros(1, 5, 4).int(), None):
        assert_refused(lambda wrong=wrong: check_maps({OBJECTS: wrong}, KIND, size, "here"), "here", "(N, 4, 5)")


def test_random_and_missing_maps_have_the_declared_form(dataset):
    random = make_random_maps(KIND, 3, (4, 5), 2, torch.Generator().manual_seed(0))
    check_maps({OBJECTS: random[OBJECTS][0]}, KIND, (4, 5), "here")
    assert random[OBJECTS].shape == (3, 1, 4, 5) and object_classes(random[OBJECTS]).unique().tolist() == [0, 1]
    assert ((random[OBJECTS] > 0) == (object_numbers(random[OBJECTS]) > 0)).all()
    assert ObjectMap().make_empty((4, 5), 255).shape == (0, 4, 5)
