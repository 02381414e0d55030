"""Images beyond Pillow's pixel limit, read through libvips: the same pixels and class IDs as Pillow gives."""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from PIL import Image
from tiny_parts import tiny_vit

from dinoseg.data.classes.labels import Labels
from dinoseg.inference import large
from dinoseg.inference.done import DoneInputs
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.inference.large import FileRows, is_large, open_rows, write_id_png
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.rows import MemoryRows
from dinoseg.inference.windows import Windows
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_image

CPU = torch.device("cpu")
SIZE = (301, 97)
FILES = {
    "a.jpg": {"quality": 80},
    "full.jpg": {"quality": 80, "subsampling": 0},
    "progressive.jpg": {"progressive": True},
    "a.webp": {"quality": 80},
    "a.png": {},
    "raw.tif": {},
    "deflate.tif": {"compression": "tiff_adobe_deflate"},
    "predicted.tif": {"compression": "tiff_lzw", "tiffinfo": {317: 2}},
    "packbits.tif": {"compression": "packbits"},
    "jpeg.tif": {"compression": "jpeg"},
    "big.tif": {"big_tiff": True},
}


def picture():
    draw = np.random.default_rng(0).integers(0, 256, (40, 12, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def saved(path, mode="RGB", **options):
    """Write the picture, and return its path."""
    picture().convert(mode).save(path, **(options or FILES.get(path.name, {})))
    return path


def read_in_parts(rows, step=40):
    parts = [rows.read(top, min(top + step, rows.size[0])) for top in range(0, rows.size[0], step)]
    return torch.cat(parts, dim=2)[0].permute(1, 2, 0).numpy()


@pytest.fixture
def small_limit(monkeypatch):
    """Lower Pillow's limit, so that a small image is a large one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8_000)
    monkeypatch.setattr(large, "MAX_PIXELS", 16_000)


def tiny_predictor(classes=5):
    torch.manual_seed(0)
    backbone = tiny_vit()
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, classes)).eval()
    return Predictor(model, CPU, nullcontext, Windows((64, 64)))


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "RGB") for name in FILES), *(("a.png", mode) for mode in ("L", "RGBA", "LA", "P", "1"))]
    + [("jpeg.tif", "L"), ("a.jpg", "L"), ("a.webp", "L"), ("raw.tif", "L")],
)
def test_pixels_equal_those_of_pillow(tmp_path, name, mode):
    path = saved(tmp_path / name, mode)
    rows = FileRows(path, CPU)
    assert rows.size == SIZE and np.array_equal(read_in_parts(rows), read_image(path))
    assert np.array_equal(rows.read(10, 30), rows.read(0, 60)[:, :, 10:30])  # rows above those read last


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_images_are_turned_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path / name, exif=exif, lossless=True)
    assert np.array_equal(read_in_parts(FileRows(path, CPU)), read_image(path))


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("I;16", "a.png"), ("RGB", "a.bmp")])
def test_unsupported_formats_are_refused_by_name(tmp_path, mode, name):
    image = picture().convert("L").convert(mode) if mode == "I;16" else picture().convert(mode)
    image.save(tmp_path / name)
    assert_refused(lambda: FileRows(tmp_path / name, CPU), name, "onvert it")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "raw.tif", "deflate.tif", "a.webp"])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = saved(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_refused(lambda: read_in_parts(FileRows(path, CPU)), str(path))


def test_loaders_not_meant_for_untrusted_files_are_blocked(tmp_path):
    import pyvips

    np.savetxt(tmp_path / "a.csv", np.zeros((3, 4)))
    path = (tmp_path / "a.csv").rename(tmp_path / "a.png")
    assert_refused(lambda: FileRows(path, CPU), "a.png")
    with pytest.raises(pyvips.Error, match="blocked"):
        pyvips.Image.rawload(str(path), 1, 1, 1)
    assert FileRows(saved(tmp_path / "a.jpg[shrink=2]", format="JPEG"), CPU).size == SIZE  # a name holds no options


def test_an_image_without_space_for_its_pixels_is_refused(tmp_path, monkeypatch):
    path, pixels = saved(tmp_path / "a.png"), 3 * 301 * 97
    monkeypatch.setattr(large.shutil, "disk_usage", lambda folder: SimpleNamespace(free=pixels))
    FileRows(path, CPU)
    monkeypatch.setattr(large.shutil, "disk_usage", lambda folder: SimpleNamespace(free=pixels - 1))
    with pytest.raises(UserError, match="needs [.0-9]+ MiB in .*TMPDIR"):
        FileRows(path, CPU)


def test_images_with_sides_over_a_million_pixels_are_refused(tmp_path):
    for width in (2**20, 2**20 + 1):
        Image.new("L", (width, 1)).save(tmp_path / f"{width}.tif")
    assert FileRows(tmp_path / f"{2**20}.tif", CPU).size == (1, 2**20)
    assert_refused(lambda: FileRows(tmp_path / f"{2**20 + 1}.tif", CPU), "sides of at most 1048576")


@pytest.mark.parametrize("name", ["progressive.jpg", "interlaced.png"])
def test_files_that_are_decoded_whole_need_memory(tmp_path, name, monkeypatch):
    path = saved(tmp_path / "progressive.jpg")
    if name == "interlaced.png":
        import pyvips

        path = tmp_path / name
        pyvips.Image.new_from_file(str(tmp_path / "progressive.jpg")).pngsave(str(path), interlace=True)
    monkeypatch.setattr(large, "free_bytes", lambda device: 6 * 301 * 97)
    assert np.array_equal(read_in_parts(FileRows(path, CPU)), read_image(path))
    monkeypatch.setattr(large, "free_bytes", lambda device: 6 * 301 * 97 - 1)
    assert_refused(lambda: FileRows(path, CPU), "progressive or interlaced")


def test_irregular_files_are_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "a.png")  # reading it would wait for ever
    with pytest.raises(UserError, match="a.png"):
        open_rows(tmp_path / "a.png", CPU)


def test_large_images_name_the_extra_they_need(tmp_path, monkeypatch, small_limit):
    path, small = saved(tmp_path / "a.png"), tmp_path / "small.png"
    picture().crop((0, 0, 97, 40)).save(small)
    assert is_large(path) and not is_large(small)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    assert isinstance(open_rows(small, CPU), MemoryRows)
    for read in (lambda: open_rows(path, CPU), lambda: read_image(path)):
        assert_refused(read, "dinoseg[large]")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "raw.tif"])
def test_class_ids_of_a_large_image_equal_those_in_memory(tmp_path, name, small_limit, monkeypatch):
    path, predictor = saved(tmp_path / name), tiny_predictor()
    predictor.write_ids(path, tmp_path / "masks/a.png")
    monkeypatch.undo()
    expected = predictor.ids([read_image(path)])[0]
    assert np.array_equal(read_ids(tmp_path / "masks/a.png"), expected) and len(np.unique(expected)) > 1


def test_a_mask_that_is_not_complete_does_not_appear(tmp_path, small_limit):
    path = saved(tmp_path / "cut.tif")
    path.write_bytes(path.read_bytes()[:-5000])
    assert_refused(lambda: tiny_predictor().write_ids(path, tmp_path / "a.png"), "cut.tif")
    assert [each.name for each in tmp_path.iterdir()] == ["cut.tif"]


def test_masks_from_a_memory_map_are_written_unchanged(tmp_path, small_limit, monkeypatch):
    ids = np.memmap(tmp_path / "ids", np.uint8, "w+", shape=SIZE)
    ids[:] = np.random.default_rng(0).integers(0, 256, SIZE)
    write_id_png(tmp_path / "a.png", ids)
    monkeypatch.undo()
    assert np.array_equal(read_ids(tmp_path / "a.png"), ids)


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
