"""Pictures read strictly: ids come as they are stored, or the file is refused with what it is."""

import os
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import tifffile
from image_files import png_chunk, tiff_file
from mistakes import assert_refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinoseg.utils import images
from dinoseg.utils.images import as_rgb, is_turned, read_ids, read_image, read_size


def write_png(path, bits, kind, row):
    """Write a PNG of one row of packed bytes; kind is IHDR's colour type."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    header = struct.pack(">IIBBBBB", 8 * len(row) // bits // channels, 1, bits, kind, 0, 0, 0)
    palette = png_chunk(b"PLTE", bytes(range(200, 248))) if kind == 3 else b""
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + bytes(row)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + palette + pixels + png_chunk(b"IEND", b""))
    return path


def write_tiff(path, bits, sample, data, *, order="<", photometric=1):
    """Write a TIFF of one row; sample is 1 unsigned, 2 signed, 3 float, photometric 0 for white is zero."""
    tags = [(256, 3, 8 * len(data) // bits), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, len(data)), (339, 3, sample)]
    path.write_bytes(tiff_file([(tag, kind, 1, value) for tag, kind, value in tags], data, order))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "sample", "code", "numbers"),
    [
        (16, 1, "H", [1, 2, 300, 65535]),
        (16, 2, "h", [1, -1, 300, 4]),
        (32, 2, "i", [1, 2, 70000, -4]),
        (32, 1, "I", [1, 2, 2**31 + 5, 2**32 - 1]),
        (8, 1, "B", [0, 3, 254, 255]),
        (8, 2, "b", [1, -1, 3, 4]),
    ],
)
def test_tiff_numbers_are_as_stored_in_either_byte_order(tmp_path, order, bits, sample, code, numbers):
    data = struct.pack(f"{order}4{code}", *numbers)
    ids = read_ids(write_tiff(tmp_path / "a.tif", bits, sample, data, order=order))
    assert ids.tolist() == [numbers] and ids.dtype.isnative and ids.dtype.kind in "iu"


@pytest.mark.parametrize(
    ("bits", "kind", "row", "ids"),
    [
        (4, 0, [0x12, 0x34], [1, 2, 3, 4]),
        (2, 0, [0b00011011], [0, 1, 2, 3]),
        (1, 0, [0b00011011], [0, 0, 0, 1, 1, 0, 1, 1]),
        (4, 3, [0x12, 0x34], [1, 2, 3, 4]),
        (16, 0, [1, 44, 0, 7], [300, 7]),
        (8, 4, [3, 255], [3]),  # alpha is dropped
    ],
)
def test_grey_png_files_are_not_stretched(tmp_path, bits, kind, row, ids):
    assert read_ids(write_png(tmp_path / "a.png", bits, kind, row)).tolist() == [ids]


def test_grey_tiff_files_of_few_bits_and_shades_of_images(tmp_path):
    assert read_ids(write_tiff(tmp_path / "a.tif", 4, 1, bytes([0x12, 0x34]))).tolist() == [[1, 2, 3, 4]]
    assert read_image(write_png(tmp_path / "a.png", 4, 0, [0x12, 0x34]))[0, :, 0].tolist() == [17, 34, 51, 68]
    Image.fromarray(np.array([[[5, 6, 7, 9]]], np.uint8)).save(tmp_path / "b.png")
    assert read_ids(tmp_path / "b.png").tolist() == [[[5, 6, 7]]]


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (lambda path: write_tiff(path, 32, 3, struct.pack("<4f", 1, 2, 300, 4)), "floating-point numbers"),
        (lambda path: write_tiff(path, 8, 1, bytes([1, 2, 3]), photometric=0), "0 as white"),
        (lambda path: write_png(path, 16, 2, [0, 1, 0, 1, 0, 1]), "RGB;16B"),
        (lambda path: write_png(path, 16, 4, [0, 1, 255, 255]), "LA;16B"),
        (lambda path: Image.new("CMYK", (4, 4)).save(path, "JPEG"), "CMYK"),
    ],
)
def test_files_that_do_not_preserve_ids_are_refused_by_kind(tmp_path, write, kind):
    path = tmp_path / "a"
    write(path)
    remedy = "Save it as a grey PNG"
    text = assert_refused(lambda: read_ids(path), f"{path} has a format that does not preserve ids", kind, remedy)
    assert "truncated" not in text


def test_masks_and_rgb_images_of_several_pages_are_refused(tmp_path):
    pages = [Image.new("L", (5, 4), level) for level in (0, 1, 1)]
    for name in ("a.tif", "a.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    assert_refused(lambda: read_image(tmp_path / "a.tif"), "a.tif has 3 pages", "data.pixels.order=[0,1,2]")
    assert_refused(lambda: read_ids(tmp_path / "a.tif"), "a.tif has 3 pages", "task=multilabel")
    assert_refused(lambda: read_ids(tmp_path / "a.png"), "a.png has 3 frames")
    assert read_size(tmp_path / "a.tif") == (4, 5)


def test_volumes_and_incomplete_palettes_are_refused(tmp_path):
    volume = np.arange(2 * 16 * 16, dtype=np.uint16).reshape(2, 16, 16)
    options = {"photometric": "minisblack", "volumetric": True, "tile": (2, 16, 16)}
    tifffile.imwrite(tmp_path / "a.tif", volume, **options)
    colors = (320, "H", 3 * 4, tuple(range(0, 3 * 4 * 256, 256)), True)
    tifffile.imwrite(tmp_path / "b.tif", np.uint8([[0, 3, 4]]), photometric="minisblack", extratags=[colors])
    grey, palette = (struct.pack("<HHIH", 262, 3, 1, photometric) for photometric in (1, 3))
    (tmp_path / "b.tif").write_bytes((tmp_path / "b.tif").read_bytes().replace(grey, palette))
    for read in (read_image, read_ids):
        assert_refused(partial(read, tmp_path / "a.tif"), "volume of 2 slices", "one slice")
    assert_refused(lambda: read_image(tmp_path / "b.tif"), "b.tif", "index 4")


def test_reduced_copies_in_tiff_files_are_left_out(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, photometric="minisblack")
        file.write(pixels[::2, ::2], photometric="minisblack", subfiletype=1)
    assert np.array_equal(read_ids(tmp_path / "a.tif"), pixels)
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], pixels)


def test_unreadable_file_is_refused_with_its_reason(tmp_path, monkeypatch):
    for name in ("a.png", "a.tif"):
        Image.new("L", (40, 40)).save(tmp_path / name)
    Image.fromarray(np.random.default_rng(0).integers(0, 99, (40, 40), np.uint8)).save(tmp_path / "part.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "part.png").read_bytes()[:900])
    for read in (read_ids, read_image, read_size):
        assert_refused(partial(read, tmp_path / "none.png"), "File not found: ", "none.png. Check the path")
        assert_refused(partial(read, tmp_path), " is a folder. Put a file there")
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            for name in ("a.png", "a.tif"):
                words = (name, "too large (Image size (1600 pixels) exceeds limit of 200 pixels). Cut it into parts")
                assert_refused(partial(read, tmp_path / name), *words)
    assert_refused(lambda: read_ids(tmp_path / "part.png"), "It is truncated or not an image: replace or remove it")


def test_sixteen_bit_grey_images_are_scaled_with_one_warning(tmp_path, caplog):
    images._warned.clear()
    levels = np.array([[0, 128, 129, 257], [32767, 65278, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "wide.tif")
    for name in ("deep.png", "wide.tif"):
        pixels = read_image(tmp_path / name)
        assert pixels.dtype == np.uint8 and pixels.shape == (2, 4, 3) and (pixels == pixels[..., :1]).all()
        assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [127, 254, 255, 255]]
    said = f"16-bit images, such as {tmp_path / 'deep.png'}, are scaled from 0..65535 to 0..255"
    assert caplog.text.count("16-bit images") == caplog.text.count(said) == 1
    Image.fromarray(levels.astype(np.int32) - 1).save(tmp_path / "odd.tif")
    remedy = "data.pixels.value_range"
    assert_refused(lambda: read_image(tmp_path / "odd.tif"), "odd.tif holds values from -1 to 65534, ", remedy)
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "real.tif")
    words = ("real.tif holds floating-point values", remedy)
    assert_refused(lambda: read_image(tmp_path / "real.tif"), *words)


def test_file_without_read_permission_is_refused(tmp_path, monkeypatch):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):  # some users may read all

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Image, "open", refuse)
    text = assert_refused(lambda: read_ids(tmp_path / "a.png"), "a.png (Permission denied). Check the path")
    assert "truncated" not in text


def test_twelve_bit_grey_images_are_scaled_by_their_white_level(tmp_path, caplog):
    levels = np.arange(0, 4096, 273)  # 0..4095
    pairs = levels.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    write_tiff(tmp_path / "a.tif", 12, 1, packed.astype(np.uint8).tobytes())
    assert (read_image(tmp_path / "a.tif")[0, :, 0] == np.round(levels * 255 / 4095)).all() and not caplog.messages


def test_fractions_that_pillow_does_not_know_are_no_damage(tmp_path):
    write_tiff(tmp_path / "a.tif", 64, 3, np.ones(4).tobytes())
    assert_refused(lambda: read_image(tmp_path / "a.tif"), "holds floating-point values of unknown range")


def test_a_palette_with_shades_of_transparency_gives_its_colours(tmp_path):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    image.putpalette([level for index in range(16) for level in (index, 2 * index, 255)])
    image.save(tmp_path / "a.png", transparency=bytes(range(16)))
    assert (read_image(tmp_path / "a.png")[1, 2] == (6, 12, 255)).all()  # and no warning


UPRIGHT = {  # by EXIF's numbers, in numpy's words
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
BEHIND = ("exif behind the pixels", "xmp behind the pixels")


def save_with_orientation(path, image, orientation, carrier):
    """Save an image whose orientation stands in `carrier`; 0 writes none."""
    exif = Image.Exif()
    exif[274] = orientation
    attribute = f'tiff:Orientation="{orientation}"'
    element = f"<tiff:Orientation>{orientation}</tiff:Orientation>"
    tag = element if carrier == "xmp element" else f"<r {attribute}/>"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{tag}</x:xmpmeta>'
    options = {}
    notes = PngInfo()
    if orientation and carrier == "exif":
        options["exif"] = exif
    elif orientation and carrier == "raw profile":
        data = exif.tobytes()
        notes.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    elif orientation and carrier.startswith("xmp") and path.suffix == ".png" and carrier not in BEHIND:
        notes.add_itxt("XML:com.adobe.xmp", xmp)
    elif orientation and carrier.startswith("xmp") and carrier not in BEHIND:
        options |= {"tiffinfo": {700: xmp.encode()}} if path.suffix == ".tif" else {"xmp": xmp.encode()}
    image.save(path, lossless=True, pnginfo=notes, **options)
    if orientation and carrier in BEHIND:
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode()
        name, data = (b"eXIf", exif.tobytes()[6:]) if carrier.startswith("exif") else (b"iTXt", text)
        whole = path.read_bytes()
        path.write_bytes(whole[:-12] + png_chunk(name, data) + whole[-12:])


@pytest.mark.parametrize(
    ("suffix", "carrier"),
    [
        *((suffix, carrier) for suffix in ("jpg", "webp", "tif") for carrier in ("exif", "xmp", "xmp element")),
        *(("png", carrier) for carrier in ("exif", "xmp", "xmp element", "raw profile", *BEHIND)),
    ],
)
def test_orientation_is_the_same_for_pixels_and_header(tmp_path, suffix, carrier):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8))
    path = tmp_path / f"a.{suffix}"
    save_with_orientation(path, image, 0, carrier)
    with Image.open(path) as plain:
        stored = np.asarray(plain)
    for orientation in range(1, 9):
        save_with_orientation(path, image, orientation, carrier)
        expected = stored if carrier in BEHIND else UPRIGHT[orientation](stored)
        assert np.array_equal(read_image(path), expected), orientation
        with Image.open(path) as opened:
            assert np.array_equal(as_rgb(opened, "a"), expected), orientation
        assert read_size(path) == expected.shape[:2], orientation
        assert is_turned(path) == (orientation != 1 and carrier not in BEHIND), orientation


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0", b"Exif\0\0" + bytes(64)])
def test_damaged_exif_means_upright(tmp_path, exif):
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (8, 5)).save(tmp_path / name, exif=exif)
        assert read_image(tmp_path / name).shape[:2] == read_size(tmp_path / name) == (5, 8)
        assert not is_turned(tmp_path / name)
