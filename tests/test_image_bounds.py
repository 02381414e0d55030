"""Image files that cost far more to decode than their pixels are refused before they are decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dinoseg.utils.errors import UserError
from dinoseg.utils.images import MAX_SCANS, as_rgb, read_image

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


def skipped(data, number):
    """Return a TIFF file whose tag of that number is in 8 bytes that Pillow skips, after a tag of the file's length."""
    return hidden(data, number, 16).replace(
        struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 285, 1, len(data), 0)
    )


PLAIN = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
TILED = [*PLAIN, (324, 0), (325, 0)]


def opened(tmp_path, data, name):
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
        (hidden(tiff([*PLAIN, (273, 0), (279, 0)]), 273, 17), "the TIFF tag 273 in an unsupported form"),
        (skipped(tiff([*TILED, (322, 26_000), (323, 256)]), 322), "the TIFF tag 322 in an unsupported form"),
    ],
    ids=["scans", "tile", "tile of the other byte order", "two tiles", "width", "height", "strips", "long"],
)
@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_what_costs_more_than_its_pixels_is_refused(tmp_path, data, reason):
    name = "a.tif" if data[:2] in (b"II", b"MM") else "a.jpg"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} has .*{reason}"):
        read_image(tmp_path / name)
    with pytest.raises(UserError, match=f"The image has .*{reason}"):
        as_rgb(Image.open(io.BytesIO(data)), "The image")


def test_strips_that_no_pixel_needs_are_refused(tmp_path):
    file = io.BytesIO()
    Image.fromarray(IMAGE[..., 0]).save(file, "TIFF")
    image = Image.open(file)
    image.tag_v2[273] = (8,) * 100
    with pytest.raises(UserError, match="has 100 TIFF blocks, but its pixels need 1"):
        as_rgb(image, "The image")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (progressive(20), "a.jpg"),
        (progressive(0) + b"\xff\xda\0\0" * 2 * MAX_SCANS, "a.jpg"),  # a video behind a phone's photo
        (tiff([*TILED, (322, 256), (323, 256)]), "a.tif"),
        (tiff([*TILED, (322, 256), (323, 256)], ">"), "a.tif"),
        (tiff([*PLAIN, (273, 0), (279, 0), (278, 2**32 - 1)]), "a.tif"),  # one strip, however many rows
    ],
    ids=["scans", "behind the end", "tile", "tile of the other byte order", "strip"],
)
def test_what_encoders_write_is_read(tmp_path, data, name):
    first, second = opened(tmp_path, data, name)
    assert first.shape in ((24, 32, 3), (16, 16, 3)) and (first == second).all()


def test_a_tile_of_four_times_the_pixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dinoseg.utils.images.MAX_BLOCK_PIXELS", 100)
    first, second = opened(tmp_path, tiff([*TILED, (322, 32), (323, 32)], block=bytes(32 * 32)), "a.tif")
    assert first.shape == (16, 16, 3) and (first == second).all()
    with pytest.raises(UserError, match="in TIFF tiles of 80 x 80"):
        opened(tmp_path, tiff([*TILED, (322, 80), (323, 80)], block=bytes(80 * 80)), "a.tif")


def test_no_other_format_of_pillows_is_read_under_a_familiar_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match="cannot identify image file"):
        read_image(tmp_path / "a.png")
