"""Maps of a sample move with its mask; their kinds and their forms are checked."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from making import Pictures, train_batches
from mapped import FAR, KINDS, MappedPictures, maps_of
from mistakes import assert_refused
from small_trainings import write_pairs

from dinoseg import SegmentationDataset
from dinoseg.core.sample_maps import (
    DistanceMap,
    IdMap,
    LabelMap,
    ValueMap,
    make_random_maps,
    resize_map,
    resize_nearest,
)
from dinoseg.data.custom import CustomDataset
from dinoseg.data.transforms import Affine, Augment
from dinoseg.extensions.feature_cache.unlabelled import Unmasked
from dinoseg.extensions.packed.pack import pack
from dinoseg.testing import check_dataset
from dinoseg.utils.errors import UserError

SIZES = [(40, 30), (33, 57), (90, 20), (64, 64), (1, 9)]


def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("padding", "cat_max_ratio", "affine"),
    [("spread", None, Affine(180, 0.3, 20)), ("end", None, Affine()), ("end", 0.75, Affine(180, 0.3, 20))],
)
def test_label_and_id_maps_show_the_pixels_of_the_mask(padding, cat_max_ratio, affine):
    kinds = {"twin": LabelMap(), "layers": LabelMap(layers=2), "ids": IdMap(), "values": ValueMap(fill=-3)}
    for seed in range(40):
        draw = rng(seed)
        size = draw.integers(1, 90, 2)
        crop = tuple(map(int, draw.integers(1, 70, 2)))
        mask = draw.integers(0, 5, size).astype(np.uint8)
        options = {"longest": 77, "scale": (0.3, 3.0), "flip": 0.5} if max(crop) < 77 else {}
        augment = Augment(crop, affine=affine, padding=padding, cat_max_ratio=cat_max_ratio, **options)
        maps = {"twin": mask, "layers": np.stack([mask, 4 - mask]), "ids": mask + np.int64(FAR), "values": 1.0 + mask}
        maps["values"] = maps["values"].astype(np.float32)
        _, seen = augment(np.zeros((*size, 3), np.uint8), mask, rng(seed))
        views = augment.maps(maps, kinds, mask, rng(seed))
        outside = seen == 255
        np.testing.assert_array_equal(views["twin"], seen)
        np.testing.assert_array_equal(views["layers"], [seen, np.where(outside, 255, 4 - seen)])
        np.testing.assert_array_equal(views["ids"], np.where(outside, 0, seen + np.int64(FAR)))
        assert (views["values"][outside] == -3).all() and (views["values"][~outside] >= 1).all()
        assert {name: view.dtype for name, view in views.items()} == {name: each.dtype for name, each in maps.items()}


def test_the_fill_value_is_not_mixed_into_border_pixels():
    maps = {"weight": np.full((2, 20, 30), 0.1, np.float32)}
    for seed in range(30):
        augment = Augment((48, 48), scale=(0.3, 3), affine=Affine(180, 0.3, 30))
        mask = np.zeros((20, 30), np.uint8)
        view = augment.maps(maps, {"weight": ValueMap(layers=2, fill=9.0)}, mask, rng(seed))["weight"]
        outside = augment.mask(mask, rng(seed)) == 255
        assert (view[:, outside] == 9).all()
        np.testing.assert_allclose(view[:, ~outside], 0.1, rtol=1e-6)


@pytest.mark.parametrize("padding", ["spread", "end"])
def test_flips_of_all_kinds_are_exact(padding):
    sample = MappedPictures([(21, 34)])[0]
    maps = {name: values.numpy() for name, values in sample["maps"].items()}
    views = Augment((21, 34), flip=1.0, padding=padding).maps(maps, KINDS, sample["mask"].numpy(), rng(0))
    for name, values in maps.items():
        np.testing.assert_array_equal(views[name], values[..., ::-1])


def test_distances_are_those_in_the_view_at_any_zoom():
    """The distance to a circle, in float64, at the pixels of the view."""
    rows, columns = np.mgrid[:200, :240].astype(np.float64)
    distance = (np.hypot(rows - 90.3, columns - 130.7) - 50).astype(np.float32)
    mask = np.zeros((200, 240), np.uint8)
    zooms = []
    for seed in range(40):
        augment = Augment((96, 128), scale=(0.3, 3), affine=Affine(180, 0.3), flip=0.5, longest=201)
        view = augment.maps({"d": distance}, {"d": DistanceMap(fill=-1e6)}, mask, rng(seed))["d"]
        matrix = augment.place(mask, rng(seed))
        zoom = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        y, x = np.mgrid[:96, :128].astype(np.float64)
        source = np.linalg.inv(matrix) @ [x.ravel(), y.ravel(), np.ones(x.size)]
        expected = zoom * (np.hypot(source[1] - 90.3, source[0] - 130.7) - 50).reshape(96, 128)
        inside = augment.mask(mask, rng(seed)) != 255
        border = ((source[0] < 0) | (source[0] > 239) | (source[1] < 0) | (source[1] > 199)).reshape(96, 128)
        centre = expected < -zoom * 44  # there the cone is too curved to be interpolated
        compared = inside & ~border & ~centre
        assert np.abs(view - expected)[compared].max(initial=0) < 0.05 * max(zoom, 1)
        assert (view[~inside] == -1e6).all()
        zooms.append(zoom)
    assert min(zooms) < 0.4 and max(zooms) > 2


def test_maps_that_geometry_would_make_wrong_are_refused():
    def move(kind):
        sheared = Augment((8, 8), affine=Affine(shear=5))
        return sheared.maps({"d": np.zeros((8, 8), np.float32)}, {"d": kind}, np.zeros((8, 8), np.uint8), rng(0))["d"]

    assert_refused(lambda: move(DistanceMap()), "affine.shear=5", "map d ", "affine.shear=0")
    assert move(ValueMap()).shape == (8, 8)
    words = "distances cannot be resized by 1.500 vertically and 1.000"
    assert_refused(lambda: resize_map(torch.zeros(1, 8, 8), DistanceMap(), (12, 8)), words)


@pytest.mark.parametrize("size", [(7, 9), (20, 31), (13, 40), (1, 1)])
def test_resized_maps_equal_interpolation_in_torch(size):
    draw = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 256, (2, 3, 13, 20), generator=draw, dtype=torch.uint8)
    expected = F.interpolate(mask, size, mode="nearest-exact")
    assert torch.equal(resize_nearest(mask, size), expected)
    assert torch.equal(resize_map(mask.long() + FAR, IdMap(layers=3), size), expected.long() + FAR)
    values = torch.randn(2, 3, 13, 20, generator=draw)
    smooth = F.interpolate(values, size, mode="bilinear")
    torch.testing.assert_close(resize_map(values, ValueMap(layers=3), size), smooth)
    if size == (20, 31):
        factor = (20 / 13 * 31 / 20) ** 0.5
        torch.testing.assert_close(resize_map(values[:, 0], DistanceMap(), size), factor * smooth[:, 0])


def test_a_dataset_without_maps_has_the_same_images_and_masks():
    options = {"seed": 3, "batch_size": 3}
    augment = Augment((24, 32), scale=(0.5, 2), affine=Affine(30, 0.1), flip=0.5)
    plain = train_batches(Pictures(SIZES), augment, **options)
    mapped = train_batches(MappedPictures(SIZES), augment, **options)
    for _ in range(6):
        one, two = next(plain), next(mapped)
        assert torch.equal(one.image, two.image) and torch.equal(one.mask, two.mask) and one.names == two.names
        assert one.maps == {} and torch.equal(two.maps["twin"], one.mask) and two.maps["values"].shape == (3, 2, 24, 32)


class Wrong(MappedPictures):
    """One map of the second sample is replaced, or left out (None)."""

    def __init__(self, name, value):
        super().__init__([(6, 8)] * 2)
        self.name, self.value = name, value

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == 1:
            sample["maps"][self.name] = self.value
        return sample | {"maps": {name: each for name, each in sample["maps"].items() if each is not None}}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("distance", torch.zeros(6, 9), r"p1.*distance is torch.float32 \(6, 9\).*DistanceMap.*float32 \(6, 8\)"),
        ("distance", torch.zeros(6, 8).double(), r"p1.*distance is torch.float64 \(6, 8\).*torch.float32"),
        ("values", torch.zeros(6, 8), r"p1.*values is torch.float32 \(6, 8\).*\(2, 6, 8\)"),
        ("ids", torch.zeros(6, 8), "p1.*ids is torch.float32.*torch.int32 or torch.int64"),
        ("twin", np.zeros((6, 8)), "p1.*twin is ndarray.*torch.uint8"),
        ("ids", None, "p1.*ids is NoneType.*torch.int32 or torch.int64"),
    ],
)
def test_a_wrong_map_is_named_with_its_sample(name, value, message):
    data = CustomDataset(Wrong(name, value))
    assert data[0]["maps"].keys() == KINDS.keys()
    with pytest.raises(UserError, match=message):
        data[1]
    with pytest.raises(AssertionError, match=message):
        check_dataset(Wrong(name, value))


def test_maps_have_the_order_of_their_declaration():
    kinds = dict(reversed(KINDS.items()))
    assert [*declare(kinds)[0]["maps"]] == [*kinds]


def declare(maps):
    """Return a dataset that declares maps."""
    data = MappedPictures([(6, 8)])
    data.maps = maps
    return CustomDataset(data)


def test_check_dataset_compares_maps():
    class Fickle(MappedPictures):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            sample["maps"]["distance"] = torch.rand(sample["mask"].shape)
            return sample

    check_dataset(MappedPictures([(6, 8)] * 2))
    with pytest.raises(AssertionError, match="same sample at each access"):
        check_dataset(Fickle([(6, 8)] * 2))


def test_wrapped_datasets_keep_their_maps():
    data = MappedPictures([(6, 8)] * 3)
    kept = CustomDataset(data).keep({"p2"})
    assert kept.maps == KINDS and torch.equal(kept[0]["maps"]["twin"], data[2]["mask"])
    public = SegmentationDataset(CustomDataset(data))
    assert public.maps == KINDS and CustomDataset(public)[1]["maps"].keys() == KINDS.keys()


@pytest.fixture
def pairs(tmp_path):
    """Return a dataset of three files, with maps."""
    return write_pairs(tmp_path, [(20, 30), (20, 31), (20, 32)]).with_maps(KINDS, maps_of)


def test_packed_files_have_the_maps_of_files(pairs, tmp_path):
    packed = pack(pairs.keep({"0", "2"}), cache_dir=tmp_path / "cache", workers=1)
    assert packed.maps == KINDS and packed.keep({"2"}).maps == KINDS
    small = pack(pairs, cache_dir=tmp_path / "cache", longest=15, workers=1)[1]
    assert small["maps"]["twin"].shape == small["mask"].shape and torch.equal(small["maps"]["twin"], small["mask"])


def test_computed_maps_are_checked_and_filled_without_masks(pairs):
    wrong = pairs.with_maps({"d": DistanceMap()}, lambda sample: {"d": torch.zeros(2, 2)})
    assert_refused(lambda: wrong[1], "sample 1: the map d is ", "(2, 2)", "(20, 31)")
    data = Unmasked(["0"], [pairs.pairs[0].image], pairs)
    maps = data[0]["maps"]
    assert data.maps == KINDS and (maps["twin"] == 255).all() and (maps["ids"] == 0).all()
    assert (maps["values"] == -3).all() and maps["values"].shape == (2, 20, 30)
    assert {name: each.dtype for name, each in maps.items()} == {name: kind.dtypes[0] for name, kind in KINDS.items()}


def test_random_maps_have_the_declared_form():
    maps = make_random_maps(KINDS, 5, (4, 6), 3, torch.Generator().manual_seed(0))
    for name, kind in KINDS.items():
        assert maps[name].shape == (5, *kind.shape((4, 6))) and maps[name].dtype in kind.dtypes
        assert len(maps[name].unique()) > 2
    assert maps["twin"].max() < 3
