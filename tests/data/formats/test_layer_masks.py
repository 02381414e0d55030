"""Masks with a layer for each class, from folders of classes, from one PNG per class, and from COCO."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from making import save
from mistakes import assert_refused
from overlapping_shapes import CLASSES, write_coco, write_overlaps
from PIL import Image

from dinoseg.data.checks.errors import check_for_errors
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.custom import CustomDataset, check_custom_dataset
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.scan.measure import measure
from dinoseg.data.scan.scan import class_counts
from dinoseg.data.transforms import Affine, Augment
from dinoseg.extensions.annotations.annotated import Shapes, annotated_dataset
from dinoseg.extensions.annotations.drawing import Drawing
from dinoseg.extensions.packed.pack import pack
from dinoseg.inference.class_record import references
from dinoseg.testing import check_dataset
from dinoseg.utils.images import read_ids

PER_FILE = FolderLayout("{split}/images", "{split}/flat", mask_suffix="_{class}")


def folder(root, split="train", classes=CLASSES, **options):
    return folder_dataset(root, split, **{"classes": classes, "layers": True} | options)


def refused(root, *words, **options):
    assert_refused(lambda: folder(root, **options), *words)


def check_masks(data, masks):
    """Check that a dataset has the masks of some names."""
    for index, name in enumerate(data.names):
        np.testing.assert_array_equal(data[index]["mask"], masks[name])


def rewrite_coco(root, change):
    """Change the annotations of a COCO file."""
    path = root / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": change(content["annotations"])}))


def coco(root, shapes=Shapes(unlabelled=None)):  # noqa: B008 (frozen)
    return annotated_dataset(root, "train", kind="coco", classes=CLASSES, shapes=shapes, layers=True)


def test_folders_of_classes_become_layers(tmp_path):
    masks = write_overlaps(tmp_path)
    data = folder(tmp_path)
    assert data.has_layers and len(data) == 12
    assert any((layers.sum(axis=0) > 1).any() for layers in masks.values())  # classes overlap
    check_masks(data, masks)
    check_dataset(data, has_layers=True)
    counts = sum(masks[name].sum(axis=(1, 2), dtype=int) for name in data.names)
    assert class_counts(data, tmp_path / "cache").tolist() == counts.tolist()


def test_a_file_for_each_class_equals_folders_of_classes(tmp_path):
    masks = write_overlaps(tmp_path, train=3)
    for name in ("train_0", "train_1", "train_2"):
        for label, layer in zip(CLASSES, masks[name], strict=True):
            save(tmp_path / "train/flat" / f"{name}_{label}.png", 255 * layer.astype(np.uint8))
    data = folder(tmp_path, layout=PER_FILE, masks=Masks(format="binary"))
    assert data.names == folder(tmp_path).names and len(data) == 3
    check_masks(data, masks)


@pytest.mark.parametrize(
    ("classes", "rules", "value"),
    [
        ("a", {"format": "binary"}, 255),
        ("a", {"others": "present"}, 7),
        ("abc", {"ids": {128: 1, 255: 1}}, 255),
        ("abcde", {"format": "binary"}, 255),
        ("abcde", {"others": "present"}, 7),
    ],
)
def test_layers_of_two_values_suit_any_number_of_classes(classes, rules, value, tmp_path):
    expected = np.arange(6 * len(classes)).reshape(-1, 2, 3) % 5 % 2
    save(tmp_path / "train/images/x.png", np.zeros((2, 3, 3)))
    for name, layer in zip(classes, expected, strict=True):
        save(tmp_path / "train/masks" / name / "x.png", value * layer)
    data = folder(tmp_path, classes=list(classes), masks=Masks(**rules))
    assert data[0]["mask"].tolist() == data.keep({"x"})[0]["mask"].tolist() == expected.tolist()
    assert len(data.keep(set())) == 0
    assert not measure(data.pairs[0], data.reader, images=False).problems
    scored = references(Labels.of(list(classes), None, 255), rules, has_layers=True)
    assert scored(tmp_path / "train/masks" / classes[0] / "x.png").tolist() == expected[0].tolist()


@pytest.mark.parametrize(("form", "one"), [("ids", np.uint8(1)), ("binary", np.uint8(255)), ("binary", np.True_)])
def test_pages_of_tiff_masks_are_the_classes(form, one, tmp_path):
    masks = write_overlaps(tmp_path, train=3)
    folders = folder(tmp_path)
    for name in folders.names:
        pages = [Image.fromarray(one * layer.astype(bool)) for layer in masks[name]]
        (tmp_path / "train/pages").mkdir(exist_ok=True)
        pages[0].save(tmp_path / f"train/pages/{name}.tif", save_all=True, append_images=pages[1:])
    data = folder(tmp_path, layout=FolderLayout(masks="{split}/pages"), masks=Masks(format=form))
    assert data.names == folders.names and data.fingerprint() != folders.fingerprint()
    check_masks(data, masks)
    record = measure(data.pairs[0], data.reader, images=False)
    assert not record.problems and record.pixels == measure(folders.pairs[0], folders.reader, images=False).pixels
    pages[0].save(tmp_path / f"train/pages/{name}.tif", save_all=True, append_images=pages)
    assert_refused(lambda: data[2], "has 3 pages, and one for each of 2 classes")
    assert_refused(lambda: read_ids(tmp_path / f"train/pages/{name}.tif"), "has 3 pages", "task=multilabel")


def test_shapes_of_coco_overlap_and_may_be_ignored(tmp_path):
    masks = write_coco(tmp_path)
    check_masks(coco(tmp_path), masks)
    rewrite_coco(tmp_path, lambda rows: [each | {"iscrowd": int(each["category_id"] == 2)} for each in rows])
    ignored = {name: np.stack([disc, 255 * square.astype(int)]) for name, (disc, square) in masks.items()}
    check_masks(coco(tmp_path, Shapes(unlabelled=None, crowds="ignore")), ignored)
    save(tmp_path / "train/images/x.png", np.zeros((2, 3, 3)))
    save(tmp_path / "train/masks/disc/x.png", [[0, 1, 255], [255, 1, 0]])
    layers = folder(tmp_path)[0]["mask"]
    assert layers.tolist() == [[[0, 1, 255], [255, 1, 0]], [[0, 0, 0], [0, 0, 0]]]  # no file: the class is absent
    assert class_counts(folder(tmp_path), tmp_path / "cache").tolist() == [2, 0]


def test_objects_cover_ignored_shapes_of_their_class(tmp_path):
    masks = write_coco(tmp_path)
    crowd = {"iscrowd": 1, "category_id": 1}  # all objects of an image
    rewrite_coco(tmp_path, lambda rows: [*rows, *({**each, **crowd, "id": each["id"] + 1000} for each in rows)])
    data = coco(tmp_path, Shapes(unlabelled=None, crowds="ignore"))
    for index, name in enumerate(data.names):
        disc, square = masks[name]
        np.testing.assert_array_equal(data[index]["mask"][0], np.where(disc, 1, 255 * square.astype(int)))


def test_incomplete_and_unequal_masks_are_refused(tmp_path):
    write_overlaps(tmp_path, train=2)
    save(tmp_path / "train/masks/disc/extra.png", np.zeros((2, 2)))
    for label in CLASSES:
        (tmp_path / "train/masks" / label / "train_1.png").unlink()
    data = folder(tmp_path)
    assert len(data) == 1 and len(data.lacking) == 2
    save(tmp_path / "train/masks/disc/train_0.png", np.zeros((2, 2)))
    assert_refused(lambda: data[0], "differ in size")
    save(tmp_path / "train/masks/disc/train_0.png", np.full((32, 48), 7))
    assert_refused(lambda: data[0], "train_0.png holds the ids 7. A mask of one class has the id 0 where")


def test_missing_and_doubtful_masks_of_classes_are_refused(tmp_path):
    save(tmp_path / "train/images/x.png", np.zeros((2, 3, 3)))
    save(tmp_path / "train/masks/x_disc.png", np.zeros((2, 3)))
    refused(tmp_path, "masks/disc", 'mask_suffix="_{class}"')
    layout = FolderLayout(mask_suffix="_{class}")
    refused(tmp_path, "x.png has no mask in", "need task=multilabel", layers=False, layout=layout)
    write_overlaps(tmp_path / "folders", train=2)
    refused(tmp_path / "folders", "disc/train_0.png has no image in", "need task=multilabel", layers=False)
    for name in ("x", "x_black"):
        save(tmp_path / "two/train/images" / f"{name}.png", np.zeros((2, 2, 3)))
    save(tmp_path / "two/train/flat/x_black_cat.png", np.zeros((2, 2)))
    refused(tmp_path / "two", "two images or classes", classes=["cat", "black_cat"], layout=PER_FILE)


def test_a_missing_class_folder_names_folders_of_no_class(tmp_path, caplog):
    write_overlaps(tmp_path, train=2)
    (tmp_path / "train/masks" / CLASSES[0]).rename(tmp_path / "train/masks/typo")
    assert len(folder(tmp_path)) == 2
    assert f"masks/{CLASSES[0]} is missing" in caplog.text and "Folders of no class: typo." in caplog.text


@pytest.mark.parametrize(("layout", "name"), [(FolderLayout(), "{}/x.png"), (PER_FILE, "x_{}.png")])
def test_a_folder_instead_of_a_mask_is_no_absent_class(layout, name, tmp_path):
    save(tmp_path / "train/images/x.png", np.zeros((2, 3, 3)))
    masks = tmp_path / layout.masks.format(split="train")
    save(masks / name.format("disc"), np.ones((2, 3)))
    place = masks / name.format("square")
    place.mkdir(parents=True)
    refused(tmp_path, f"{name.format('square')} is a folder, not a mask", layout=layout)
    place.rename(place.with_name("tiles.tif"))  # a folder of another name is one of a tree
    assert folder(tmp_path, layout=layout)[0]["mask"].sum() == 6


def test_a_class_of_0_and_255_alone_is_refused(tmp_path):
    write_overlaps(tmp_path)
    splits = {split: folder(tmp_path, split) for split in ("train", "val")}
    check_for_errors(**splits, cache_dir=tmp_path / "cache")
    for path in (tmp_path / "train/masks/square").iterdir():
        save(path, 255 * read_ids(path))
    words = ("square in train hold only 0 and 255", "masks.format=binary")
    message = assert_refused(lambda: check_for_errors(**splits, cache_dir=tmp_path / "cache"), *words)
    assert "disc in train" not in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Tool", "tool"], "The class tool "),
        (["\u00e9tui", "e\u0301tui"], "The class e\u0301tui "),
        ([".."], "Rename it"),
        (["x?"], "Rename it"),
    ],
)
def test_class_names_that_no_disk_can_have_are_refused(names, message):
    assert_refused(lambda: check_custom_dataset(None, names, 255, has_layers=True), message)


def write_claim(root, side, annotations):
    """Write a COCO file that states another size than the 8 x 8 pixels of its image, with many classes."""
    save(root / "train" / "a.png", np.zeros((8, 8), np.uint8))
    names = [f"class {index}" for index in range(100)]
    shape = [[0, 0, 9, 0, 9, 9]]
    content = {
        "images": [{"id": 0, "file_name": "a.png", "height": side, "width": side}],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
        "annotations": [{"id": n, "image_id": 0, "category_id": n, "segmentation": shape} for n in range(annotations)],
    }
    (root / "annotations").mkdir()
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return annotated_dataset(root, "train", kind="coco", classes=names, shapes=Shapes(unlabelled=None), layers=True)


def test_masks_larger_than_their_image_are_refused(tmp_path, monkeypatch):
    data = write_claim(tmp_path / "few", 8, 3)  # absent classes cost no mask
    assert [index for index, source in enumerate(data.pairs[0].mask.sources) if source is not None] == [0, 1, 2]
    assert data[0]["mask"].any(dim=(1, 2)).sum() == 3
    data = write_claim(tmp_path, 13_000, 100)
    monkeypatch.setattr(Drawing, "read", None)
    assert_refused(lambda: data[0], "its mask ", " is 13000 x 13000. Make them equal")
    assert {*measure(data.pairs[0], data.reader, images=False).problems} == {"size_mismatch"}
    (tmp_path / "train/a.png").write_bytes(b"none")
    assert {*measure(data.pairs[0], data.reader, images=False).problems} == {"unreadable_image"}


def test_options_that_need_one_class_per_pixel_are_refused(tmp_path):
    write_overlaps(tmp_path, train=1)
    data = folder(tmp_path)
    assert_refused(lambda: prepare_dataset(data, split="train", cache="packed", pack=pack), "packed")
    write_coco(tmp_path / "coco")
    given = {"kind": "coco", "classes": ["background", *CLASSES], "layers": True}
    assert_refused(lambda: annotated_dataset(tmp_path / "coco", "train", **given), "unlabelled")
    for unlabelled in ("ignore", "road"):
        act = partial(coco, tmp_path / "coco", Shapes(unlabelled=unlabelled))
        assert_refused(act, f"data.unlabelled={unlabelled}", "=null")


def drawn(mask):
    """Return a dataset of a class of its own, with a mask (layers, H, W)."""
    classes = "ab"[: len(mask)]
    members = {"classes": tuple(classes), "palette": ((0, 0, 0), (255, 0, 0))[: len(mask)], "ignore_index": 255}
    sample = {"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "mask": torch.tensor(mask), "name": "x"}
    members |= {"names": ["x"], "__len__": lambda self: 1, "__getitem__": lambda self, index: sample}
    return type("Drawn", (), members)()


def test_a_dataset_class_may_return_layers(tmp_path):
    assert CustomDataset(drawn([[[0, 1], [1, 255]]]), has_layers=True)[0]["mask"].tolist() == [[[0, 1], [1, 255]]]
    data = CustomDataset(drawn([[[0, 1], [1, 255]], [[0, 0], [1, 0]]]), has_layers=True)
    assert data[0]["mask"].dtype == torch.uint8 and class_counts(data, tmp_path).tolist() == [2, 1]
    assert torch.equal(data.keep({"x"})[0]["mask"], data[0]["mask"])
    named = partial(check_custom_dataset, data, ["a/b", "c"], 255, has_layers=True)
    assert_refused(named, "The class a/b ", "Rename it")
    for mask in ([[0, 1], [1, 0]], [[[0, 2], [1, 0]], [[0, 0], [1, 0]]]):
        wrong = CustomDataset(drawn(mask), has_layers=True)
        assert_refused(partial(wrong.__getitem__, 0), "the mask of x")


def test_the_ignored_id_is_no_class_of_layers(tmp_path):
    write_overlaps(tmp_path, train=1)
    data = folder(tmp_path, ignore_index=2)
    assert check_custom_dataset(data, CLASSES, 2, has_layers=True).ignore_index == 2
    act = partial(check_custom_dataset, data, [*CLASSES, "ring"], 2, has_layers=True)
    assert_refused(act, "data.ignore_index=2", "ids 0 to 2")


def test_augmentation_moves_all_layers_alike():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (21, 33, 3), dtype=np.uint8)
    layers = rng.integers(0, 2, (7, 21, 33), dtype=np.uint8)
    augment = Augment((16, 24), scale=(0.5, 2.0), flip=0.5, affine=Affine(degrees=30, shear=10))
    for seed in range(4):
        seen, moved = augment(image, layers, np.random.default_rng(seed))
        assert moved.shape == (7, 16, 24)
        for layer, one in zip(layers, moved, strict=True):
            alone, expected = augment(image, layer, np.random.default_rng(seed))
            np.testing.assert_array_equal(seen, alone)
            np.testing.assert_array_equal(one, expected)
