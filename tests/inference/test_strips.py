"""Rows of files as they are needed, and ids written as they are done."""

import os
import struct
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import tiny_vit

from dinoseg.data.classes.labels import Labels
from dinoseg.inference import png_rows, strips
from dinoseg.inference.done import DoneInputs
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.inference.png_rows import PngFileRows, PngLayout, PngWriter
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.rows import LONGEST
from dinoseg.inference.strips import ArrayRows, JpegRows, only_in_strips, open_rows
from dinoseg.inference.tiff_rows import _LARGEST_BLOCK, TiffLayout, TiffRows
from dinoseg.inference.windows import Windows
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_image

CPU = torch.device("cpu")
SIZE = (301, 97)
KINDS = {  # what Pillow is asked for, and whether it is read in strips
    "raw": ({}, True),
    "deflate": ({"compression": "tiff_adobe_deflate"}, True),
    "predicted": ({"compression": "tiff_adobe_deflate", "tiffinfo": {317: 2}}, True),
    "lzw": ({"compression": "tiff_lzw"}, True),
    "lzw predicted": ({"compression": "tiff_lzw", "tiffinfo": {317: 2}}, True),
    "packbits": ({"compression": "packbits"}, True),
    "jpeg": ({"compression": "jpeg"}, True),
    "zstd": ({"compression": "zstd"}, True),
    "turned": ({"tiffinfo": {274: 3}}, False),
    "large": ({"big_tiff": True}, True),
}


def picture(channels=3, size=SIZE):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    return pixels if channels == 3 else pixels[..., 0]


def read_in_parts(rows, step=40):
    parts = [rows.read(top, min(top + step, rows.size[0])) for top in range(0, rows.size[0], step)]
    return torch.cat(parts, dim=2)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tiff_files_are_read_as_pillow_reads_them(tmp_path, kind, channels):
    options, in_strips = KINDS[kind]
    pixels = picture(channels)
    Image.fromarray(pixels).save(tmp_path / "a.tif", **options)
    rows = open_rows(tmp_path / "a.tif", CPU)
    assert isinstance(rows, TiffRows) == in_strips and rows.size == SIZE
    assert (read_in_parts(rows) == read_image(tmp_path / "a.tif")).all()
    if kind not in ("jpeg", "turned"):
        assert (read_in_parts(rows) == pixels.reshape(*SIZE, channels)).all()


@pytest.mark.parametrize("compression", [1, 8])
def test_tiles_are_put_together(tmp_path, compression):
    pixels = picture()
    write_tiles(tmp_path / "a.tif", pixels, compression)
    with Image.open(tmp_path / "a.tif") as image:  # the file is what it says
        assert (np.asarray(image) == pixels).all()
    rows = open_rows(tmp_path / "a.tif", CPU)
    assert isinstance(rows, TiffRows) and (read_in_parts(rows) == pixels).all()


def write_tiles(path, pixels, compression, side=32):

    height, width, channels = pixels.shape
    padded = np.zeros((-(-height // side) * side, -(-width // side) * side, channels), np.uint8)
    padded[:height, :width] = pixels
    tiles = [
        padded[top : top + side, left : left + side].tobytes()
        for top in range(0, padded.shape[0], side)
        for left in range(0, padded.shape[1], side)
    ]
    tiles = [zlib.compress(tile) if compression == 8 else tile for tile in tiles]
    entries = {256: [width], 257: [height], 258: [8] * 3, 259: [compression], 262: [2], 277: [3], 284: [1]}
    entries |= {322: [side], 323: [side], 324: [0] * len(tiles), 325: [len(tile) for tile in tiles]}
    start = 8 + 2 + 12 * len(entries) + 4
    beyond = {key: values for key, values in entries.items() if len(values) > 1}
    places, end = {}, start
    for key, values in beyond.items():
        places[key], end = end, end + 4 * len(values)
    for number, tile in enumerate(tiles):
        entries[324][number], end = end, end + len(tile)
    directory = b"".join(
        struct.pack("<HHII", key, 4, len(values), places.get(key, values[0])) for key, values in sorted(entries.items())
    )
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0" * 4
    extra = b"".join(struct.pack(f"<{len(values)}I", *values) for values in beyond.values())
    path.write_bytes(header + extra + b"".join(tiles))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "turned", "interlaced"])
def test_png_files_are_read_as_pillow_reads_them(tmp_path, mode, monkeypatch):
    monkeypatch.setattr(png_rows, "_BAND", 5000)
    image = Image.fromarray(np.cumsum(picture(), axis=0, dtype=np.uint8))  # smooth: filters of every kind are used
    path, options = tmp_path / "a.png", {}
    if mode in ("L", "RGB", "RGBA", "LA", "P", "1"):
        image = image.convert(mode)
    elif mode == "I;16":
        image = Image.fromarray(picture(1).astype(np.uint16) * 257)
    elif mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][274] = 6
    image.save(path, **options)
    if mode == "interlaced":
        path.write_bytes(interlaced(np.asarray(image)))
    rows = open_rows(path, CPU)
    assert isinstance(rows, PngFileRows) == (mode in ("L", "RGB", "RGBA", "LA", "P"))
    expected = read_image(path)
    assert rows.size == expected.shape[:2] and (read_in_parts(rows) == expected).all()


def interlaced(pixels):
    """Return a PNG of Adam7's seven passes."""
    lines = b""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    for top, left, down, across in passes:
        for row in pixels[top::down, left::across]:
            lines += b"\0" + row.tobytes()
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return png_rows._SIGNATURE + b"".join(png_rows._chunk(*chunk) for chunk in chunks)


def test_png_rows_above_those_kept_are_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(png_rows, "_BAND", 5000)
    monkeypatch.setattr(png_rows, "_KEPT", 20_000)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    rows, begun = open_rows(tmp_path / "a.png", CPU), []
    begin = PngFileRows._begin
    monkeypatch.setattr(PngFileRows, "_begin", lambda self: begun.append(1) or begin(self))
    places = [(0, 100), (70, 170), (150, 301), (200, 300), (10, 40), (290, 301)]
    for top, bottom in places:
        assert (rows.read(top, bottom)[0].permute(1, 2, 0).numpy() == picture()[top:bottom]).all()
        assert sum(band.nbytes for _, band in rows._buffered) <= 20_000 + 3 * 97 * (bottom - top) + 2 * 5000
    assert len(begun) == 1


def test_damaged_png_files_are_refused(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    start = whole.index(b"IDAT")
    changed = bytearray(whole)
    changed[start + 5000] ^= 1
    short, long = (
        whole[:12] + png_rows._chunk(b"IHDR", struct.pack(">II", *size) + whole[24:29])[4:] + whole[33:]
        for size in ((97, 400), (2**31 - 1, 9))
    )
    beyond = whole[: start - 4] + struct.pack(">I", 2**31 - 1) + whole[start:]
    unknown = whole[: start - 4] + struct.pack(">I", 2**32 - 1) + b"tEXt" + whole[start - 4 :]
    lower = whole[:23] + b"\0" + whole[24:]
    for damaged in (
        changed,
        short,
        lower,
        long,
        beyond,
        unknown,
        *(whole[:end] for end in (9, 20, 33, start + 99, -600)),
    ):
        (tmp_path / "b.png").write_bytes(damaged)
        with pytest.raises(UserError, match="b.png"):
            read_in_parts(open_rows(tmp_path / "b.png", CPU))


def png(*chunks):
    return png_rows._SIGNATURE + b"".join(png_rows._chunk(*chunk) for chunk in chunks)


def png_header(width=4, height=3, kind=2):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)


PIXELS = (b"IDAT", zlib.compress(bytes(3 * 13)))  # of 4 x 3, RGB


def test_a_png_has_as_long_a_side_as_may_be_read_by_rows(tmp_path):
    for sides, is_read in (((LONGEST, 1), True), ((LONGEST + 1, 1), False), ((1, LONGEST + 1), False)):
        (tmp_path / "a.png").write_bytes(png(png_header(*sides), PIXELS))
        assert (PngLayout.of(tmp_path / "a.png") is not None) == is_read


@pytest.mark.parametrize("sides", [(0, 3), (4, 0)])
def test_a_png_without_a_pixel_is_refused(tmp_path, sides):
    (tmp_path / "a.png").write_bytes(png(png_header(*sides), PIXELS))
    with pytest.raises(UserError, match="lacks a size or palette"):
        PngLayout.of(tmp_path / "a.png")


def test_a_png_of_numbers_of_colours_needs_the_colours(tmp_path):
    ids, palette = (b"IDAT", zlib.compress(b"\0\0\1\2\3" * 3)), (b"PLTE", bytes(range(9)))
    (tmp_path / "a.png").write_bytes(png(png_header(kind=3), ids))
    with pytest.raises(UserError, match="lacks a size or palette"):
        PngLayout.of(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png(png_header(kind=3), palette, ids))
    rows = read_in_parts(open_rows(tmp_path / "a.png", CPU))
    assert rows[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 0, 0]]  # the last one has no colour: black


def test_pixels_of_a_png_are_held_against_their_checksum(tmp_path):
    whole = png(png_header(), PIXELS, (b"IEND", b""))
    (tmp_path / "a.png").write_bytes(whole)
    assert not read_in_parts(open_rows(tmp_path / "a.png", CPU)).any()
    at = whole.index(b"IEND") - 5  # the last byte of that checksum
    (tmp_path / "a.png").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    layout = PngLayout.of(tmp_path / "a.png")
    with pytest.raises(UserError, match="does not match its checksums"):
        list(PngFileRows(tmp_path / "a.png", layout, CPU)._pieces())


def test_long_chunks_before_a_png_s_pixels_are_passed_over_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(png_rows, "_PIECE", 64)
    note = (b"eXIf", bytes(64))  # as long as what is no longer read
    (tmp_path / "a.png").write_bytes(png(png_header(), note, (b"tEXt", bytes(500)), PIXELS, (b"IEND", b"")))
    assert not read_in_parts(open_rows(tmp_path / "a.png", CPU)).any()


def test_a_png_writer_that_fails_leaves_a_file_without_an_end(tmp_path):
    with pytest.raises(ZeroDivisionError), PngWriter(tmp_path / "a.png", (2, 2)) as file:
        file.write(np.zeros((1, 2), np.uint8))
        raise ZeroDivisionError
    assert b"IEND" not in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "turned", "progressive"])
def test_a_jpeg_file_that_is_too_large_is_decoded_where_memory_suffices(tmp_path, mode, monkeypatch):
    path, options = tmp_path / "a.jpg", {"progressive": mode == "progressive"}
    if mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][274] = 8
    image = Image.fromarray(picture())
    (image.convert(mode) if mode in ("L", "CMYK") else image).save(path, **options)
    expected = read_image(path)
    monkeypatch.setattr(strips, "MAX_HELD", 20_000)
    assert only_in_strips(path)
    rows = open_rows(path, CPU)
    assert isinstance(rows, JpegRows) and (read_in_parts(rows) == expected).all()
    need = 301 * 97 * {"L": 1, "turned": 8, "progressive": 10}.get(mode, 4)
    monkeypatch.setattr(strips, "free_bytes", lambda device: need)
    open_rows(path, CPU)
    monkeypatch.setattr(strips, "free_bytes", lambda device: need - 1)
    with pytest.raises(UserError, match="has to be decoded as a whole, which needs about 0.0 GiB.*vips copy"):
        open_rows(path, CPU)
    path.write_bytes(path.read_bytes()[:-300])
    monkeypatch.setattr(strips, "free_bytes", lambda device: need)
    with pytest.raises(UserError, match="Cannot read .*a.jpg as an image"):
        open_rows(path, CPU)


def test_blocks_of_jpeg_in_tiff_are_pillows(tmp_path):
    smooth = np.cumsum(picture(), axis=1, dtype=np.uint8)
    Image.fromarray(smooth).convert("YCbCr").save(tmp_path / "a.tif", compression="jpeg", tiffinfo={278: 64})
    rows = open_rows(tmp_path / "a.tif", CPU)
    assert isinstance(rows, TiffRows) and rows.layout.block == (64, 97)
    assert (read_in_parts(rows) == read_image(tmp_path / "a.tif")).all()


def test_arrays_are_mapped_and_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", picture())
    rows = open_rows(tmp_path / "a.npy", CPU)
    assert isinstance(rows, ArrayRows) and (read_in_parts(rows) == picture()).all()
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "c.npy", picture().astype(np.float32))
    with open(tmp_path / "d.npy", "wb") as file:
        np.savez(file, picture())  # an archive by another name
    (tmp_path / "e.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    unread = [(f"{name}.npy", f"Cannot read .*{name}.npy as an array") for name in "bde"]
    for name, message in (*unread, ("c.npy", "float32; it must hold")):
        with pytest.raises(UserError, match=message):
            open_rows(tmp_path / name, CPU)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["raw", "deflate"])
def test_cut_files_are_refused(tmp_path, kind, share):
    path = tmp_path / "a.tif"
    Image.fromarray(picture()).save(path, **KINDS[kind][0])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=str(path)):
        read_in_parts(open_rows(path, CPU))


def test_a_file_whose_tags_name_what_is_not_there_takes_no_memory(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(picture()).save(path, tiffinfo={257: 2**19})
    data = path.read_bytes().replace((301).to_bytes(4, "little"), (2**30).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.tif"):
        read_in_parts(open_rows(path, CPU))


def tiff(path, **changed):
    """Write a grey TIFF of 4 x 3 in one strip, with tags of other values: `t257=9`."""
    tags = {256: 4, 257: 3, 258: 8, 259: 1, 262: 1, 273: 300, 277: 1, 278: 3, 279: 12}
    tags |= {int(name[1:]): value for name, value in changed.items()}
    entries = b"".join(struct.pack("<HHII", key, 4, 1, value) for key, value in sorted(tags.items()))
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4
    path.write_bytes(header.ljust(300, b"\0") + bytes(range(12)))
    return path


def test_a_tiff_is_read_as_its_tags_say(tmp_path):
    path = tiff(tmp_path / "a.tif")
    assert (read_in_parts(open_rows(path, CPU))[..., 0] == np.arange(12).reshape(3, 4)).all()


@pytest.mark.parametrize(
    "changed", [{"t339": 3}, {"t266": 2}, {"t284": 2}, {"t274": 3}, {"t258": 16}, {"t317": 2}, {"t317": 3, "t259": 8}]
)
def test_a_tiff_of_other_numbers_or_order_is_left_to_pillow(tmp_path, changed):
    assert TiffLayout.of(tiff(tmp_path / "a.tif", **changed)) is None


def test_a_tiff_has_sides_and_blocks_in_bounds(tmp_path):
    wide = {"t257": 1, "t278": 1}
    assert TiffLayout.of(tiff(tmp_path / "a.tif", t256=LONGEST, **wide)) is not None
    for sides in ({"t256": LONGEST + 1, **wide}, {"t256": 0}, {"t257": 0}, {"t278": 0}):
        with pytest.raises(UserError, match="pixels in too few blocks"):
            TiffLayout.of(tiff(tmp_path / "a.tif", **sides))
    with pytest.raises(UserError, match="pixels in too few blocks"):  # three rows in strips of one, of which one lies
        TiffLayout.of(tiff(tmp_path / "a.tif", t278=1))
    for rows, is_read in ((_LARGEST_BLOCK // LONGEST, True), (_LARGEST_BLOCK // LONGEST + 1, False)):
        packed = {"t256": LONGEST, "t257": rows, "t278": rows, "t259": 8}
        assert (TiffLayout.of(tiff(tmp_path / "a.tif", **packed)) is not None) == is_read


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")  # reading it would wait for ever
    with pytest.raises(UserError, match="a.png"):
        open_rows(tmp_path / "a.png", CPU)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 4), (0, 4, 3), (3, 0, 3), (1, 3, 4, 3)])
def test_arrays_of_another_shape_are_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="must hold"):
        open_rows(tmp_path / "a.npy", CPU)


def test_ids_of_a_file_in_strips_are_those_of_the_image(tmp_path):
    torch.manual_seed(0)
    backbone = tiny_vit()
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 5)).eval()
    predictor = Predictor(model, CPU, nullcontext, Windows((64, 64)))
    Image.fromarray(picture()).save(tmp_path / "a.tif")
    predictor.write_strips(tmp_path / "a.tif", tmp_path / "masks/a.png")
    expected = predictor.ids([picture()])[0]
    assert (read_ids(tmp_path / "masks/a.png") == expected).all() and len(np.unique(expected)) > 1
    assert (np.concatenate(list(predictor.strips(tmp_path / "a.tif"))) == expected).all()


def test_a_png_that_is_not_ended_does_not_appear(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "cut.tif"
    Image.fromarray(picture()).save(path)
    path.write_bytes(path.read_bytes()[:-5000])
    backbone = tiny_vit()
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 5)).eval()
    predictor = Predictor(model, CPU, nullcontext, Windows((64, 64)))
    with pytest.raises(UserError, match="ends before its last row"):
        predictor.write_strips(path, tmp_path / "a.png")
    assert [each.name for each in tmp_path.iterdir()] == ["cut.tif"]


def test_rows_of_a_png_are_what_was_written(tmp_path):
    ids = picture(1)
    with PngWriter(tmp_path / "a.png", SIZE) as file:
        for part in np.split(ids, [1, 100, 290]):
            file.write(part)
    assert (read_ids(tmp_path / "a.png") == ids).all()


def test_an_image_too_large_to_hold_gets_class_ids_and_goes_on(tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    backbone = tiny_vit()
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 2)).eval()
    predictor = Predictor(model, CPU, nullcontext, Windows((64, 64)))
    by = SegmentationSettings(predictor, Labels.of(["a", "b"], None, 255))
    Image.fromarray(picture()).save(tmp_path / "large.tif")
    Image.fromarray(picture()[:40]).save(tmp_path / "small.tif")
    monkeypatch.setattr(strips, "MAX_HELD", 20_000)
    images = [ImageInput(tmp_path / f"{name}.tif", name, name) for name in ("large", "small")]
    run = ImageRun(tmp_path / "run", tmp_path / "run/masks", DoneInputs(tmp_path / "run"))
    with caplog.at_level("INFO"):
        segment_images(by, images, run)
    assert run.count == 2 and not run.failures and "large.tif is too large for overlays" in caplog.text
    assert (read_ids(tmp_path / "run/masks/large.png") == predictor.ids([picture()])[0]).all()
    assert [path.name for path in (tmp_path / "run").glob("*_segmentation")] == ["small_segmentation"]
    again = ImageRun(run.folder, run.masks, DoneInputs(tmp_path / "run"))
    earlier, passed = segment_images(by, images, again)
    assert earlier == 2 and passed.items == 0
    bare = ImageRun(tmp_path / "bare", None, DoneInputs(tmp_path / "bare"))
    segment_images(by, images, bare)
    assert bare.count == 1 and "large.tif is too large for overlays, and masks=false" in bare.failures[0]
