"""Data with whatever a disk may hold: names of any letters, and what is no file."""

import os

import numpy as np
from command_line import SMALL, call

from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.opened import prepare_dataset
from dinoseg.utils.images import write_png

NAMES = (
    "a,b=c",
    "-dash",
    "new\nline",
    "[br]ack{et}",
    "é 猫",
    "esc\x1b[31m",
    "${x}",
    "a'b\"c",
    "%s %d",
    "tab\there",
    " x",
)


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
    out = call(tmp_path, "mode=doctor", *SMALL, "hydra.run.dir=doctor").out
    for kind in ("images", "masks"):
        folder = f"data/train/{kind}"
        assert f"    {folder}/pipe.png is a named pipe. Put a file there, or remove it.\n" in out
        assert f"    Cannot read {folder}/zero.png as an image" in out
        assert f"    Cannot read {folder}/loop.png (Too many levels of symbolic links)" in out
    assert "File not found: data/train/images/gone.png." in out
    assert "Cannot read data/train/masks/gone.png (No such file or directory)." in out
    data = folder_dataset(root, "train", classes=["dark", "bright"])
    left = prepare_dataset(data, split="train", on_error="skip", cache_dir=tmp_path / "cache")
    assert left.names == ["a train", "b train", "one pixel train"] and len(left.skipped) == 4
    assert left[2]["image"].shape == (3, 1, 1)
