"""mode=doctor: what it prints and writes, its exit status, and data with whatever a disk may hold."""

import json
import os
import shutil

import numpy as np
import pytest
from command_line import SMALL, call, write_data

from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.opened import prepare_dataset
from dinoseg.utils.images import read_image, write_png

FOLDER = ("mode=doctor", "data=folder", "data.classes=[dark,bright]", "data.root=data", "mode.workers=1")


@pytest.fixture
def where(tmp_path):
    write_data(tmp_path / "data", train=6, val=3)
    return tmp_path


def doctor(where, *arguments):
    """Return what was printed, the JSON and the page, from the folder of the run."""
    done = call(where, *arguments)
    (path,) = where.glob("outputs/*/doctor_*/doctor.json")
    return done, json.loads(path.read_text()), path.with_suffix(".html").read_text()


def codes(report, severity):
    return [finding["code"] for finding in report["findings"] if finding["severity"] == severity]


def test_clean_dataset_has_no_errors(where):
    done, report, page = doctor(where, *FOLDER, "mode.samples=4")
    assert done.status == 0 and "error" not in done.err
    assert report["errors"] == report["warnings"] == 0 and report["notes"] == len(codes(report, "note"))
    assert codes(report, "note") == ["split_left_out", *["constant_class_baseline"] * 2, "class_imbalance"]
    train = report["splits"]["train"]
    assert train["images"] == 6 and report["splits"]["val"]["images"] == 3
    assert train["smallest"] == {"width": 48, "height": 32} and train["void_share"] == 0
    assert sum(row["share"] for row in train["classes"]) == pytest.approx(1)
    assert page.count('<div class="shot">') == 4 and "http:" not in page and "https:" not in page
    assert "smallest (width x height)" in done.out and "48 x 32" in done.out
    assert "findings:     0 errors, 0 warnings, 4 notes" in done.out and "doctor.html" in done.out
    assert list((where / "outputs/.cache").glob("scan_*.json"))


def test_errors_give_status_1_and_keep_the_report(where):
    mask = np.zeros((32, 48), np.uint8)
    mask[0, 0] = 7
    write_png(where / "data/train/masks/2.png", mask)
    (where / "data/val/images/1.png").write_bytes(b"no picture")
    done, report, page = doctor(where, *FOLDER)
    assert done.status == 1 and report["errors"] == 2
    assert codes(report, "error") == ["unreadable_image", "foreign_ids"]
    by_code = {finding["code"]: finding for finding in report["findings"]}
    assert by_code["foreign_ids"]["files"] == ["data/train/masks/2.png"] and by_code["foreign_ids"]["count"] == 1
    assert by_code["unreadable_image"]["files"] == ["data/val/images/1.png"]
    assert list(report["unreadable"]["train"]) == ["2"] and "images/1.png" in report["unreadable"]["val"]["1"]
    assert "ERROR foreign_ids" in done.out and "    data/train/masks/2.png" in done.out and "    -> " in done.out
    assert done.err.count("error:") == 1 and "2 errors and 0 warnings in data=folder" in done.err
    assert "Training stops: fix the errors first" in done.err and "'++data.reader.masks.ids={7: 255}'" in done.out
    assert "foreign_ids" in page and "Traceback" not in done.err


def test_missing_folder_is_a_finding(where):
    shutil.rmtree(where / "data/train/masks")
    done, report, page = doctor(where, *FOLDER)
    assert done.status == 1 and codes(report, "error") == ["split_unreadable"]
    assert "No folder data/train/masks" in report["findings"][0]["message"] and "No folder" in page
    assert list(report["splits"]) == ["val"]
    shutil.rmtree(where / "outputs")
    done, report, _ = doctor(where, *FOLDER, "data.root=nowhere")
    assert done.status == 1 and codes(report, "error") == ["split_unreadable"] * 2
    assert report["splits"] == {} and "data.root=nowhere: file or folder not found" in done.out


def test_unpaired_files_are_findings_and_the_rest_is_examined(where):
    (where / "data/train/masks/3.png").unlink()
    (where / "data/val/images/1.png").unlink()
    done, report, page = doctor(where, *FOLDER)
    assert done.status == 1 and codes(report, "error") == ["no_whole_pair"] * 2
    train, val = report["findings"][:2]
    assert train["files"] == ["3"] and val["files"] == ["1"] and train["stops_training"]
    assert train["reasons"][0].startswith("3: ") and train["reasons"][0] in page
    assert "1 name of train without" in train["message"] and "5 pairs complete" in train["message"]
    assert "data.on_error=skip" in train["remedy"] and report["splits"]["train"]["images"] == 5
    assert report["splits"]["val"]["images"] == 2 and "Training stops: fix" in done.err


def test_undecodable_file_name_is_reported_escaped(where):
    for kind in ("images", "masks"):
        file = os.fsencode(where / "data/train" / kind)
        os.rename(file + b"/2.png", file + b"/caf\xe9.png")
    write_png(os.fsdecode(os.fsencode(where / "data/train/masks") + b"/caf\xe9.png"), np.full((32, 48), 9, np.uint8))
    done, report, page = doctor(where, *FOLDER)
    assert done.status == 1 and "Traceback" not in done.err and r"caf\xe9.png" in page
    assert report["findings"][0]["files"] == [r"data/train/masks/caf\xe9.png"]
    assert list(report["unreadable"]["train"]) == [r"caf\xe9"] and r"masks/caf\xe9.png: 9" in done.out


def test_an_error_that_training_only_warns_of(where):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            folder = where / "data" / split / kind
            (folder / "drive").mkdir()
            (folder / "0.png").rename(folder / f"drive/{split}.png")
    done, report, page = doctor(where, *FOLDER)
    assert done.status == 1 and codes(report, "error") == ["group_on_both_sides"]
    assert not report["findings"][0]["stops_training"] and "fix the errors first" not in done.err
    assert "1 error and 0 warnings in" in done.err and "Training only warns about these errors" in done.err
    assert "ERROR group_on_both_sides (training does not stop on it)" in done.out


def test_home_made_idd_labels_under_another_name(tmp_path):
    for split in ("train", "val"):
        stem = tmp_path / "data/{}" / split / "7/a"
        write_png(str(stem).format("leftImg8bit") + "_leftImg8bit.png", np.zeros((8, 8, 3), np.uint8))
        write_png(str(stem).format("gtFine") + "_gtFine_labelIds.png", np.full((8, 8), 24, np.uint8))
    done, report, _ = doctor(tmp_path, "mode=doctor", "data=idd", "data.root=data")
    assert done.status == 1 and "home_made_idd" in codes(report, "error")
    assert "255 is void" in done.out and "home-made" in done.out


def test_a_test_split_that_is_the_val_split_is_left_out(where):
    done, report, _ = doctor(where, *FOLDER, "+data.reader.layout.splits.test=val", "mode.images=false")
    assert done.status == 0 and list(report["splits"]) == ["train", "val"]
    assert "Split test is left out: it is val, file by file." in done.out
    assert "class_imbalance" in codes(report, "note")  # without reading images


def test_near_duplicates_are_found_unless_images_are_left_out(where):
    image = read_image(where / "data/train/images/2.png")
    write_png(where / "data/val/images/1.png", np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8))
    for images in (True, False):
        _, report, _ = doctor(where, *FOLDER, f"mode.images={images}")
        assert codes(report, "warning") == ["near_duplicate_across_splits"] * images
        shutil.rmtree(where / "outputs")


def test_long_file_lists_are_shortened(where):
    for index in range(12):
        write_png(where / f"data/train/masks/x{index}.png", np.full((32, 48), 9, np.uint8))
        write_png(where / f"data/train/images/x{index}.png", np.zeros((32, 48, 3), np.uint8))
    done, report, _ = doctor(where, *FOLDER)
    (foreign,) = [finding for finding in report["findings"] if finding["code"] == "foreign_ids"]
    assert foreign["count"] == len(foreign["files"]) == 12 and "    and 9 more\n    -> " in done.out


NAMES = ("a,b=c", "-dash", "new\nline", "[br]ack{et}", "é 猫", "esc\x1b[31m", "${x}", "a'b\"c", "%s %d")
NAMES += ("tab\there", " x")


def write(root, split, name, size=(32, 48)):
    image = np.random.default_rng([ord(letter) for letter in name]).integers(0, 256, (*size, 3)).astype(np.uint8)
    write_png(root / split / "images" / f"{name}.png", image)
    write_png(root / split / "masks" / f"{name}.png", (image.mean(axis=-1) > 127).astype(np.uint8))


def test_names_in_any_script_train_and_are_reported(tmp_path):
    for name in NAMES:
        write(tmp_path / "data", "train", name)
    for name in NAMES[:3]:
        write(tmp_path / "data", "val", f"{name} val")
    (tmp_path / "data/val/masks/new\nline val.png").write_bytes(b"cut")
    done = call(tmp_path, "mode=train", *SMALL, "hydra.run.dir=run", "data.on_error=skip", "trainer.steps=1")
    assert done.status == 0 and "\x1b[31m" not in done.out + done.err, done.err
    assert r"Cannot read data/val/masks/new\nline val.png as an image" in done.out


def test_unreadable_files_are_reported_and_can_be_skipped(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("a", "b"):
            write(root, split, f"{name} {split}")
        write(root, split, f"one pixel {split}", (1, 1))
    for kind in ("images", "masks"):
        folder = root / "train" / kind
        os.mkfifo(folder / "pipe.png")
        (folder / "zero.png").touch()
        (folder / "gone.png").symlink_to("nowhere.png")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "folder.png").mkdir()  # is searched as any other
    call(tmp_path, "mode=doctor", *SMALL, "hydra.run.dir=doctor")
    out = (tmp_path / "doctor/doctor.json").read_text()
    for kind in ("images", "masks"):
        folder = f"data/train/{kind}"
        assert f'"{folder}/pipe.png is a named pipe. Put a file there, or remove it."' in out
        assert f"Cannot read {folder}/zero.png as an image" in out
        assert f"Cannot read {folder}/loop.png (Too many levels of symbolic links)" in out
    assert "File not found: data/train/images/gone.png." in out
    assert "Cannot read data/train/masks/gone.png (No such file or directory)." in out
    data = folder_dataset(root, "train", classes=["dark", "bright"])
    left = prepare_dataset(data, split="train", on_error="skip", cache_dir=tmp_path / "cache")
    assert left.names == ["a train", "b train", "one pixel train"] and len(left.skipped) == 4
    assert left[2]["image"].shape == (3, 1, 1)
