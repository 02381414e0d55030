"""PNG and JPEG files without data for all their pixels are refused, though they end as whole files do."""

import struct
import zlib
from functools import partial

import numpy as np
import pytest
from image_files import encode_image, png_chunk
from mistakes import assert_refused
from PIL import Image

from dinoseg.utils.images import as_rgb, read_ids, read_image
from dinoseg.utils.levels import read_levels

SIZE = (43, 61)
PIXELS = np.random.default_rng(0).integers(1, 256, (*SIZE, 3)).astype(np.uint8)
READERS = (read_image, lambda path: read_levels(path, None), lambda path: as_rgb(Image.open(path), "The image"))


def png_file(pixels, *, rows=None, share=1):
    """Return a PNG file of grey or RGB pixels, or of the rows of Adam7's passes, with a share of its data."""
    interlaced = int(rows is not None)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")) if rows is None else rows
    kind = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 8 * pixels.itemsize, kind, 0, 0, interlaced)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = (b"IHDR", header), (b"IDAT", data[: int(share * len(data))]), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("interlaced", [False, True])
def test_whole_png_files_with_a_black_last_row_are_read(tmp_path, interlaced):
    pixels = np.zeros(SIZE, np.uint8)
    (tmp_path / "a.png").write_bytes(interlaced_png(pixels) if interlaced else png_file(pixels))
    assert np.array_equal(read_ids(tmp_path / "a.png"), pixels)


def interlaced_png(pixels):
    """Return a grey PNG file of Adam7's passes."""
    grids = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [pixels[top::down, left::across] for left, top, across, down in grids]
    return png_file(pixels, rows=[row for part in parts for row in part if row.size])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 4), (5, 2)])
def test_interlaced_png_files_with_empty_passes_are_read(size, tmp_path):
    (tmp_path / "a.png").write_bytes(interlaced_png(PIXELS[: size[0], : size[1], 0]))
    assert np.array_equal(read_ids(tmp_path / "a.png"), PIXELS[: size[0], : size[1], 0])


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0]])
def test_cut_jpeg_files_with_an_end_marker_are_refused(pixels, options, share, tmp_path):
    data = encode_image(pixels, "JPEG", quality=95, **options)
    start = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[: start + int(share * (len(data) - start))] + b"\xff\xd9")
    for read in READERS:
        assert_refused(partial(read, tmp_path / "a.jpg"), "truncated")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cut_png_files_are_refused(dtype, share, tmp_path):
    data = png_file(PIXELS.astype(dtype))
    (tmp_path / "a.png").write_bytes(data[: int(share * len(data))])
    (tmp_path / "b.png").write_bytes(png_file(PIXELS.astype(dtype), share=share))  # with an end mark
    for read in READERS[:2]:
        for name in ("a.png", "b.png"):
            assert_refused(partial(read, tmp_path / name), "truncated")


def test_progressive_jpeg_files_without_all_scans_are_refused(tmp_path):
    data = encode_image(PIXELS, "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) == 10
    for end in scans[1:]:
        (tmp_path / "a.jpg").write_bytes(data[:end] + b"\xff\xd9")
        assert_refused(lambda: read_image(tmp_path / "a.jpg"), "truncated")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_jpeg_files_with_a_grey_corner_are_read(mode, progressive, tmp_path):
    image = Image.fromarray(PIXELS)
    image.paste((128, 128, 128), (20, 10, *SIZE[::-1]))
    image.convert(mode).save(tmp_path / "a.jpg", progressive=progressive)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"\xff\xd9 behind \xff\xda\0\x08")
    assert read_image(tmp_path / "a.jpg").shape == (*SIZE, 3)
