"""Pixels that the internal mask of a TIFF image marks as invalid are ignored in training, scores and checks."""

import numpy as np
import pytest
import tifffile
from making import save
from mistakes import assert_refused

from dinoseg.core.channels import PixelFormat
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.scan.measure import measure
from dinoseg.data.scan.scan import class_counts
from dinoseg.extensions.objects.reading.ids import IdObjects
from dinoseg.extensions.packed.pack import pack
from dinoseg.utils.images import read_image, read_size

SIZE = (22, 34)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
VALID = RNG.random(SIZE) < 0.7
IDS = RNG.integers(0, 2, SIZE).astype(np.uint8)


def write_masked(path, image, valid, **options):
    """Write an image with a reduced copy and masks of both, as GDAL does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        file.write(image, photometric="rgb" if image.ndim == 3 else "minisblack", **options)
        file.write(valid, subfiletype=4, photometric="mask", compression="zlib")
        file.write(image[::2, ::2], photometric="rgb" if image.ndim == 3 else "minisblack", subfiletype=1)
        file.write(valid[::2, ::2], subfiletype=5, photometric="mask")


@pytest.fixture
def root(tmp_path):
    write_masked(tmp_path / "train/images/a.tif", IMAGE, VALID, tile=(16, 16), compression="lzw")
    save(tmp_path / "train/masks/a.png", IDS)
    for label in (0, 1):
        save(tmp_path / f"train/layers/{'ab'[label]}/a.png", IDS == label)
    return tmp_path


def open_split(root, **options):
    return folder_dataset(root, "train", classes=["a", "b"], **options)


def test_masked_pixels_have_the_ignored_id(root):
    data = open_split(root)
    expected = np.where(VALID, IDS, 255)
    assert np.array_equal(read_image(root / "train/images/a.tif"), IMAGE)
    assert read_size(root / "train/images/a.tif") == SIZE
    assert np.array_equal(data[0]["mask"], expected) and np.array_equal(data.mask(0), expected)
    assert np.array_equal(pack(data, cache_dir=root / "cache", workers=1)[0]["mask"], expected)
    objects = open_split(root).with_objects([IdObjects(data.pairs[0].mask, data.pairs[0].mask, data.reader, {1})], {1})
    assert np.array_equal(objects[0]["maps"]["objects"][0] > 0, expected == 1)
    for images in (True, False):
        record = measure(data.pairs[0], data.reader, images=images)
        assert not record.problems and record.raw == {"0": int((IDS == 0).sum()), "1": int((IDS == 1).sum())}
    assert class_counts(data, root / "cache").tolist() == [int((expected == label).sum()) for label in (0, 1)]
    layers = open_split(root, layout=FolderLayout(masks="{split}/layers"), layers=True)
    expected = np.where(VALID, np.stack([IDS == 0, IDS == 1]), 255)
    assert np.array_equal(layers[0]["mask"], expected) and np.array_equal(layers.mask(0), expected)


def test_masks_of_all_files_of_an_image_count(root):
    other = RNG.random(SIZE) < 0.5
    write_masked(root / "train/nir/a.tif", IMAGE[..., 0].astype(np.uint16), other)
    data = open_split(root).read_as(PixelFormat(4, ("images", "nir")))
    assert data[0]["image"].shape == (4, *SIZE)
    assert np.array_equal(data[0]["mask"], np.where(VALID & other, IDS, 255))


def test_internal_masks_and_masks_of_two_sizes_are_refused(root):
    save(root / "train/masks/a.png", IDS[1:])
    data = open_split(root)
    assert_refused(lambda: data[0], "34 x 21")
    assert_refused(lambda: data.mask(0), "34 x 21")
    save(root / "train/masks/a.png", IDS)
    with tifffile.TiffWriter(root / "train/images/a.tif") as file:
        file.write(IMAGE, photometric="rgb")
        file.write(VALID[::2], subfiletype=4, photometric="mask")
    assert_refused(lambda: open_split(root)[0], "internal mask of another size")


def test_a_damaged_image_is_no_fault_of_its_mask(root):
    path = root / "train/images/a.tif"
    data = open_split(root)
    path.write_bytes(path.read_bytes()[:200])
    assert measure(data.pairs[0], data.reader, images=True).problems.keys() == {"unreadable_image"}
