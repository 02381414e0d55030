"""The folder of cached data."""

import os
from pathlib import Path

import numpy as np
import pytest
from making import save, write_video

from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.scan.scan import class_counts
from dinoseg.extensions.feature_cache.key import origin
from dinoseg.extensions.packed.pack import pack
from dinoseg.extensions.video.index import find_index

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


def write_dataset(root):
    for folder in ("images", "masks"):
        save(root / f"train/{folder}/a.png", np.zeros((4, 5)))
    return folder_dataset(root, "train", classes=("a",))


WRITERS = {
    "scan": lambda cache: class_counts(write_dataset(cache.parent / "data"), cache),
    "packed data": lambda cache: pack(write_dataset(cache.parent / "data"), cache_dir=cache, workers=1),
    "video index": lambda cache: find_index(write_video(cache.parent / "a.avi", 3), cache),
    "features": lambda cache: origin(cache / "features", {"weights": "a"}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_new_cache_dir_is_for_its_owner_alone(writer, tmp_path):
    cache = tmp_path / "outputs/.cache"
    before = os.umask(0)
    try:
        WRITERS[writer](cache)
    finally:
        os.umask(before)
    assert any(cache.iterdir())
    assert cache.stat().st_mode & 0o777 == 0o700 and cache.parent.stat().st_mode & 0o777 == 0o777


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("writer", WRITERS)
def test_pipes_and_links_in_the_cache_are_harmless(writer, kind, tmp_path):
    cache, notes = tmp_path / "cache", tmp_path / "notes"
    notes.write_text("of the user\n")
    WRITERS[writer](cache)
    for path in [path for path in cache.rglob("*") if path.is_file()]:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(notes)
    WRITERS[writer](cache)
    assert notes.read_text() == "of the user\n"


def test_existing_cache_dir_keeps_its_permissions(tmp_path):
    tmp_path.chmod(0o755)
    WRITERS["features"](tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_home_in_cache_dir_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    class_counts(write_dataset(tmp_path / "data"), "~/cache")
    find_index(write_video(tmp_path / "a.avi", 3), Path("~/cache"))
    assert list((tmp_path / "cache").glob("scan_*.json")) and list((tmp_path / "cache/videos").glob("a_*.npz"))
    assert not (tmp_path / "~").exists()
