"""A data set without what cannot be read, and from its packed file."""

import numpy as np
import pytest
from making import save

from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.scan.class_counts import class_counts
from dinoseg.experiment.builder import Builder
from dinoseg.utils.errors import UserError


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        save(tmp_path / f"data/train/images/n{index}.png", rng.integers(0, 255, (20 + index, 30, 3)))
        save(tmp_path / f"data/train/masks/n{index}.png", np.full((20 + index, 30), index % 2))
    return lambda: folder_dataset(tmp_path / "data", "train", classes=["a", "b"])


def test_plain_dataset_is_returned_unchanged(data):
    found = data()
    assert prepare_dataset(found, split="train") is found


def test_skipping_unreadable_samples_preserves_the_order(data, tmp_path, caplog):
    (tmp_path / "data/train/images/n1.png").write_bytes(b"no picture")
    save(tmp_path / "data/train/masks/n3.png", np.full((23, 30), 7))
    save(tmp_path / "data/train/masks/n4.png", np.full((5, 5), 1))
    kept = prepare_dataset(data(), split="train", on_error="skip", cache_dir=tmp_path / "cache")
    assert kept.names == ["n0", "n2", "n5"] and list(kept.skipped) == ["n1", "n3", "n4"]
    assert "split train has 3 images; left out: 3." in caplog.text
    assert "n1.png" in kept.skipped["n1"] and "7" in kept.skipped["n3"] and "5 x 5" in kept.skipped["n4"]
    for index, sample in enumerate(kept[number] for number in range(3)):
        number = int(kept.names[index][1:])
        assert sample["name"] == f"n{number}" and sample["image"].shape[1] == 20 + number
        assert (sample["mask"] == number % 2).all()


def test_split_without_usable_images_is_an_error(data, tmp_path):
    for index in range(6):
        (tmp_path / f"data/train/images/n{index}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match="No image of split train has a usable mask(?s:.*)- n0: (?s:.*)- n1: (?s:.*)and 3 more"
    ):
        prepare_dataset(data(), split="train", on_error="skip", cache_dir=tmp_path / "cache")


def test_packed_and_skipped_together(data, tmp_path):
    (tmp_path / "data/train/images/n1.png").write_bytes(b"no picture")
    whole = data()
    options = {"on_error": "skip", "cache": "packed", "cache_dir": tmp_path / "cache", "longest": 15, "workers": 1}
    packed = prepare_dataset(whole, split="train", reduced=True, **options)
    assert packed.names == ["n0", "n2", "n3", "n4", "n5"] and list(packed.skipped) == ["n1"]
    assert max(packed[0]["image"].shape) == 15 and packed[0]["mask"].shape == packed[0]["image"].shape[1:]
    full = prepare_dataset(whole.keep({"n0", "n5"}), split="train", **options)  # to be scored, not to train on
    assert (full[1]["image"] == whole[5]["image"]).all() and (full[1]["mask"] == whole[5]["mask"]).all()
    counts = class_counts(packed, tmp_path / "cache")
    assert counts.tolist() == [20 * 30 + 22 * 30 + 24 * 30, 23 * 30 + 25 * 30]  # of the files, not of the reduced masks


def test_incomplete_pairs_are_refused_or_skipped(data, tmp_path):
    masks, images = tmp_path / "data/train/masks", tmp_path / "data/train/images"
    (masks / "n1.png").unlink()
    (images / "n4.png").unlink()
    save(masks / "n5.png", np.full((25, 30), 9))
    found = data()
    assert found.names == ["n0", "n2", "n3", "n5"] and list(found.lacking) == ["n1", "n4"]
    with pytest.raises(UserError) as caught:
        prepare_dataset(found, split="train")
    message = str(caught.value)
    assert message.startswith("Split train has 4 images with a mask, and 2 incomplete pairs:\n- n1: ")
    assert f"{images / 'n1.png'} has no mask in {masks}." in message and f"{masks / 'n4.png'} has no image" in message
    assert "data.reader.layout" in message and message.endswith("on_error=skip.")
    for cache in (None, "packed"):
        kept = prepare_dataset(
            data(), split="train", on_error="skip", cache=cache, cache_dir=tmp_path / "cache", workers=1
        )
        assert kept.names == ["n0", "n2", "n3"] and list(kept.skipped) == ["n1", "n4", "n5"] and not kept.lacking
        assert kept.keep(["n0"]).skipped == kept.skipped
    assert list(found.keep(["n0"]).lacking) == ["n1", "n4"]


def test_a_jpeg_mask_is_left_out(data, tmp_path):
    save(tmp_path / "data/train/masks/n2.png", np.zeros((22, 30)), format="JPEG")
    kept = prepare_dataset(data(), split="train", on_error="skip", cache_dir=tmp_path / "cache", workers=1)
    assert list(kept.skipped) == ["n2"] and "JPEG" in kept.skipped["n2"]


def test_only_training_images_are_reduced(data, tmp_path, compose):
    root, kept = f"data.root={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}"
    cfg = compose(root, kept, "data.classes=[a,b]", "data.cache=packed", "data.workers=1", "resolution.longest=15")
    scored, trained = Builder(cfg).dataset("train"), Builder(cfg).dataset("train", reduced=True)
    assert [scored[0]["mask"].shape, trained[0]["mask"].shape] == [(20, 30), (10, 15)]
