"""Images beyond Pillow's pixel limit are read whole where memory suffices, and get the same class IDs as others."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from PIL import Image
from tiny_parts import tiny_vit

from dinoseg.data.classes.labels import Labels
from dinoseg.inference import predictor as predictor_module
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.inference.predictor import Predictor, is_large, read_rows
from dinoseg.inference.results import DoneInputs
from dinoseg.inference.windows import Windows
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.images import read_ids, read_image

CPU = torch.device("cpu")
SIZE = (301, 97)


def picture():
    draw = np.random.default_rng(0).integers(0, 256, (40, 12, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def saved(path):
    """Write the picture, and return its path."""
    picture().save(path)
    return path


@pytest.fixture
def small_limit(monkeypatch):
    """Lower Pillow's limit, so that a small image is a large one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8_000)


def tiny_predictor(classes=5):
    torch.manual_seed(0)
    backbone = tiny_vit()
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, classes)).eval()
    return Predictor(model, CPU, nullcontext, Windows((64, 64)))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_large_images_are_read_whole(tmp_path, name, small_limit, monkeypatch):
    path = saved(tmp_path / name)
    assert is_large(path)
    assert_refused(lambda: read_image(path), name, "too large")
    rows = read_rows(path, CPU)
    assert_refused(lambda: read_image(path), name, "too large")  # the limit is restored
    monkeypatch.undo()
    assert not is_large(path)
    assert np.array_equal(rows.read(0, SIZE[0])[0].permute(1, 2, 0), read_image(path))


def test_rows_are_copied_to_the_device(tmp_path):
    rows = read_rows(saved(tmp_path / "a.png"), torch.device("meta"))
    assert rows.read(10, 30).shape == (1, 3, 20, 97) and rows.read(10, 30).is_meta


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, name, small_limit, monkeypatch):
    path = saved(tmp_path / name)
    needed = predictor_module._DECODING_BYTES * 301 * 97
    monkeypatch.setattr(predictor_module, "free_bytes", lambda device: needed)
    read_rows(path, CPU)
    monkeypatch.setattr(predictor_module, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(predictor_module, "read_image", lambda path: pytest.fail("decoded"))
    assert_refused(lambda: read_rows(path, CPU), name, "97 x 301", "MiB of memory", "reduce or split")
    assert_refused(lambda: read_image(path), name, "too large")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_class_ids_of_a_large_image_equal_those_in_memory(tmp_path, name, small_limit, monkeypatch):
    path = saved(tmp_path / name)
    predictor = tiny_predictor()
    predictor.write_ids(path, tmp_path / "masks/a.png")
    monkeypatch.undo()
    expected = predictor.ids([read_image(path)])[0]
    assert np.array_equal(read_ids(tmp_path / "masks/a.png"), expected) and len(np.unique(expected)) > 1


def test_a_mask_that_is_not_complete_does_not_appear(tmp_path, small_limit):
    path = saved(tmp_path / "cut.tif")
    path.write_bytes(path.read_bytes()[:-5000])
    assert_refused(lambda: tiny_predictor().write_ids(path, tmp_path / "a.png"), "cut.tif")
    assert [each.name for each in tmp_path.iterdir()] == ["cut.tif"]


def test_a_large_image_gets_class_ids_alone(tmp_path, caplog, small_limit, monkeypatch):
    predictor = tiny_predictor(classes=2)
    by = SegmentationSettings(predictor, Labels.of(["a", "b"], None, 255))
    saved(tmp_path / "large.tif")
    picture().crop((0, 0, 97, 40)).save(tmp_path / "small.tif")
    images = [ImageInput(tmp_path / f"{name}.tif", name, name) for name in ("large", "small")]
    run = ImageRun(tmp_path / "run", tmp_path / "run/masks", DoneInputs(tmp_path / "run"))
    with caplog.at_level("INFO"):
        segment_images(by, images, run)
    assert run.count == 2 and not run.failures and "large.tif is too large for overlays" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("*_segmentation")] == ["small_segmentation"]
    again = ImageRun(run.folder, run.masks, DoneInputs(tmp_path / "run"))
    earlier, passed = segment_images(by, images, again)
    assert earlier == 2 and passed.items == 0
    bare = ImageRun(tmp_path / "bare", None, DoneInputs(tmp_path / "bare"))
    segment_images(by, images, bare)
    assert bare.count == 1 and "large.tif is too large for overlays, and masks=false" in bare.failures[0]
    monkeypatch.undo()
    expected = predictor.ids([read_image(tmp_path / "large.tif")])[0]
    assert np.array_equal(read_ids(tmp_path / "run/masks/large.png"), expected)
