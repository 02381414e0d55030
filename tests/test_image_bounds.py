"""Image files that cost far more to decode than their pixels are refused before they are decoded."""

import io
import re
import struct
import zlib
from functools import partial

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from image_files import encode_image, png_chunk, tiff_file
from mistakes import assert_refused
from PIL import Image

from dinoseg.inference.large import FileRows, open_rows
from dinoseg.serving.decoding import read_bounded_image
from dinoseg.utils import image_cost
from dinoseg.utils.image_cost import MAX_SCANS, check_header, count_scans
from dinoseg.utils.images import as_rgb, read_ids, read_image, read_orientation, read_size

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


def with_type(data, number, kind):
    """Return a TIFF file whose tag of that number has another type."""
    return data.replace(struct.pack("<HHI", number, 4, 1), struct.pack("<HHI", number, kind, 1))


def skipped_tag(data, number):
    """Return a TIFF file whose tag of that number is in 8 bytes that Pillow skips, after a tag of the file's length."""
    length = struct.pack("<HHII", 285, 1, len(data), 0)
    return with_type(data, number, 16).replace(struct.pack("<HHII", 277, 4, 1, 1), length)


def jpeg_with(*parts):
    """Return a JPEG file with bytes between its first marker and its segments."""
    return JPEG[:2] + b"".join(parts) + JPEG[2:]


def png_with(*chunks, behind=False):
    """Return a PNG file with chunks before its pixels, or behind them."""
    at = len(PNG) - 12 if behind else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def tiff_of(tags):
    """Return a TIFF file of these tags (number, type, count) alone."""
    return tiff_file([(*tag, 8) for tag in tags])


def read_file(path):
    """Read an image file as one that was opened by a caller."""
    return as_rgb(Image.open(io.BytesIO(path.read_bytes())), "The image")


def read_bounded(path):
    return read_bounded_image(path, 2**24)


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
LARGE_TILE = (*TILED, (322, 26_000), (323, 20_000))
WIDE_TILE = deflated_tiff(*TILED, (322, 26_000), (323, 256))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (progressive(MAX_SCANS), "JPEG scans; the limit is 32"),
        (deflated_tiff(*LARGE_TILE), "16 x 16 pixels in TIFF tiles of 26000 x 20000"),
        (deflated_tiff(*LARGE_TILE, order=">"), "16 x 16 pixels in TIFF tiles of 26000 x 20000"),
        (deflated_tiff(*TILED, (322, 256), (322, 26_000), (323, 256)), "the TIFF tag 322 twice"),
        (with_type(WIDE_TILE, 322, 17), "the TIFF tag 322 in an unsupported form"),
        (with_type(deflated_tiff(*TILED, (322, 256), (323, 26_000)), 323, 99), "the TIFF tag 323 in an unsupported"),
        (with_type(deflated_tiff((273, 0), (279, 0)), 273, 99), "the TIFF tag 273 in an unsupported form"),
        (skipped_tag(WIDE_TILE, 322), "the TIFF tag 322 in an unsupported form"),
    ],
    ids=["scans", "tile", "tile of the other byte order", "two tiles", "width", "height", "strips", "long"],
)
@pytest.mark.filterwarnings("ignore:Tag data larger than file", "ignore:Metadata Warning")
def test_image_that_costs_more_than_its_pixels_is_refused(tmp_path, data, reason):
    name = "a.tif" if data[:2] in (b"II", b"MM") else "a.jpg"
    check_refused(tmp_path / name, data, f"{name} has ", reason, by=[read_image])
    check_refused(tmp_path / name, data, "The image has ", reason, by=[read_file])


def short_png(width, height):
    """Return a PNG file of these sizes in its header, and of the pixels of one row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return PNG[:8] + header + png_chunk(b"IDAT", zlib.compress(bytes(9))) + png_chunk(b"IEND", b"")


def short_jpeg(width, height):
    """Return a JPEG file of these sizes in its header, and without pixels."""
    data = encode_image(Image.new("L", (8, 8)), "JPEG")
    head = data[: data.index(b"\xff\xda") + 10] + b"\xff\xd9"
    at = head.index(b"\xff\xc0") + 5
    return head[:at] + struct.pack(">HH", height, width) + head[at + 4 :]


@pytest.mark.parametrize("data", [short_png(1, 2**24), short_png(2**24, 1), short_jpeg(4096, 4096)])
def test_files_too_short_for_their_pixels_are_refused(tmp_path, data):
    words = (f"a has {len(data)} bytes, too few for ", "truncated")
    check_refused(tmp_path / "a", data, *words, by=(read_image, read_ids, read_bounded))


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
        (strips_of(6, 4).replace(struct.pack("<HHI", 279, 4, 4), struct.pack("<HHI", 279, 4, 3)), "has 3 lengths for"),
        (strips_of(6, 4, missing=[2]), "no data for its TIFF block 2"),
    ],
    ids=["more", "fewer", "without a length", "without data"],
)
def test_strips_that_do_not_hold_the_pixels_are_refused(tmp_path, data, reason):
    check_read(tmp_path / "whole.tif", strips_of(6, 4))
    check_refused(tmp_path / "a.tif", data, reason, by=(read_image, read_ids, read_file))


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
    check_refused(path, path.read_bytes(), "a.tif is damaged: its TIFF block 0")


COMMENT = b"\xff\xfe\0\2"
EXIF = b"\xff\xe1\0\x09Exif\0\0x"
XMP = b"\xff\xe1\0\x09http://"
PROFILE = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20)))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (progressive(20), "a.jpg"),
        (progressive(0) + b"\xff\xda\0\0" * 2 * MAX_SCANS, "a.jpg"),  # a video behind a phone's photo
        (deflated_tiff(*TILED, (322, 256), (323, 256)), "a.tif"),
        (deflated_tiff(*TILED, (322, 256), (323, 256), order=">"), "a.tif"),
        # one strip, however many rows
        (deflated_tiff((273, 0), (279, 0), (278, 2**32 - 1), block=bytes(16 * 16)), "a.tif"),
        (jpeg_with(XMP * 100), "a.jpg"),
    ],
    ids=["scans", "behind the end", "tile", "tile of the other byte order", "strip", "other metadata"],
)
def test_images_of_common_encoders_are_read(tmp_path, data, name):
    assert check_read(tmp_path / name, data).shape in ((24, 32, 3), (16, 16, 3))


def test_many_chunks_of_pixels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cost, "MAX_CHUNKS", 20)
    start = PNG.index(b"IDAT") + 4
    pixels = PNG[start : start + int.from_bytes(PNG[start - 8 : start - 4], "big")]
    chunks = [png_chunk(b"IDAT", pixels[at : at + 16]) for at in range(0, len(pixels), 16)]
    data = PNG[: start - 8] + b"".join(chunks) + png_chunk(b"IEND", b"")
    assert len(chunks) > 100 and (check_read(tmp_path / "a.png", data) == IMAGE).all()


def test_a_tile_of_four_times_the_pixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dinoseg.utils.tiff._MAX_BLOCK_PIXELS", 100)
    data = deflated_tiff(*TILED, (322, 32), (323, 32), block=bytes(32 * 32))
    assert check_read(tmp_path / "a.tif", data).shape == (16, 16, 3)
    larger = deflated_tiff(*TILED, (322, 80), (323, 80), block=bytes(80 * 80))
    check_refused(tmp_path / "a.tif", larger, "in TIFF tiles of 80 x 80", by=[read_image])


def test_image_of_another_format_than_its_suffix_is_refused(tmp_path):
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    check_refused(tmp_path / "a.png", data, "a.png as an image", by=[read_image])


COSTLY_HEADERS = {
    "segments": ("a.jpg", jpeg_with(COMMENT * 2000), "over 1024 JPEG segments"),
    "exif": ("a.jpg", jpeg_with(EXIF * 100), "over 8 JPEG segments of EXIF"),
    "restart markers": ("a.jpg", jpeg_with(b"\xff\xd0" * 2000), "over 1024 JPEG segments"),
    "fill": ("a.jpg", jpeg_with(b"\xff" * 70_000), "over 65536 bytes between"),
    "junk": ("a.jpg", jpeg_with(COMMENT, bytes(70_000)), "over 65536 bytes between"),
    "chunks": ("a.png", png_with(png_chunk(b"tIME", b"") * 5000), "over 4096 PNG chunks"),
    "profiles": ("a.png", png_with(PROFILE * 65), "over 64 compressed PNG chunks"),
    "tags": ("a.tif", tiff_of([(number, 4, 1) for number in range(5000)]), "5000 TIFF tags; the limit is 4096"),
    "strips": ("a.tif", tiff_of([(256, 4, 1), (273, 4, 300_000)]), "300000 TIFF blocks; the limit is 262144"),
    "long": ("a.tif", tiff_of([(256, 4, 1), (700, 1, 10_000)]), "truncated: its TIFF tag 700"),
}


@pytest.mark.parametrize(("name", "data", "reason"), COSTLY_HEADERS.values(), ids=COSTLY_HEADERS)
def test_costly_headers_are_refused_before_opening(tmp_path, monkeypatch, name, data, reason):
    def fail(*_, **__):
        raise AssertionError("Pillow opened the file")

    monkeypatch.setattr(Image, "open", fail)
    words = f"{name} {'is' if reason.startswith('truncated') else 'has'} {reason}"
    check_refused(tmp_path / name, data, words, by=(read_size, read_image, read_ids))
    check_refused(tmp_path / name, data, reason, by=[read_bounded])


@pytest.mark.parametrize("case", ["segments", "fill", "chunks", "tags", "long"])
def test_rows_of_files_with_costly_headers_are_refused(tmp_path, case):
    name, data, reason = COSTLY_HEADERS[case]
    by = [partial(read, device=torch.device("cpu")) for read in (open_rows, FileRows)]
    check_refused(tmp_path / name, data, reason, by=by)


SCANS = progressive(MAX_SCANS)
LAST_SCAN = SCANS.rindex(b"\xff\xda")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.png", png_with(PROFILE * 65, behind=True), "over 64 compressed PNG chunks"),
        (
            "a.png",
            png_with(struct.pack(">I", 2**31 - 1) + b"tEXt" + bytes(20), behind=True),
            "chunk is longer than the",
        ),
        ("a.jpg", SCANS[:LAST_SCAN] + COMMENT * 2000 + SCANS[LAST_SCAN:], "over 1024 JPEG segments"),
    ],
    ids=["profiles", "chunk beyond the end", "segments"],
)
def test_costly_parts_behind_the_pixels_are_refused(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    assert read_size(tmp_path / name) == (24, 32)  # the header itself is short
    check_refused(tmp_path / name, data, reason, by=[read_image])


class CountedFile(io.BytesIO):
    """File in memory that counts its reads and the bytes read."""

    reads = 0
    bytes_read = 0

    def read(self, size=-1, /):
        found = super().read(size)
        self.reads += 1
        self.bytes_read += len(found)
        return found


@pytest.mark.parametrize(
    "data", [jpeg_with(COMMENT * 1000), png_with(png_chunk(b"tIME", b"") * 4000), tiff_of([(1, 4, 1)] * 4000)]
)
def test_header_check_reads_each_part_once(data):
    file = CountedFile(data)
    check_header(file)
    assert file.tell() == 0 and file.reads < 4100 and file.bytes_read < 2 * len(data) + 10_000


def test_scans_are_counted_behind_long_runs_of_fill_bytes():
    data = progressive(MAX_SCANS)
    assert count_scans(data[:-2] + (b"\xff" * 40_000 + b"\0") + data[-2:]) == count_scans(data) > MAX_SCANS


def count_scans_by_backtracking(data):
    """Count all scans by an independent pattern, whose time is quadratic in runs of fill bytes."""
    scans, position = 0, 2
    marker = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
    while (match := marker.search(data, position)) and match[1] != b"\xd9":
        scans += match[1] == b"\xda"
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return scans


@pytest.mark.parametrize("size", [(1, 1), (24, 32), (121, 90)])
def test_scan_counts_of_progressive_files_are_exact(monkeypatch, size):
    monkeypatch.setattr(image_cost, "MAX_SCANS", 0)  # all are counted exactly
    pixels = np.random.default_rng(0).integers(0, 60, (*size, 3)).astype(np.uint8)
    counts = set()
    for options in (
        {"progressive": True},
        {"progressive": True, "quality": 100, "subsampling": 0},
        {"progressive": True, "restart_marker_blocks": 2},
        {"optimize": True, "restart_marker_rows": 1},
    ):
        data = encode_image(pixels, "JPEG", **options)
        counts.add(count_scans(data))
        assert count_scans(data) == count_scans_by_backtracking(data)
    assert counts == {1, 10}


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (b"Exif\0\0" + tiff_of([(number, 3, 1) for number in range(10_000)]), 1),
        ("text of a PNG chunk of that name", 1),
        (b"Exif\0\0" + tiff_file([(274, 3, 1, 6)]), 6),
    ],
    ids=["too many tags", "text", "one tag"],
)
def test_exif_that_is_no_short_directory_means_upright(exif, orientation):
    image = Image.new("RGB", (8, 5))
    image.info["exif"] = exif
    assert read_orientation(image) == orientation
