import json
import os
from pathlib import Path

import numpy as np
import pytest
from making import save
from mistakes import assert_refused

from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.splits import Partition
from dinoseg.report.palette import default_palette
from dinoseg.testing import check_dataset
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

CLASSES = ["a", "b"]
FLAT = FolderLayout("images", "masks")


def refused(root, split, *words, **options):
    """Check that a data set of folders is refused."""
    assert_refused(lambda: folder_dataset(root, split, classes=CLASSES, **options), *words)


def names_of(root, *splits, **options):
    return [folder_dataset(root, split, classes=CLASSES, **options).names for split in splits]


@pytest.fixture
def fill(tmp_path):
    """Write pairs of pictures; each mask's first pixel is its number modulo 2."""

    def write(images="train/images", masks="train/masks", names=("x", "y", "z"), size=(4, 6)):
        for index, name in enumerate(names):
            image = np.full((*size, 3), index * 10, np.uint8)
            image[0, 0] = (200, 100, 50)
            save(tmp_path / images / f"{name}.png", image)
            mask = np.zeros(size, np.uint8)
            mask[0, 0] = index % 2
            save(tmp_path / masks / f"{name}.png", mask)
        return tmp_path

    return write


def test_samples_have_the_expected_shapes_and_values(fill):
    data = folder_dataset(fill(), "train", classes=CLASSES)
    assert data.names == ["x", "y", "z"] and len(data) == 3
    assert data.classes == ("a", "b") and data.palette == tuple(default_palette(2)) and data.ignore_index == 255
    check_dataset(data)
    sample = data[1]
    assert sample["name"] == "y"
    assert sample["image"][:, 0, 0].tolist() == [200, 100, 50] and sample["image"][0, 1, 1] == 10
    assert sample["mask"].sum() == 1
    sample["image"].add_(1)  # writable, and not the file's own memory
    assert data[1]["image"][0, 1, 1] == 10
    np.testing.assert_array_equal(data.mask(1), sample["mask"])


def test_drives_suffixes_and_instance_masks(tmp_path):
    for drive in ("7", "12"):
        save(tmp_path / f"leftImg8bit/val/{drive}/f1_image.jpg", np.zeros((2, 2, 3)))
        save(tmp_path / f"gtFine/val/{drive}/f1_label.png", np.full((2, 2), int(drive == "7")))
        save(tmp_path / f"gtFine/val/{drive}/f1_inst_label.png", np.full((2, 2), 77))
        (tmp_path / f"gtFine/val/{drive}/f1_polygons.json").write_text("{}")
    layout = FolderLayout("leftImg8bit/{split}", "gtFine/{split}", "_image", "_label", ["*_inst_label.png"])
    data = folder_dataset(tmp_path, "val", classes=CLASSES, layout=layout)
    assert data.names == ["12/f1", "7/f1"]
    assert [int(data[i]["mask"].max()) for i in range(2)] == [0, 1]


def test_one_folder_for_images_and_masks(tmp_path):
    for name in ("p.q", "r"):  # a dot inside a name is no ending
        save(tmp_path / "train" / f"{name}.JPG", np.zeros((2, 2, 3)), format="JPEG")
        save(tmp_path / "train" / f"{name}_mask.png", np.ones((2, 2)))
    assert names_of(tmp_path, "train", layout=FolderLayout("{split}", "{split}", mask_suffix="_mask")) == [["p.q", "r"]]


def test_split_folder_names_are_mapped_and_desktop_files_skipped(fill):
    root = fill("train_images", "train_masks")
    fill("valid_images", "valid_masks", ["v"])
    (root / "valid_images/._v.png").write_bytes(b"junk")
    (root / "valid_images/Thumbs.db").write_bytes(b"junk")
    layout = FolderLayout("{split}_images", "{split}_masks", splits={"val": "valid"})
    assert names_of(root, "val", "train", layout=layout) == [["v"], ["x", "y", "z"]]


def test_linked_folders_are_followed_and_link_cycles_skipped(fill):
    root = fill("elsewhere/images", "elsewhere/masks")
    (root / "train").mkdir()
    for folder in ("images", "masks"):
        (root / f"train/{folder}").symlink_to(root / f"elsewhere/{folder}")
        (root / f"elsewhere/{folder}/again").symlink_to(root / f"train/{folder}")
        (root / f"elsewhere/{folder}/up").symlink_to(root)
    assert names_of(root, "train") == [["x", "y", "z"]]


def test_name_lists_define_the_splits(fill):
    root = fill("images", "masks", ["a", "sub/b", "c"])
    save(root / "images/more.jpg", np.zeros((4, 6, 3)))  # in no list
    (root / "masks/c.png").unlink()
    (root / "train.txt").write_text("sub/b.png\na\n")
    (root / "val.txt").write_text("c\n")
    (root / "test.txt").write_text("nix\nnada\na\n")
    lists = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
    options = {"layout": FLAT, "partition": Partition("lists", lists)}
    assert names_of(root, "train", **options) == [["sub/b", "a"]]
    refused(root, "val", "Split val has no image with its mask:\n- c: ", "c.png has no mask in ", "masks.", **options)
    refused(root, "test", "2 names without image and mask", ": nix, nada", **options)
    refused(root, "extra", "No file list for split extra", "train, val, test", **options)


def test_unpaired_files_are_listed_as_missing(fill):
    root = fill(names=[f"n{i}" for i in range(9)])
    for i in range(7):
        (root / f"train/masks/n{i}.png").unlink()
    save(root / "train/masks/odd.png", [[0]])
    data = folder_dataset(root, "train", classes=CLASSES)
    assert data.names == ["n7", "n8"] and list(data.lacking) == [*(f"n{i}" for i in range(7)), "odd"]
    assert data.lacking["n3"] == f"{root / 'train/images/n3.png'} has no mask in {root / 'train/masks'}."
    assert data.lacking["odd"] == f"{root / 'train/masks/odd.png'} has no image in {root / 'train/images'}."
    assert data.remedy.startswith("Add the missing files or remove the others; ")


def test_a_missing_mask_moves_no_other_pair_to_the_other_side(fill):
    root = fill("images", "masks", [f"n{i}" for i in range(10)])
    options = {"classes": CLASSES, "layout": FLAT, "partition": Partition("fraction", val_fraction=0.4, seed=1)}
    whole = {split: folder_dataset(root, split, **options).names for split in ("train", "val")}
    for names in whole.values():
        (root / f"masks/{names[2]}.png").unlink()
    for split, names in whole.items():
        data = folder_dataset(root, split, **options)
        assert list(data.lacking) == [names[2]] and data.names == [name for name in names if name != names[2]]


def test_similar_names_are_distinguished(fill):
    composed, apart = "caf\u00e9", "cafe\u0301"
    root = fill(names=["x", composed])
    (root / f"train/masks/{composed}.png").rename(root / f"train/masks/{apart}.png")
    data = folder_dataset(root, "train", classes=CLASSES)
    assert data.names == ["x"] and set(data.lacking) == {composed, apart}
    assert all("NFD" in reason and "Rename one" in reason for reason in data.lacking.values())
    assert f"{apart}.png only looks" in data.lacking[composed]


def test_undecodable_names_are_split_and_recorded(fill):
    root = fill("images", "masks", ["x", "y", os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8")])
    partition = Partition("fraction", val_fraction=0.5)
    data = folder_dataset(root, "train", classes=CLASSES, layout=FLAT, partition=partition)
    other = folder_dataset(root, "val", classes=CLASSES, layout=FLAT, partition=partition)
    assert len(data) == len(other) == 2 and data.fingerprint() != other.fingerprint()
    write_json(root / "split.json", {"train": data.names, "val": other.names})
    assert json.loads((root / "split.json").read_text()) == {"train": data.names, "val": other.names}


def test_unsplit_folder_error_suggests_a_partition(fill):
    root = fill("photos", "labels")
    message = assert_refused(lambda: folder_dataset(root, "train", classes=CLASSES), "add ")
    words = dict(word.split("=") for word in message.split("add ")[1].split())
    layout = FolderLayout(words["data.reader.layout.images"], words["data.reader.layout.masks"])
    train, val = names_of(root, "train", "val", layout=layout, partition=Partition(words["data.reader.partition.by"]))
    assert sorted(train + val) == ["x", "y", "z"]
    fill("train/images", "train/masks")
    with pytest.raises(UserError, match=r"Check data.root and data.reader.layout\.$"):
        folder_dataset(root, "val", classes=CLASSES)


@pytest.mark.parametrize("ending", ["gif", "HEIC", "jp2", "avif"])
def test_images_of_unsupported_formats_are_reported(fill, ending):
    root = fill()
    images, masks = root / "train/images", root / "train/masks"
    (images / "x.png").rename(images / f"x.{ending}")
    (masks / "y.png").rename(masks / f"y.{ending}")
    (images / f"new.{ending}").touch()
    (images / f"z.{ending}").touch()  # beside one that is read
    data = folder_dataset(root, "train", classes=CLASSES)
    assert data.names == ["z"] and sorted(data.lacking) == ["new", "x", "y"]
    assert all(f".{ending} has an unsupported format" in reason for reason in data.lacking.values())
    assert data.remedy == "Convert such files to PNG, or move them away."


@pytest.mark.parametrize(("layout", "partition"), [(FolderLayout(), Partition()), (FLAT, Partition("fraction"))])
def test_empty_split_is_refused(tmp_path, layout, partition):
    for folder in ("train/images", "train/masks", "images", "masks"):
        Path(tmp_path, folder).mkdir(parents=True)
    refused(tmp_path, "train", "Split train is empty: ", "images holds no image", layout=layout, partition=partition)


def test_wrong_folders_and_files_are_named(fill):
    root = fill()
    refused(root, "val", "No folder ", "val/images for split val ", "holds the folders train.")
    layout = FolderLayout(masks="{split}/labels")
    refused(root, "train", "No folder ", "train/labels ", "holds the folders images, masks", layout=layout)
    words = "and data.reader.layout.masks=masks: with data.reader.partition.by=folder, both must contain {split}"
    refused(root, "train", words, layout=FLAT)
    refused(root, "train", "with by=fraction, which splits one folder, neither may", partition=Partition("fraction"))
    save(root / "train/images/x.jpg", np.zeros((4, 6, 3)))
    refused(root, "train", "x.jpg and ", "x.png have the same name (x)")


def test_size_mismatches_are_refused(fill):
    root = fill(size=(40, 60))
    mask = np.arange(30)[None].repeat(20, axis=0) >= 15
    save(root / "train/masks/x.png", mask)
    given = folder_dataset(root, "train", classes=CLASSES)
    assert_refused(lambda: given[0], "x.png is 60 x 40 ", "x.png is 30 x 20", "on_size_mismatch=resize_mask")
    data = folder_dataset(root, "train", classes=CLASSES, masks=Masks(on_size_mismatch="resize_mask"))
    expected = np.arange(60)[None].repeat(40, axis=0) >= 30
    np.testing.assert_array_equal(data[0]["mask"], expected)
    np.testing.assert_array_equal(data.mask(0), expected)
    save(root / "train/masks/x.png", mask.T)
    assert_refused(lambda: data[0], "20 x 30", "aspect ratio differs by up to 5%", "EXIF")


def test_fingerprint_follows_files_and_rules(fill):
    root = fill()

    def key(**options):
        return folder_dataset(root, "train", **{"classes": CLASSES, **options}).fingerprint()

    keys = [key(), key(classes=["a", "c"]), key(ignore_index=254), key(masks=Masks(ids={9: 0}))]
    keys.append(key(masks=Masks(others="b")))
    assert key() == keys[0]
    os.utime(root / "train/masks/y.png", ns=(1, 1))
    keys.append(key())
    for kind in ("images", "masks"):
        (root / f"train/{kind}/z.png").rename(root / f"train/{kind}/zz.png")
    keys.append(key())
    assert len(set(keys)) == 7


def test_fingerprint_differs_for_roots_with_equal_file_stats(tmp_path):
    keys = []
    for place, value in (("a", 0), ("b", 1)):
        for kind in ("images", "masks"):
            path = save(tmp_path / place / f"train/{kind}/x.png", np.full((4, 6), value), compress_level=0)
            os.utime(path, ns=(7, 7))
        data = folder_dataset(tmp_path / place, "train", classes=CLASSES)
        keys.append((data.fingerprint(), path.stat().st_size, path.stat().st_mtime_ns))
    assert keys[0][1:] == keys[1][1:] and keys[0][0] != keys[1][0]
    inside = os.stat(path)
    save(path, np.full((4, 6), 0), compress_level=0)  # changed in its place, and its time set back
    os.utime(path, ns=(inside.st_atime_ns, inside.st_mtime_ns))
    assert path.stat().st_size == inside.st_size and path.stat().st_mtime_ns == inside.st_mtime_ns
    assert folder_dataset(tmp_path / "b", "train", classes=CLASSES).fingerprint() != keys[1][0]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert folder_dataset(tmp_path / "link", "train", classes=CLASSES).fingerprint() == keys[0][0]
