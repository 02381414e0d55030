"""The check before a training: it stops on errors and warns of leaks, each once and with its remedy."""

import os
import shutil

import pytest
from doctor_sets import open_split, rewrite, rewrite_all, scene, splits_of, write, write_clean
from making import save
from mistakes import assert_refused

from dinoseg.core.channels import PixelFormat
from dinoseg.data.checks.errors import check_for_errors, find_errors
from dinoseg.data.classes.masks import Masks
from dinoseg.data.opened import prepare_dataset as as_configured
from dinoseg.extensions.doctor.examine import examine


@pytest.fixture
def root(tmp_path):
    return write_clean(tmp_path)


def check(root, train=None, val=None, **options):
    """Check both splits of a folder, or given data sets, before a training."""
    train, val = (data or open_split(root, split, **options) for split, data in (("train", train), ("val", val)))
    check_for_errors(train, val, cache_dir=root / "cache")


def copies_are_found(root, **options):
    return "same_files" in {each.code for each in find_errors(splits_of(root, **options))}


def test_the_check_before_a_training_reads_no_image(root, caplog):
    for path in (root / "train/images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:300] + b"IEND")  # the header and the end are there
    check(root)
    assert not caplog.records
    (root / "val/masks/v").rename(root / "val/masks/d0")
    (root / "val/images/v").rename(root / "val/images/d0")
    check(root)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "train and in val: d0" in told and "Put all frames of a video or drive into one split" in told


def test_the_check_before_a_training_stops_on_errors(root):
    train, val = (open_split(root, split).read_as(PixelFormat(channels=4)) for split in ("train", "val"))
    assert_refused(lambda: check(root, train, val), "has 3 channels, and data.channels=4. Set data.channels=3")
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask + 7)
    (root / "val/masks/v/f1.png").write_bytes(b"")
    words = ("errors that stop a training", "cannot be read", "v/f1.png", ": 7 (in", "mode=doctor")
    assert_refused(lambda: check(root), *words)
    assert [f.code for f in find_errors(splits_of(root, images=False))] == ["unreadable_mask", "foreign_ids"]
    check(root, train=[1, 2])  # no pairs of files: nothing to scan


def test_repeated_fault_is_reported_once_with_its_remedy(root):
    masks = sorted((root / "train/masks").rglob("*.png"))[:3]
    for mask in masks:
        rewrite(mask, lambda pixels: pixels + 7)
    told = assert_refused(lambda: check(root), "'++data.reader.masks.ids={7: 255, 8: 255, 9: 255}'")
    assert all(told.count(str(mask)) == 1 for mask in masks) and told.count("correct the masks") == 1


def test_advice_is_left_to_the_doctor(root, caplog):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask * 0 + 255)
    rewrite(root / "train/masks/d0/f1.png", lambda mask: mask[::2, ::2])
    classes = {"classes": ("ground", "left", "Left", "moon"), "palette": None}
    options = {**classes, "masks": Masks(on_size_mismatch="resize_mask")}
    check(root, **options)
    assert not caplog.records
    advice = {each.code for each in examine(splits_of(root, **options))}
    assert {"all_void", "resized_masks", "similar_class_names", "class_never_seen"} <= advice


@pytest.mark.parametrize("how", ["same", "linked", "copied"])
def test_train_and_val_of_the_same_files(root, caplog, how):
    shutil.rmtree(root / "val")
    if how == "linked":
        (root / "val").symlink_to(root / "train")
    elif how == "copied":
        shutil.copytree(root / "train", root / "val")
    val = open_split(root, "train" if how == "same" else "val")
    words = ("12 files of 12 images of val also in train", "Give val separate images")
    if how == "copied":
        check(root, val=val)
        assert all(word in caplog.text for word in words)
    else:
        assert_refused(lambda: check(root, val=val), *words)


def test_some_files_on_both_sides_only_warn(root, caplog):
    for kind in ("images", "masks"):
        (root / f"val/{kind}/d0").mkdir()
        os.symlink(root / f"train/{kind}/d0/f1.png", root / f"val/{kind}/d0/f1.png")
    check(root)
    assert "1 file of 5 images of val also in train" in caplog.text
    errors = {each.code: each for each in examine(splits_of(root)) if each.severity == "error"}
    # mode=doctor calls them errors, on which training does not stop
    assert errors.keys() == {"same_files", "group_on_both_sides"}
    assert not any(each.stops for each in errors.values())


@pytest.mark.parametrize("suffix", ["png", "bmp"])  # bitmaps have equal lengths
@pytest.mark.parametrize("images", [False, True])
def test_equal_names_masks_and_lengths_are_no_copies(tmp_path, images, suffix):
    for split, first in (("train", 0), ("val", 20)):
        for number, name in enumerate("ab", start=first):
            save(tmp_path / split / f"images/{name}.{suffix}", scene(number)[0])
            save(tmp_path / split / f"masks/{name}.png", scene(3)[1])
    assert (len({path.stat().st_size for path in tmp_path.rglob(f"images/a.{suffix}")}) == 1) == (suffix == "bmp")
    assert not copies_are_found(tmp_path, images=images)


def test_copies_are_found_by_their_masks(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, ["a", "b"])
    for decoded in (True, False):  # if one split is decoded
        train, val = (splits_of(tmp_path, decoded == (split == "train"), [split])[0] for split in ("train", "val"))
        assert "same_files" in {each.code for each in find_errors([train, val])}
    rewrite_all(tmp_path, lambda mask: mask * 0 + 1, "*/masks/*.png")  # one class in all
    assert not copies_are_found(tmp_path)


def test_jpeg_masks_that_were_left_out_stop_nothing(root):
    save(root / "train/masks/d0/f2.png", scene(2)[1] * 0 + 1, format="JPEG", quality=100)
    assert_refused(lambda: check(root), "1 of 16 masks are JPEG files", "f2.png is a JPEG file")
    kept = as_configured(open_split(root, "train"), split="train", on_error="skip", cache_dir=root / "cache")
    check(root, train=kept)
    assert list(kept.skipped) == ["d0/f2"]


def test_undecodable_file_name_is_reported_escaped(root):
    for kind, pixels in zip(("images", "masks"), scene(50), strict=True):
        plain = save(root / f"train/{kind}/plain.png", pixels + 40 * (kind == "masks"))
        os.rename(plain, os.fsencode(plain.parent) + b"/caf\xe9.png")
    assert_refused(lambda: check(root), r"caf\xe9.png: 40, 41, 42").encode("utf-8")


@pytest.mark.parametrize(("splits", "value"), [(("train",), 7), (("val",), 255), (("train", "val"), 7)])
def test_a_split_without_labels_stops_training(root, splits, value):
    for split in splits:
        rewrite_all(root, lambda mask: mask * 0 + value, f"{split}/masks/*/*.png")
    words = [f"no labelled pixel in {split}" for split in splits]
    assert_refused(lambda: check(root, masks=Masks(ids={7: 255})), *words, "data.reader.masks.ids")
