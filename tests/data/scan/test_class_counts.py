import logging
import os

import numpy as np
import pytest
from making import Pictures, save

from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.data.scan.scan import scan
from dinoseg.utils.errors import UserError


@pytest.fixture
def load(tmp_path):
    for name, mask in {"x": [[0, 1, 1], [255, 255, 1]], "y": [[0, 0, 0], [0, 3, 3]]}.items():
        save(tmp_path / f"train/images/{name}.png", np.zeros((2, 3, 3)))
        save(tmp_path / f"train/masks/{name}.png", mask)

    def build(**options):
        return folder_dataset(tmp_path, "train", classes=["a", "b", "c", "d"], **options)

    return build


def test_class_counts_are_exact_and_cached(load, tmp_path, monkeypatch):
    cache = tmp_path / "new/cache"
    counts = class_counts(load(), cache)
    assert counts.dtype == np.int64 and counts.tolist() == [5, 3, 0, 2]
    monkeypatch.setattr(MaskReader, "read", lambda *_: pytest.fail("read twice"))
    assert class_counts(load(), cache).tolist() == [5, 3, 0, 2]


def test_masks_that_were_scanned_are_not_read_again(load, tmp_path, monkeypatch):
    data = load()
    scan(data.pairs, data.reader, images=False, cache_dir=tmp_path / "c")
    monkeypatch.setattr(MaskReader, "read", lambda *_: pytest.fail("read twice"))
    assert class_counts(data, tmp_path / "c").tolist() == [5, 3, 0, 2]


def test_changed_file_or_mask_rule_is_counted_again(load, tmp_path):
    assert class_counts(load(), tmp_path / "c").tolist() == [5, 3, 0, 2]
    assert class_counts(load(masks=Masks(ids={1: 2})), tmp_path / "c").tolist() == [5, 0, 3, 2]
    save(tmp_path / "train/masks/x.png", [[2, 2, 2], [2, 2, 2]])
    os.utime(tmp_path / "train/masks/x.png", ns=(5, 5))
    assert class_counts(load(), tmp_path / "c").tolist() == [4, 0, 6, 2]


def test_an_ignored_class_does_not_count(load, tmp_path):
    save(tmp_path / "train/masks/x.png", [[2, 2, 2], [1, 1, 2]])
    assert class_counts(load(ignore_index=0), tmp_path / "c").tolist() == [0, 2, 4, 2]


def test_a_cache_that_cannot_be_written_only_warns(load, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert class_counts(load(), tmp_path / "file").tolist() == [5, 3, 0, 2]
    assert "Cannot store" in caplog.text


def test_data_without_files_is_counted_each_time(tmp_path):
    data = Pictures([(5, 5), (6, 4)])
    counts = class_counts(data, tmp_path / "c")
    assert counts.shape == (3,) and counts.sum() == 49
    assert not (tmp_path / "c").exists()


def test_bad_ids_are_reported(load, tmp_path):
    save(tmp_path / "train/masks/y.png", [[9, 0, 0], [0, 0, 0]])
    with pytest.raises(UserError, match=r"y\.png holds the ids 9"):
        class_counts(load(), tmp_path / "c")


def test_roots_with_equal_file_stats_are_counted_separately(tmp_path):
    counts = []
    for place, value in (("a", 0), ("b", 1)):
        for kind in ("images", "masks"):
            path = save(tmp_path / place / f"train/{kind}/x.png", np.full((4, 6), value), compress_level=0)
            os.utime(path, ns=(7, 7))
        data = folder_dataset(tmp_path / place, "train", classes=["a", "b"])
        counts.append(class_counts(data, tmp_path / "c").tolist())
    assert counts == [[24, 0], [0, 24]]
