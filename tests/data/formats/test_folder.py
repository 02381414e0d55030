import json
import os
from pathlib import Path

import numpy as np
import pytest
from making import save

from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.splits import Partition
from dinoseg.report.palette import default_palette
from dinoseg.testing import check_dataset
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

CLASSES = ["a", "b"]
FLAT = FolderLayout("images", "masks")


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
    data = folder_dataset(
        tmp_path, "train", classes=CLASSES, layout=FolderLayout("{split}", "{split}", mask_suffix="_mask")
    )
    assert data.names == ["p.q", "r"]


def test_split_folder_names_are_mapped_and_desktop_files_skipped(fill):
    root = fill("train_images", "train_masks")
    fill("valid_images", "valid_masks", ["v"])
    (root / "valid_images/._v.png").write_bytes(b"junk")
    (root / "valid_images/Thumbs.db").write_bytes(b"junk")
    layout = FolderLayout("{split}_images", "{split}_masks", splits={"val": "valid"})
    assert folder_dataset(root, "val", classes=CLASSES, layout=layout).names == ["v"]
    assert len(folder_dataset(root, "train", classes=CLASSES, layout=layout)) == 3


def test_linked_folders_are_followed(fill, tmp_path):
    root = fill("elsewhere/images", "elsewhere/masks")
    (tmp_path / "train").mkdir()
    os.symlink(root / "elsewhere/images", tmp_path / "train/images")
    (tmp_path / "train/masks").mkdir()
    os.symlink(root / "elsewhere/masks", tmp_path / "train/masks/deep")
    with pytest.raises(
        UserError, match=r"(?s)no image with its mask:\n- deep/x: .*deep/x.png has no image in .*and 3 more: x, "
    ):
        folder_dataset(root, "train", classes=CLASSES)


def test_link_cycles_are_skipped(fill, tmp_path):
    root = fill()
    for folder in ("images", "masks"):
        (root / f"train/{folder}/again").symlink_to(root / f"train/{folder}")
        (root / f"train/{folder}/up").symlink_to(tmp_path)
    assert folder_dataset(root, "train", classes=CLASSES).names == ["x", "y", "z"]


def test_fraction_splits_the_names(fill):
    root = fill("images", "masks", [f"v{i // 2}_{i}" for i in range(10)])
    partition = Partition("fraction", val_fraction=0.4, seed=1, group=r"^v\d+")
    train, val = (
        folder_dataset(root, split, classes=CLASSES, layout=FLAT, partition=partition).names
        for split in ("train", "val")
    )
    assert len(val) == 4 and sorted(train + val) == sorted(f"v{i // 2}_{i}" for i in range(10))
    assert not {n[:2] for n in train} & {n[:2] for n in val}
    with pytest.raises(UserError, match="fraction has the splits train and val only, not test"):
        folder_dataset(root, "test", classes=CLASSES, layout=FLAT, partition=partition)


def test_name_lists_define_the_splits(fill):
    root = fill("images", "masks", ["a", "sub/b", "c"])
    (root / "masks/c.png").unlink()
    (root / "train.txt").write_text("sub/b.png\na\n")
    (root / "val.txt").write_text("c\n")
    (root / "test.txt").write_text("nix\nnada\na\n")
    partition = Partition("lists", {"train": "train.txt", "val": "val.txt", "test": "test.txt"})

    def load(split):
        return folder_dataset(root, split, classes=CLASSES, layout=FLAT, partition=partition)

    assert load("train").names == ["sub/b", "a"]
    with pytest.raises(
        UserError, match=r"Split val has no image with its mask:\n- c: .*c\.png has no mask in .*masks\."
    ):
        load("val")
    with pytest.raises(UserError, match="2 names without image and mask.*: nix, nada"):
        load("test")
    with pytest.raises(UserError, match="No file list for split extra.*train, val, test"):
        load("extra")


def test_lists_pass_over_images_without_mask(fill):
    root = fill("images", "masks")
    (root / "masks/z.png").unlink()
    save(root / "images/more.jpg", np.zeros((4, 6, 3)))
    (root / "some.txt").write_text("y\nx\n")
    partition = Partition("lists", {"train": "some.txt"})
    assert folder_dataset(root, "train", classes=CLASSES, layout=FLAT, partition=partition).names == ["y", "x"]


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
    partition = Partition("fraction", val_fraction=0.4, seed=1)

    def load():
        return [folder_dataset(root, s, classes=CLASSES, layout=FLAT, partition=partition) for s in ("train", "val")]

    whole = [data.names for data in load()]
    for name in (whole[0][2], whole[1][0]):
        (root / f"masks/{name}.png").unlink()
    lame = load()
    for before, data, lost in zip(whole, lame, (whole[0][2], whole[1][0]), strict=True):
        assert list(data.lacking) == [lost] and data.names == [name for name in before if name != lost]


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


def test_two_files_of_one_name_are_refused(fill):
    root = fill()
    save(root / "train/images/x.jpg", np.zeros((4, 6, 3)))
    with pytest.raises(UserError, match=r"x\.jpg and .*x\.png have the same name \(x\)"):
        folder_dataset(root, "train", classes=CLASSES)


def test_missing_folders_are_refused(fill, tmp_path):
    root = fill()
    with pytest.raises(UserError, match=r"data\.root=.*gone is not a folder"):
        folder_dataset(tmp_path / "gone", "train", classes=CLASSES)
    with pytest.raises(UserError, match=r"No folder .*val/images for split val .*holds the folders train\."):
        folder_dataset(root, "val", classes=CLASSES)
    with pytest.raises(UserError, match=r"No folder .*train/labels .*holds the folders images, masks"):
        folder_dataset(root, "train", classes=CLASSES, layout=FolderLayout(masks="{split}/labels"))


def test_unsplit_folder_error_suggests_a_partition(fill):
    root = fill("photos", "labels")
    with pytest.raises(UserError) as raised:
        folder_dataset(root, "train", classes=CLASSES)
    words = dict(word.split("=") for word in str(raised.value).split("add ")[1].split())
    layout = FolderLayout(words["data.reader.layout.images"], words["data.reader.layout.masks"])
    partition = Partition(words["data.reader.partition.by"])
    found = [
        folder_dataset(root, split, classes=CLASSES, layout=layout, partition=partition) for split in ("train", "val")
    ]
    assert sorted(found[0].names + found[1].names) == ["x", "y", "z"]
    fill("train/images", "train/masks")
    with pytest.raises(UserError, match=r"Check data.root and data.reader.layout\.$"):
        folder_dataset(root, "val", classes=CLASSES)


@pytest.mark.parametrize("masks", [Masks(), Masks("palette")])
def test_swapped_folders_are_named(fill, masks):
    root = fill()
    for path in (root / "train/images").iterdir():
        save(path, np.random.default_rng(0).integers(0, 256, (9, 8, 3)))
    if masks.format == "palette":
        for path in (root / "train/masks").iterdir():
            save(path, np.zeros((4, 6, 3)))
    layout = FolderLayout("{split}/masks", "{split}/images")
    with pytest.raises(
        UserError, match=r"masks/x.png can be read as a mask, and .*images/x.png cannot: .* are swapped"
    ):
        folder_dataset(root, "train", classes=CLASSES, layout=layout, masks=masks)
    folder_dataset(root, "train", classes=CLASSES, masks=masks)
    save(root / "train/images/x.png", np.zeros((4, 6, 3)))
    save(root / "train/masks/x.png", np.full((4, 6), 7))  # only an id without class
    assert len(folder_dataset(root, "train", classes=CLASSES, masks=masks)) == 3


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


@pytest.mark.parametrize("partition", [Partition(), Partition("fraction")])
def test_empty_split_is_refused(tmp_path, partition):
    layout = FolderLayout() if partition.by == "folder" else FLAT
    for folder in ("train/images", "train/masks", "images", "masks"):
        Path(tmp_path, folder).mkdir(parents=True)
    with pytest.raises(UserError, match=r"Split train is empty: .*images holds no image"):
        folder_dataset(tmp_path, "train", classes=CLASSES, layout=layout, partition=partition)


def test_partition_and_layout_must_fit(fill):
    root = fill()
    with pytest.raises(
        UserError, match=r"and data\.reader\.layout\.masks=masks must both contain \{split\}; otherwise"
    ):
        folder_dataset(root, "train", classes=CLASSES, layout=FLAT)
    with pytest.raises(UserError, match="name it without {split}"):
        folder_dataset(root, "train", classes=CLASSES, partition=Partition("fraction"))


def test_size_mismatches_are_refused(fill):
    root = fill(size=(40, 60))
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 15:] = 1
    save(root / "train/masks/x.png", mask)
    with pytest.raises(UserError, match=r"x\.png is 60 x 40 .*x\.png is 30 x 20.*on_size_mismatch=resize_mask"):
        folder_dataset(root, "train", classes=CLASSES)[0]
    data = folder_dataset(root, "train", classes=CLASSES, masks=Masks(on_size_mismatch="resize_mask"))
    expected = np.zeros((40, 60), np.uint8)
    expected[:, 30:] = 1
    np.testing.assert_array_equal(data[0]["mask"], expected)
    np.testing.assert_array_equal(data.mask(0), expected)
    save(root / "train/masks/x.png", mask.T)
    with pytest.raises(UserError, match="aspect ratios differ by more than 5%"):
        data[0]


def test_unreadable_files_are_named(fill):
    root = fill()
    whole = (root / "train/images/y.png").read_bytes()
    (root / "train/images/y.png").write_bytes(whole[: len(whole) // 2])
    (root / "train/masks/z.png").write_bytes(b"")
    data = folder_dataset(root, "train", classes=CLASSES)
    with pytest.raises(UserError, match=r"images/y\.png"):
        data[1]
    with pytest.raises(UserError, match=r"masks/z\.png"):
        data[2]


def test_fingerprint_follows_files_and_rules(fill):
    root = fill()

    def key(**options):
        return folder_dataset(root, "train", **{"classes": CLASSES, **options}).fingerprint()

    first = key()
    assert first == key()
    others = [
        key(classes=["a", "c"]),
        key(ignore_index=254),
        key(masks=Masks(ids={9: 0})),
        key(masks=Masks(others="b")),
    ]
    os.utime(root / "train/masks/y.png", ns=(1, 1))
    others.append(key())
    (root / "train/images/z.png").rename(root / "train/images/zz.png")
    (root / "train/masks/z.png").rename(root / "train/masks/zz.png")
    others.append(key())
    assert len({first, *others}) == 7


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
