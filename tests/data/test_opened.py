"""A data set without what cannot be read, and from its packed file."""

import numpy as np
import pytest
from making import save
from mistakes import assert_refused

from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.scan.scan import class_counts
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.packed.pack import pack


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        save(tmp_path / f"data/train/images/n{index}.png", rng.integers(0, 255, (20 + index, 30, 3)))
        save(tmp_path / f"data/train/masks/n{index}.png", np.full((20 + index, 30), index % 2))
    return lambda: folder_dataset(tmp_path / "data", "train", classes=["a", "b"])


def skip(found, tmp_path, **options):
    """Return a dataset without what cannot be read."""
    options |= {"split": "train", "on_error": "skip", "cache_dir": tmp_path / "cache"}
    return prepare_dataset(found, workers=1, **options)


def test_skipping_unreadable_samples_preserves_the_order(data, tmp_path, caplog):
    (tmp_path / "data/train/images/n1.png").write_bytes(b"no picture")
    save(tmp_path / "data/train/masks/n2.png", np.zeros((22, 30)), format="JPEG")
    save(tmp_path / "data/train/masks/n3.png", np.full((23, 30), 7))
    save(tmp_path / "data/train/masks/n4.png", np.full((5, 5), 1))
    kept = skip(data(), tmp_path)
    assert kept.names == ["n0", "n5"] and list(kept.skipped) == ["n1", "n2", "n3", "n4"]
    assert "split train has 2 images; left out: 4." in caplog.text
    for name, word in (("n1", "n1.png"), ("n2", "JPEG"), ("n3", "7"), ("n4", "5 x 5")):
        assert word in kept.skipped[name]
    for index, number in enumerate((0, 5)):
        assert kept[index]["name"] == f"n{number}" and kept[index]["image"].shape[1] == 20 + number
        assert (kept[index]["mask"] == number % 2).all()


def test_split_without_usable_images_is_an_error(data, tmp_path):
    for index in range(6):
        (tmp_path / f"data/train/images/n{index}.png").write_bytes(b"")
    words = ("No image of split train has a usable mask", "- n0: ", "- n1: ", "and 3 more")
    assert_refused(lambda: skip(data(), tmp_path), *words)


def test_packed_and_skipped_together(data, tmp_path):
    (tmp_path / "data/train/images/n1.png").write_bytes(b"no picture")
    whole = data()
    options = {"cache": "packed", "pack": pack, "longest": 15}
    packed = skip(whole, tmp_path, reduced=True, **options)
    assert packed.names == ["n0", "n2", "n3", "n4", "n5"] and list(packed.skipped) == ["n1"]
    assert max(packed[0]["image"].shape) == 15 and packed[0]["mask"].shape == packed[0]["image"].shape[1:]
    full = skip(whole.keep({"n0", "n5"}), tmp_path, **options)  # to be scored, not to train on
    assert (full[1]["image"] == whole[5]["image"]).all() and (full[1]["mask"] == whole[5]["mask"]).all()
    counts = class_counts(packed, tmp_path / "cache")
    assert counts.tolist() == [20 * 30 + 22 * 30 + 24 * 30, 23 * 30 + 25 * 30]  # of the files, not of the reduced masks


def test_incomplete_pairs_are_refused_or_skipped(data, tmp_path):
    whole = data()
    assert prepare_dataset(whole, split="train") is whole
    masks, images = tmp_path / "data/train/masks", tmp_path / "data/train/images"
    (masks / "n1.png").unlink()
    (images / "n4.png").unlink()
    save(masks / "n5.png", np.full((25, 30), 9))
    found = data()
    assert found.names == ["n0", "n2", "n3", "n5"] and list(found.lacking) == ["n1", "n4"]
    reasons = (f"{images / 'n1.png'} has no mask in {masks}.", f"{masks / 'n4.png'} has no image", "data.reader.layout")
    message = assert_refused(lambda: prepare_dataset(found, split="train"), *reasons)
    assert message.startswith("Split train has 4 images with a mask, and 2 incomplete pairs:\n- n1: ")
    assert "on_error=skip" in message and message.endswith("mode=doctor lists all, in doctor.json.")
    for cache in (None, "packed"):
        kept = skip(data(), tmp_path, cache=cache, pack=pack)
        assert kept.names == ["n0", "n2", "n3"] and list(kept.skipped) == ["n1", "n4", "n5"] and not kept.lacking
        assert kept.keep(["n0"]).skipped == kept.skipped
    assert list(found.keep(["n0"]).lacking) == ["n1", "n4"]


def test_only_training_images_are_reduced(data, tmp_path, compose):
    root, kept = f"data.root={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}"
    cfg = compose(root, kept, "data.classes=[a,b]", "data.cache=packed", "data.workers=1", "resolution.longest=15")
    scored = Builder(cfg).dataset("train")
    trained = Builder(cfg).dataset("train", reduced=True)
    assert [scored[0]["mask"].shape, trained[0]["mask"].shape] == [(20, 30), (10, 15)]


def test_packed_is_refused_where_nothing_packs(data, tmp_path, compose):
    cfg = compose(f"data.root={tmp_path / 'data'}", "data.classes=[a,b]", "data.cache=packed", "pack=null")
    assert_refused(lambda: Builder(cfg).dataset("train"), "data.cache=packed", "not part of this installation")
