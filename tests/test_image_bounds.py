"""Image files that cost far more to decode than their pixels are refused before they are decoded."""

import io
import re
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dinoseg.inference.large import FileRows, open_rows
from dinoseg.serving.decoding import read_bounded_image
from dinoseg.utils import image_cost
from dinoseg.utils.errors import UserError
from dinoseg.utils.image_cost import MAX_SCANS, check_header, count_scans
from dinoseg.utils.images import as_rgb, read_ids, read_image, read_orientation, read_size

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)


def progressive(scans):
    """Return a progressive JPEG file whose last scan is there so many times more."""
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def tiff(tags, order="<", block=bytes(256 * 256)):
    """Return a grey TIFF file of one deflated block, whose address is 0 in tags."""
    content = zlib.compress(block)
    entries = sorted((number, value) for number, value in tags if number not in (273, 279, 324, 325))
    places = sorted({number for number, _ in tags} & {273, 279, 324, 325})
    begin = 8 + 2 + 12 * (len(entries) + len(places)) + 4
    values = {273: begin, 324: begin, 279: len(content), 325: len(content)}
    entries = sorted([*entries, *((number, values[number]) for number in places)], key=lambda entry: entry[0])
    packed = b"".join(struct.pack(f"{order}HHII", number, 4, 1, value) for number, value in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(entries)) + packed + bytes(4) + content


def hidden(data, number, kind):
    """Return a TIFF file whose tag of that number has another type."""
    return data.replace(struct.pack("<HHI", number, 4, 1), struct.pack("<HHI", number, kind, 1))


def skipped_tag(data, number):
    """Return a TIFF file whose tag of that number is in 8 bytes that Pillow skips, after a tag of the file's length."""
    return hidden(data, number, 16).replace(
        struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 285, 1, len(data), 0)
    )


PLAIN = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
TILED = [*PLAIN, (324, 0), (325, 0)]


def read_both(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    return read_image(tmp_path / name), as_rgb(Image.open(io.BytesIO(data)), "The image")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (progressive(MAX_SCANS), "JPEG scans; the limit is 32"),
        (tiff([*TILED, (322, 26_000), (323, 20_000)]), "16 x 16 pixels in TIFF tiles of 26000 x 20000"),
        (tiff([*TILED, (322, 26_000), (323, 20_000)], ">"), "16 x 16 pixels in TIFF tiles of 26000 x 20000"),
        (tiff([*TILED, (322, 256), (322, 26_000), (323, 256)]), "the TIFF tag 322 twice"),
        (hidden(tiff([*TILED, (322, 26_000), (323, 256)]), 322, 17), "the TIFF tag 322 in an unsupported form"),
        (hidden(tiff([*TILED, (322, 256), (323, 26_000)]), 323, 99), "the TIFF tag 323 in an unsupported form"),
        (hidden(tiff([*PLAIN, (273, 0), (279, 0)]), 273, 99), "the TIFF tag 273 in an unsupported form"),
        (skipped_tag(tiff([*TILED, (322, 26_000), (323, 256)]), 322), "the TIFF tag 322 in an unsupported form"),
    ],
    ids=["scans", "tile", "tile of the other byte order", "two tiles", "width", "height", "strips", "long"],
)
@pytest.mark.filterwarnings("ignore:Tag data larger than file", "ignore:Metadata Warning")
def test_image_that_costs_more_than_its_pixels_is_refused(tmp_path, data, reason):
    name = "a.tif" if data[:2] in (b"II", b"MM") else "a.jpg"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} has .*{reason}"):
        read_image(tmp_path / name)
    with pytest.raises(UserError, match=f"The image has .*{reason}"):
        as_rgb(Image.open(io.BytesIO(data)), "The image")


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def short_png(width, height):
    """Return a PNG file of these sizes in its header, and of the pixels of one row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(9))) + png_chunk(b"IEND", b"")


def short_jpeg(width, height):
    """Return a JPEG file of these sizes in its header, and without pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    head = file.getvalue()[: file.getvalue().index(b"\xff\xda") + 10] + b"\xff\xd9"
    at = head.index(b"\xff\xc0") + 5
    return head[:at] + struct.pack(">HH", height, width) + head[at + 4 :]


@pytest.mark.parametrize("data", [short_png(1, 2**24), short_png(2**24, 1), short_jpeg(4096, 4096)])
def test_files_too_short_for_their_pixels_are_refused(tmp_path, data):
    path = tmp_path / "a"
    path.write_bytes(data)
    for read in (read_image, read_ids, lambda path: read_bounded_image(path, 2**24)):
        with pytest.raises(UserError, match=f"a has {len(data)} bytes, too few for .* truncated"):
            read(path)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("PNG", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")), ("JPEG", "L"), ("JPEG", "RGB")],
)
def test_uniform_images_are_not_too_short(tmp_path, kind, mode):
    for progressive in (False, True):
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
    entries = b"".join(struct.pack("<HHII", number, 4, count, value) for number, count, value in tags)
    head = b"II*\0" + struct.pack("<I", at + len(lists))
    return head + values + lists + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_more_or_fewer_strips_than_needed_are_refused(tmp_path):
    read_both(tmp_path, strips_of(6, 4), "a.tif")
    for rows, strips, needed in ((24, 100, 1), (6, 3, 4)):
        (tmp_path / "a.tif").write_bytes(strips_of(rows, strips))
        for read in (read_image, read_ids, lambda path: as_rgb(Image.open(io.BytesIO(path.read_bytes())), "The image")):
            with pytest.raises(UserError, match=f"has {strips} TIFF blocks, but its pixels need {needed}"):
                read(tmp_path / "a.tif")


def test_strips_without_a_length_are_refused(tmp_path):
    data = strips_of(6, 4).replace(struct.pack("<HHI", 279, 4, 4), struct.pack("<HHI", 279, 4, 3))
    (tmp_path / "a.tif").write_bytes(data)
    for read in (read_image, read_ids):
        with pytest.raises(UserError, match="has 3 lengths for its 4 TIFF blocks"):
            read(tmp_path / "a.tif")


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
        if not reason:
            assert np.abs(read_image(path).astype(int) - smooth).mean() < 8
            continue
        with pytest.raises(UserError, match=reason):
            read_image(path)


def test_strips_without_data_are_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(strips_of(6, 4, missing=[2]))
    for read in (read_image, read_ids):
        with pytest.raises(UserError, match="no data for its TIFF block 2"):
            read(tmp_path / "a.tif")


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
    for read in (read_image, read_ids):
        with pytest.raises(UserError, match="a.tif is damaged: its TIFF block 0"):
            read(path)


def test_chunks_longer_than_their_png_file_are_refused(tmp_path):
    long = struct.pack(">I", 2**31 - 1) + b"tEXt" + bytes(20)
    (tmp_path / "a.png").write_bytes(png_with(long, behind=True))
    with pytest.raises(UserError, match="a PNG chunk is longer than the file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (progressive(20), "a.jpg"),
        (progressive(0) + b"\xff\xda\0\0" * 2 * MAX_SCANS, "a.jpg"),  # a video behind a phone's photo
        (tiff([*TILED, (322, 256), (323, 256)]), "a.tif"),
        (tiff([*TILED, (322, 256), (323, 256)], ">"), "a.tif"),
        (
            tiff([*PLAIN, (273, 0), (279, 0), (278, 2**32 - 1)], block=bytes(16 * 16)),
            "a.tif",
        ),  # one strip, however many rows
    ],
    ids=["scans", "behind the end", "tile", "tile of the other byte order", "strip"],
)
def test_images_of_common_encoders_are_read(tmp_path, data, name):
    first, second = read_both(tmp_path, data, name)
    assert first.shape in ((24, 32, 3), (16, 16, 3)) and (first == second).all()


def test_many_segments_of_other_metadata_are_read(tmp_path):
    xmp = b"\xff\xe1\0\x09http://"
    first, second = read_both(tmp_path, jpeg_with(xmp * 100), "a.jpg")
    assert first.shape == (24, 32, 3) and (first == second).all()


def test_many_chunks_of_pixels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cost, "MAX_CHUNKS", 20)
    data = png_with()
    start = data.index(b"IDAT") + 4
    pixels = data[start : start + int.from_bytes(data[start - 8 : start - 4], "big")]
    chunks = [chunk(b"IDAT", pixels[at : at + 16]) for at in range(0, len(pixels), 16)]
    first, second = read_both(tmp_path, data[: start - 8] + b"".join(chunks) + chunk(b"IEND", b""), "a.png")
    assert len(chunks) > 100 and (first == IMAGE).all() and (second == IMAGE).all()


def test_a_tile_of_four_times_the_pixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dinoseg.utils.tiff._MAX_BLOCK_PIXELS", 100)
    first, second = read_both(tmp_path, tiff([*TILED, (322, 32), (323, 32)], block=bytes(32 * 32)), "a.tif")
    assert first.shape == (16, 16, 3) and (first == second).all()
    with pytest.raises(UserError, match="in TIFF tiles of 80 x 80"):
        read_both(tmp_path, tiff([*TILED, (322, 80), (323, 80)], block=bytes(80 * 80)), "a.tif")


def test_image_of_another_format_than_its_suffix_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match="a.png as an image"):
        read_image(tmp_path / "a.png")


def jpeg_with(*parts):
    """Return a JPEG file with bytes between its first marker and its segments."""
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG")
    return file.getvalue()[:2] + b"".join(parts) + file.getvalue()[2:]


def chunk(name, content):
    """Return a PNG chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks, behind=False):
    """Return a PNG file with chunks before its pixels, or behind them."""
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    at = len(file.getvalue()) - 12 if behind else 33
    return file.getvalue()[:at] + b"".join(chunks) + file.getvalue()[at:]


def tiff_of(tags):
    """Return the start of a TIFF file whose first directory has these (number, type, count)."""
    entries = b"".join(struct.pack("<HHII", *tag, 8) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


COMMENT = b"\xff\xfe\0\2"
EXIF = b"\xff\xe1\0\x09Exif\0\0x"
PROFILE = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20)))
COSTLY_HEADERS = {
    "segments": ("a.jpg", jpeg_with(COMMENT * 2000), "over 1024 JPEG segments"),
    "exif": ("a.jpg", jpeg_with(EXIF * 100), "over 8 JPEG segments of EXIF"),
    "restart markers": ("a.jpg", jpeg_with(b"\xff\xd0" * 2000), "over 1024 JPEG segments"),
    "fill": ("a.jpg", jpeg_with(b"\xff" * 70_000), "over 65536 bytes between"),
    "junk": ("a.jpg", jpeg_with(COMMENT, bytes(70_000)), "over 65536 bytes between"),
    "chunks": ("a.png", png_with(chunk(b"tIME", b"") * 5000), "over 4096 PNG chunks"),
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
    (tmp_path / name).write_bytes(data)
    for read in (read_size, read_image, read_ids):
        with pytest.raises(UserError, match=f"{name} (has|is) {reason}"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=reason):
        read_bounded_image(tmp_path / name, 10**6)


@pytest.mark.parametrize("case", ["segments", "fill", "chunks", "tags", "long"])
def test_rows_of_files_with_costly_headers_are_refused(tmp_path, case):
    name, data, reason = COSTLY_HEADERS[case]
    (tmp_path / name).write_bytes(data)
    for read in (open_rows, FileRows):
        with pytest.raises(UserError, match=reason):
            read(tmp_path / name, torch.device("cpu"))


def test_profiles_behind_the_pixels_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png_with(PROFILE * 65, behind=True))
    assert read_size(tmp_path / "a.png") == (24, 32)  # the header itself is short
    with pytest.raises(UserError, match="over 64 compressed PNG chunks"):
        read_image(tmp_path / "a.png")


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
    "data", [jpeg_with(COMMENT * 1000), png_with(chunk(b"tIME", b"") * 4000), tiff_of([(1, 4, 1)] * 4000)]
)
def test_header_check_reads_each_part_once(data):
    file = CountedFile(data)
    check_header(file)
    assert file.tell() == 0 and file.reads < 4100 and file.bytes_read < 2 * len(data) + 10_000


def test_jpeg_segments_after_the_first_scan_are_bounded(tmp_path):
    data = progressive(MAX_SCANS)
    at = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:at] + COMMENT * 2000 + data[at:])
    with pytest.raises(UserError, match="over 1024 JPEG segments"):
        read_image(tmp_path / "a.jpg")


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
def test_scan_counts_of_progressive_files_are_exact(tmp_path, monkeypatch, size):
    monkeypatch.setattr(image_cost, "MAX_SCANS", 0)  # all are counted exactly
    pixels = np.random.default_rng(0).integers(0, 60, (*size, 3)).astype(np.uint8)
    counts = set()
    for options in (
        {"progressive": True},
        {"progressive": True, "quality": 100, "subsampling": 0},
        {"progressive": True, "restart_marker_blocks": 2},
        {"optimize": True, "restart_marker_rows": 1},
    ):
        Image.fromarray(pixels).save(tmp_path / "a.jpg", **options)
        data = (tmp_path / "a.jpg").read_bytes()
        counts.add(count_scans(data))
        assert count_scans(data) == count_scans_by_backtracking(data)
    assert counts == {1, 10}


def test_exif_of_too_many_tags_means_upright():
    exif = b"Exif\0\0" + tiff_of([(number, 3, 1) for number in range(10_000)])
    image = Image.new("RGB", (8, 5))
    image.info["exif"] = exif
    assert read_orientation(image) == 1
    image.info["exif"] = "text of a PNG chunk of that name"
    assert read_orientation(image) == 1
    image.info["exif"] = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 274, 3, 1, 6) + bytes(4)
    assert read_orientation(image) == 6
