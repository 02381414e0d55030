"""Image files whose pixels could be read wrongly are refused: missing data, blocks that do not fit."""

import io
import struct
import zlib
from functools import partial

import imagecodecs
import numpy as np
import pytest
import tifffile
from image_files import encode_image, png_chunk, tiff_file
from mistakes import assert_refused
from PIL import Image

from dinoseg.utils.images import as_rgb, read_ids, read_image, read_orientation

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
JPEG, PNG = encode_image(IMAGE, "JPEG"), encode_image(IMAGE)


def progressive(scans):
    """Return a progressive JPEG file whose last scan is there so many times more."""
    data = encode_image(IMAGE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def deflated_tiff(*tags, order="<", block=bytes(256 * 256)):
    """Return a grey TIFF file of one deflated block and of more tags, of which the block's place and length are 0."""
    content = zlib.compress(block)
    values = {273: 8, 324: 8, 279: len(content), 325: len(content)}
    plain = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries = [(number, 4, 1, values.get(number, value)) for number, value in sorted([*plain, *tags])]
    return tiff_file(entries, content, order)


def read_file(path):
    """Read an image file as one that was opened by a caller."""
    return as_rgb(Image.open(io.BytesIO(path.read_bytes())), "The image")


def check_refused(path, data, *words, by=(read_image, read_ids)):
    path.write_bytes(data)
    for read in by:
        assert_refused(partial(read, path), *words)


def check_read(path, data):
    """Return the pixels of a file, which are the same by path and by opened image."""
    path.write_bytes(data)
    pixels = read_image(path)
    assert (pixels == read_file(path)).all()
    return pixels


TILED = ((324, 0), (325, 0))
TILE = deflated_tiff(*TILED, (322, 256), (323, 256))


def short_jpeg(width, height):
    """Return a JPEG file of these sizes in its header, and without pixels."""
    data = encode_image(Image.new("L", (8, 8)), "JPEG")
    head = data[: data.index(b"\xff\xda") + 10] + b"\xff\xd9"
    at = head.index(b"\xff\xc0") + 5
    return head[:at] + struct.pack(">HH", height, width) + head[at + 4 :]


def test_files_too_short_for_their_pixels_are_refused(tmp_path):
    check_refused(tmp_path / "a", short_jpeg(1024, 1024), "truncated")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("PNG", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")), ("JPEG", "L"), ("JPEG", "RGB")],
)
def test_uniform_images_are_not_too_short(tmp_path, kind, mode):
    for progressive in (False, True) if kind == "JPEG" else (False,):
        image = Image.new(mode, (2500, 2000))
        image.save(tmp_path / "a", kind, optimize=True, progressive=progressive, quality=1)
        assert read_image(tmp_path / "a").shape == (2000, 2500, 3)


def strips_of(rows, strips, missing=()):
    """Return a grey TIFF file of 32 x 24 pixels in so many strips, some of them without an address."""
    values = IMAGE[..., 0].tobytes()
    offsets = [0 if number in missing else 8 + 32 * rows * number for number in range(strips)]
    lists = struct.pack(f"<{2 * strips}I", *offsets, *[32 * rows] * strips)
    at = 8 + len(values)
    places = [offsets[0], 32 * rows] if strips == 1 else [at, at + 4 * strips]
    tags = [(256, 1, 32), (257, 1, 24), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, strips, places[0]), (277, 1, 1)]
    tags += [(278, 1, rows), (279, strips, places[1])]
    return tiff_file([(number, 4, count, value) for number, count, value in tags], values + lists)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (strips_of(24, 100), "has 100 TIFF blocks, but its pixels need 1"),
        (strips_of(6, 3), "has 3 TIFF blocks, but its pixels need 4"),
        (strips_of(6, 4).replace(struct.pack("<HHI", 279, 4, 4), struct.pack("<HHI", 279, 4, 3)), "has 4 TIFF blocks"),
        (strips_of(6, 4, missing=[2]), "its TIFF block 2 lacks data"),
    ],
    ids=["more", "fewer", "without a length", "without data"],
)
def test_strips_that_do_not_hold_the_pixels_are_refused(tmp_path, data, reason):
    check_read(tmp_path / "whole.tif", strips_of(6, 4))
    check_refused(tmp_path / "a.tif", data, reason, by=(read_image, read_ids, read_file))


def change_tag(data, number, kind):
    """Return a TIFF file whose tag of that number has another type."""
    return data.replace(struct.pack("<HHI", number, 4, 1), struct.pack("<HHI", number, kind, 1))


@pytest.mark.parametrize("number", [258, 259, 262, 277])
def test_damaged_tags_that_decide_the_values_are_refused(tmp_path, number):
    by = [read_image] if number == 262 else [read_image, read_ids]  # masks with 0 as white are refused before
    reason = f"a damaged TIFF tag {number}"
    check_refused(tmp_path / "a.tif", change_tag(TILE, number, 99), reason, by=by)


def test_tags_that_are_left_out_have_their_default_or_are_needed(tmp_path):
    bits = np.eye(16, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "bits.tif")  # without BitsPerSample, which is 1
    with tifffile.TiffFile(tmp_path / "bits.tif") as file:
        assert 258 not in file.pages[0].tags
    assert np.array_equal(read_ids(tmp_path / "bits.tif"), bits)
    assert np.array_equal(read_image(tmp_path / "bits.tif")[..., 0], 255 * bits)
    bare = TILE.replace(struct.pack("<HHI", 262, 4, 1), struct.pack("<HHI", 263, 4, 1))  # 263: Threshholding
    check_refused(tmp_path / "a.tif", bare, "no TIFF tag PhotometricInterpretation", by=[read_image])


@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_jpeg_blocks_of_another_size_or_cut_are_refused(tmp_path, tile):
    path = tmp_path / "a.tif"
    smooth = np.asarray(Image.fromarray(IMAGE[:3, :3]).resize((32, 24)))
    options = {"shape": (24, 32, 3), "dtype": np.uint8, "photometric": "rgb", "compression": "jpeg", "tile": tile}
    blocks = [smooth[:16], np.pad(smooth[16:], ((0, 8), (0, 0), (0, 0)))] if tile else [smooth]
    coded = [imagecodecs.jpeg8_encode(np.ascontiguousarray(block), colorspace="rgb", level=95) for block in blocks]
    wide = imagecodecs.jpeg8_encode(np.zeros((64, 32, 3), np.uint8), colorspace="rgb")
    cut = coded[0][: (coded[0].rindex(b"\xff\xda") + len(coded[0])) // 2] + b"\xff\xd9"
    for first, reason in ((coded[0], ""), (wide, "block 0 is a JPEG file of 32 x 64"), (cut, "truncated")):
        tifffile.imwrite(path, iter([first, *coded[1:]]), rowsperstrip=None if tile else 24, **options)
        if reason:
            assert_refused(lambda: read_image(path), reason)
        else:
            assert np.abs(read_image(path).astype(int) - smooth).mean() < 8


@pytest.mark.parametrize("kind", ["deflate", "lzw", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_blocks_with_too_few_rows_are_refused(tmp_path, kind, tile):
    path = tmp_path / "a.tif"
    rows = [16, 16] if tile else [24]
    blocks = [IMAGE[:row, : tile[1] if tile else 32, 0] for row in rows for _ in range(2 if tile else 1)]
    encode = getattr(imagecodecs, f"{kind}_encode")
    for lacking in (0, 2):
        coded = [encode(np.ascontiguousarray(block[: len(block) - lacking])) for block in blocks]
        options = {"compression": kind, "photometric": "minisblack", "tile": tile, "rowsperstrip": None if tile else 24}
        tifffile.imwrite(path, iter(coded), shape=(24, 32), dtype=np.uint8, **options)
        if not lacking:
            read_ids(path)
    check_refused(path, path.read_bytes(), "a.tif as an image (corrupted ")


XMP = b"\xff\xe1\0\x09http://"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (progressive(40), "a.jpg"),
        (progressive(0) + b"\xff\xda\0\0" * 64, "a.jpg"),  # a video behind a phone's photo
        (TILE, "a.tif"),
        (deflated_tiff(*TILED, (322, 256), (323, 256), order=">"), "a.tif"),
        # one strip, however many rows
        (deflated_tiff((273, 0), (279, 0), (278, 2**32 - 1), block=bytes(16 * 16)), "a.tif"),
        (JPEG[:2] + XMP * 100 + JPEG[2:], "a.jpg"),
    ],
    ids=["scans", "behind the end", "tile", "tile of the other byte order", "strip", "other metadata"],
)
def test_images_of_common_encoders_are_read(tmp_path, data, name):
    assert check_read(tmp_path / name, data).shape in ((24, 32, 3), (16, 16, 3))


def test_many_chunks_of_pixels_are_read(tmp_path):
    start = PNG.index(b"IDAT") + 4
    pixels = PNG[start : start + int.from_bytes(PNG[start - 8 : start - 4], "big")]
    chunks = [png_chunk(b"IDAT", pixels[at : at + 16]) for at in range(0, len(pixels), 16)]
    data = PNG[: start - 8] + b"".join(chunks) + png_chunk(b"IEND", b"")
    assert len(chunks) > 100 and (check_read(tmp_path / "a.png", data) == IMAGE).all()


def test_image_of_another_format_than_its_suffix_is_refused(tmp_path):
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    check_refused(tmp_path / "a.png", data, "a.png as an image", by=[read_image])


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [("text of a PNG chunk of that name", 1), (b"Exif\0\0" + tiff_file([(274, 3, 1, 6)]), 6)],
    ids=["text", "one tag"],
)
def test_exif_that_is_no_directory_means_upright(exif, orientation):
    image = Image.new("RGB", (8, 5))
    image.info["exif"] = exif
    assert read_orientation(image) == orientation
