"""The check before a training: it stops on errors and warns of leaks, each once and with its remedy."""

import os
import re
import shutil

import pytest
from doctor_sets import open_split, rewrite, scene, splits_of, write, write_clean
from making import save

from dinoseg.core.channels import PixelFormat
from dinoseg.data.classes.masks import Masks
from dinoseg.data.doctor.errors import check_for_errors, find_errors
from dinoseg.data.doctor.examine import examine
from dinoseg.data.opened import prepare_dataset as as_configured
from dinoseg.utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    return write_clean(tmp_path)


def test_the_check_before_a_training_reads_no_image(root, tmp_path, caplog):
    for path in (root / "train/images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:300] + b"IEND")  # the header and the end are there
    cache = tmp_path / "cache"
    check_for_errors(open_split(root, "train"), open_split(root, "val"), cache_dir=cache)
    assert not caplog.records
    (root / "val/masks/v").rename(root / "val/masks/d0")
    (root / "val/images/v").rename(root / "val/images/d0")
    check_for_errors(open_split(root, "train"), open_split(root, "val"), cache_dir=cache)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "train and in val: d0" in told and "Put all frames of a video or drive into one split" in told


def test_images_of_another_number_of_channels_stop_a_training(root, tmp_path):
    train, val = (open_split(root, split).read_as(PixelFormat(channels=4)) for split in ("train", "val"))
    with pytest.raises(UserError, match=r"has 3 channels, and data\.channels=4\. Set data\.channels=3"):
        check_for_errors(train, val, cache_dir=tmp_path / "cache")


def test_the_check_before_a_training_stops_on_errors(root, tmp_path):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask + 7)
    (root / "val/masks/v/f1.png").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"errors that stop a training(?s:.*)cannot be read(?s:.*)v/f1.png(?s:.*): 7 \(in(?s:.*)mode=doctor",
    ):
        check_for_errors(open_split(root, "train"), open_split(root, "val"), cache_dir=tmp_path / "cache")
    assert [f.code for f in find_errors(splits_of(root, images=False))] == ["unreadable_mask", "foreign_ids"]
    check_for_errors(
        [1, 2], open_split(root, "val"), cache_dir=tmp_path / "cache"
    )  # no pairs of files: nothing to scan


def test_repeated_fault_is_reported_once_with_its_remedy(root, tmp_path):
    masks = sorted((root / "train/masks").rglob("*.png"))
    for mask in masks[:3]:
        rewrite(mask, lambda pixels: pixels + 7)
    with pytest.raises(UserError) as caught:
        check_for_errors(open_split(root, "train"), open_split(root, "val"), cache_dir=tmp_path / "cache")
    told = str(caught.value)
    assert all(told.count(str(mask)) == 1 for mask in masks[:3]) and told.count("Correct the masks") == 1
    assert "'++data.reader.masks.ids={7: 255, 8: 255, 9: 255}'" in told


def test_advice_is_left_to_the_doctor(root, tmp_path, caplog):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask * 0 + 255)
    rewrite(root / "train/masks/d0/f1.png", lambda mask: mask[::2, ::2])
    options = {
        "classes": ("ground", "left", "Left", "moon"),
        "palette": None,
        "masks": Masks(on_size_mismatch="resize_mask"),
    }
    check_for_errors(
        open_split(root, "train", **options), open_split(root, "val", **options), cache_dir=tmp_path / "cache"
    )
    assert not caplog.records
    advice = {each.code for each in examine(splits_of(root, **options))}
    assert {"all_void", "resized_masks", "similar_class_names", "class_never_seen"} <= advice


@pytest.mark.parametrize("how", ["same", "linked", "copied"])
def test_train_and_val_of_the_same_files(root, tmp_path, caplog, how):
    shutil.rmtree(root / "val")
    if how == "linked":
        (root / "val").symlink_to(root / "train")
    elif how == "copied":
        shutil.copytree(root / "train", root / "val")
    val = open_split(root, "train" if how == "same" else "val")
    message = "train and val are the same data: 12 files of 12 images of val(?s:.*)Give val separate images"
    if how == "copied":
        check_for_errors(open_split(root, "train"), val, cache_dir=tmp_path / "cache")
        assert re.search(message, caplog.text)
        return
    with pytest.raises(UserError, match=message):
        check_for_errors(open_split(root, "train"), val, cache_dir=tmp_path / "cache")


def test_some_files_on_both_sides_only_warn(root, tmp_path, caplog):
    for kind in ("images", "masks"):
        (root / f"val/{kind}/d0").mkdir()
        os.symlink(root / f"train/{kind}/d0/f1.png", root / f"val/{kind}/d0/f1.png")
    check_for_errors(open_split(root, "train"), open_split(root, "val"), cache_dir=tmp_path / "cache")
    assert "1 file of 5 images of val also in train" in caplog.text
    errors = {each.code: each for each in examine(splits_of(root)) if each.severity == "error"}
    # mode=doctor calls them errors, on which training does not stop
    assert errors.keys() == {"same_files", "group_on_both_sides"}
    assert not any(each.stops for each in errors.values())


@pytest.mark.parametrize("images", [False, True])
def test_equal_names_masks_and_lengths_are_no_copies(tmp_path, images):
    for split, first in (("train", 0), ("val", 20)):
        write(tmp_path, split, ["a", "b"], first)
        for number, name in enumerate("ab", start=first):
            save(tmp_path / split / "images" / f"{name}.bmp", scene(number)[0])
            (tmp_path / split / "images" / f"{name}.png").unlink()
            save(tmp_path / split / "masks" / f"{name}.png", scene(3)[1])
    files = [*tmp_path.rglob("a.bmp")]
    assert len(files) == 2 and len({path.stat().st_size for path in files}) == 1
    assert "same_files" not in {each.code for each in find_errors(splits_of(tmp_path, images=images))}


def test_equal_images_with_masks_of_one_class_are_no_copies(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, ["a", "b"])
        for name in "ab":
            rewrite(tmp_path / split / "masks" / f"{name}.png", lambda mask: mask * 0 + 1)
    assert "same_files" not in {each.code for each in find_errors(splits_of(tmp_path))}


def test_copies_are_found_if_one_split_is_decoded(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, ["a", "b"])
    for decoded in (True, False):
        train, val = (splits_of(tmp_path, decoded == (split == "train"), [split])[0] for split in ("train", "val"))
        assert "same_files" in {each.code for each in find_errors([train, val])}


def test_equal_names_and_masks_are_no_copies(tmp_path):
    for split, first in (("train", 0), ("val", 20)):
        write(tmp_path, split, ["a", "b"], first)
        for name in "ab":
            save(tmp_path / split / "masks" / f"{name}.png", scene(3)[1])
    assert "same_files" not in {each.code for each in examine(splits_of(tmp_path))}


def test_jpeg_masks_that_were_left_out_stop_nothing(root, tmp_path, caplog):
    save(root / "train/masks/d0/f2.png", scene(2)[1] * 0 + 1, format="JPEG", quality=100)
    train, val = (open_split(root, split) for split in ("train", "val"))
    with pytest.raises(UserError, match="1 of 16 masks as JPEG files, whatever"):
        check_for_errors(train, val, cache_dir=tmp_path / "cache")
    kept = as_configured(train, split="train", on_error="skip", cache_dir=tmp_path / "cache")
    check_for_errors(kept, val, cache_dir=tmp_path / "cache")
    assert list(kept.skipped) == ["d0/f2"]


def test_undecodable_file_name_is_reported_escaped(root, tmp_path, caplog):
    for kind, pixels in zip(("images", "masks"), scene(50), strict=True):
        plain = save(root / f"train/{kind}/plain.png", pixels + 40 * (kind == "masks"))
        os.rename(plain, os.fsencode(plain.parent) + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"caf\\xe9\.png: 40, 41, 42") as caught:
        check_for_errors(open_split(root, "train"), open_split(root, "val"), cache_dir=tmp_path / "cache")
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("splits", [("train",), ("val",), ("train", "val")])
@pytest.mark.parametrize("value", [7, 255])
def test_a_split_without_labels_stops_training(root, tmp_path, splits, value):
    for split in splits:
        for path in (root / split / "masks").rglob("*.png"):
            rewrite(path, lambda mask: mask * 0 + value)
    data = [open_split(root, split, masks=Masks(ids={7: 255})) for split in ("train", "val")]
    with pytest.raises(UserError) as caught:
        check_for_errors(*data, cache_dir=tmp_path / "cache")
    message = str(caught.value)
    assert all(f"no labelled pixel in {split}" in message for split in splits)
    assert "data.reader.masks.ids" in message


def test_transposed_mask_names_the_orientation(root):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask.T)
    names = open_split(root, "train").names
    with pytest.raises(UserError, match="96 x 128") as caught:
        open_split(root, "train")[names.index("d0/f0")]
    assert "EXIF" in str(caught.value)
    assert "resize_mask" not in str(caught.value)
