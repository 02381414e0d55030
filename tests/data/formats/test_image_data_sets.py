"""Each public set of images written as it is shipped, and read back equal through its config."""

import hashlib

import numpy as np
import pytest
from composed_data import load
from making import save
from mistakes import assert_refused
from omegaconf import OmegaConf
from PIL import Image

from dinoseg.config.nodes import instantiate
from dinoseg.testing import check_dataset

CITYSCAPES = {  # label id to train id of the 19 evaluated classes, as the data set's own scripts have them
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13},
    **{27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}
RNG = np.random.default_rng(11)


def scatter_values(values, shape):
    """Return a mask in which every value occurs."""
    return RNG.permutation(np.resize(np.array(values), shape[0] * shape[1])).reshape(shape)


def test_cityscapes_is_read(tmp_path):
    raw, images = {}, {}
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau"), ("test", "bonn")):
        for frame in range(2):
            stem = f"{city}/{city}_{frame:06d}_000019"
            images[stem] = RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)
            save(tmp_path / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", images[stem])
            raw[stem] = scatter_values([*range(34), 255], (7, 9))
            for kind in ("labelIds", "instanceIds", "labelTrainIds", "color"):
                pixels = raw[stem] if kind == "labelIds" else np.full((7, 9), 30)
                save(tmp_path / f"gtFine/{split}/{stem}_gtFine_{kind}.png", pixels)
            (tmp_path / f"gtFine/{split}/{stem}_gtFine_polygons.json").write_text("{}")
    data = load("cityscapes", tmp_path)
    for split, names in (("train", 4), ("val", 2), ("test", 2)):
        found = instantiate(data.reader)(split=split)
        assert len(found) == names and len(found.classes) == data.num_classes == 19
        for index, name in enumerate(found.names):
            expected = np.vectorize(lambda label: CITYSCAPES.get(label, 255))(raw[name])
            np.testing.assert_array_equal(found.mask(index), expected)
            sample = found[index]
            np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), images[name])
            np.testing.assert_array_equal(sample["mask"], expected)
    check_dataset(found)
    assert found.classes[0] == "road" and found.classes[18] == "bicycle" and found.palette[16] == (0, 80, 100)
    save(tmp_path / "gtFine/test/bonn/bonn_000000_000019_gtFine_labelIds.png", np.full((7, 9), 34))
    assert_refused(lambda: found.mask(0), "bonn_000000_000019_gtFine_labelIds.png holds the ids 34", "as 7, 8, 11")
    folds = [instantiate(load("cityscapes", tmp_path, f"data.fold={k}", "data.folds=3").reader) for k in range(3)]
    held = [{name.split("/")[0] for name in fold(split="val").names} for fold in folds]
    assert sorted(city for cities in held for city in cities) == ["aachen", "lindau", "ulm"]


def voc_palette():
    """Return the 256 colours of the mask files: the bits of an index in turn are red, green and blue, high bits first.

    The lowest three bits of the index are the highest bits of the three colours, the next three the next highest.
    """
    index = np.arange(256)[:, None]
    return sum((index >> (3 * place + np.arange(3)) & 1) << (7 - place) for place in range(3))


def test_pascal_voc_is_read(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    lists = {"train": ["2007_000032", "2011_003271"], "val": ["2007_000033"]}
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    ids = scatter_values([*range(21), 255], (6, 8)).astype(np.uint8)
    for name in (*lists["trainval"], "2008_000001", "2009_000002"):
        save(root / f"JPEGImages/{name}.jpg", np.zeros((6, 8, 3)))
    for number, name in enumerate(lists["trainval"]):
        mask = Image.fromarray(np.roll(ids, number)).convert("L")
        mask.putpalette(voc_palette().astype(np.uint8).tobytes())
        for folder in ("SegmentationClass", "SegmentationObject"):
            (root / folder).mkdir(exist_ok=True)
            mask.save(root / folder / f"{name}.png")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, names in lists.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    data = load("pascal_voc", root)
    assert data.num_classes == 21 and OmegaConf.to_container(data.palette) == voc_palette()[:21].tolist()
    for split, names in lists.items():
        found = instantiate(data.reader)(split=split)
        assert found.names == names
        for index, name in enumerate(names):
            np.testing.assert_array_equal(found[index]["mask"], np.roll(ids, lists["trainval"].index(name)))
    check_dataset(found)


def test_ade20k_is_read(tmp_path):
    files = {}
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        files[name] = scatter_values(range(151), (13, 12)).astype(np.uint8)
        save(tmp_path / f"images/{split}/{name}.jpg", np.zeros((13, 12, 3)))
        save(tmp_path / f"annotations/{split}/{name}.png", files[name])
    data = load("ade20k", tmp_path)
    for split in ("train", "val"):
        found = instantiate(data.reader)(split=split)
        assert len(found) == 1
        np.testing.assert_array_equal(found.mask(0), files[found.names[0]] - 1)  # uint8: 0 becomes 255
    check_dataset(found)
    assert (found.classes[12], found.palette[12]) == ("person", (150, 5, 61))
    assert found.palette[6] == found.palette[48] == (140, 140, 140) and len(set(found.palette)) == 149
    colours = bytes(value for colour in found.palette for value in colour)  # two published lists have this sum
    assert hashlib.sha256(colours).hexdigest().startswith("ce475c9151035eff51f4")


@pytest.mark.parametrize(
    ("name", "images", "masks"),
    [("camvid", "{}/images", "{}/masks"), pytest.param("camvid_segnet", "{}", "{}annot", marks=pytest.mark.heavy)],
)
def test_camvid_is_read(tmp_path, name, images, masks):
    splits = {
        "train": ["0001TP_006690", "0006R0_f00930", "0016E5_00390"],
        "val": ["0016E5_07959"],
        "test": ["0001TP_008550", "Seq05VD_f00000"],
    }
    ids = scatter_values(range(12), (4, 5))
    for split, stems in splits.items():
        (tmp_path / f"{split}.txt").write_text("/SegNet/CamVid/...")
        for number, stem in enumerate(stems):
            save(tmp_path / images.format(split) / f"{stem}.png", np.zeros((4, 5, 3)))
            save(tmp_path / masks.format(split) / f"{stem}.png", np.roll(ids, number))
    data = load(name, tmp_path)
    for split, stems in splits.items():
        found = instantiate(data.reader)(split=split)
        assert found.names == stems and len(found.classes) == 11
        for index in range(len(stems)):
            np.testing.assert_array_equal(found[index]["mask"], np.roll(np.where(ids == 11, 255, ids), index))
    check_dataset(found)
    fold = instantiate(load(name, tmp_path, "data.fold=0", "data.folds=3").reader)
    drives = [{stem.split("_")[0] for stem in fold(split=split).names} for split in ("train", "val")]
    assert not drives[0] & drives[1] and len(drives[0] | drives[1]) == 3


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("binary", {"train": "train/{}", "val": "val/{}"}),
        pytest.param("person", {"val": "valid_{}"}, marks=pytest.mark.heavy),
    ],
)
def test_black_and_white_masks_are_read(tmp_path, name, folders):
    expected = scatter_values([0, 1], (5, 6))
    for split, folder in folders.items():
        save(tmp_path / folder.format("images") / "7.jpg", np.zeros((5, 6, 3)))
        save(tmp_path / folder.format("masks") / "7.png", expected * 255)
        found = instantiate(load(name, tmp_path).reader)(split=split)
        np.testing.assert_array_equal(found[0]["mask"], expected)
    check_dataset(found)
    assert len(found.classes) == 2
    mine = instantiate(load(name, tmp_path, "data.classes=[wood, crack]").reader)(split="val")
    assert mine.classes == ("wood", "crack") and mine.mask(0).max() == 1
