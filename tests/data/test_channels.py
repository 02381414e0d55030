"""Images of any number of channels: their files, levels, views and packed items."""

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from image_files import png_chunk
from making import save
from mistakes import assert_refused, refusals
from PIL import Image

from dinoseg.core.channels import PixelFormat, check_rgb
from dinoseg.core.geometry import to_unit_range
from dinoseg.core.shapes import Batch, join_batches
from dinoseg.core.sources import has_own_file
from dinoseg.data.checks.errors import check_for_errors, describe_split
from dinoseg.data.checks.files import check_range
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.photometric import PhotometricDistortion
from dinoseg.data.scan.measure import measure
from dinoseg.data.scan.scan import scan
from dinoseg.data.transforms import Affine, Augment, ColorJitter
from dinoseg.extensions.packed.pack import pack
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.inference.inputs import list_inputs
from dinoseg.segmenter.inputs import pictures
from dinoseg.utils import levels as levels_module
from dinoseg.utils.files import stamp
from dinoseg.utils.images import read_image
from dinoseg.utils.levels import read_levels, read_levels_size, to_display, to_levels
from dinoseg.utils.tiff import TiffPage

SIZE = (21, 34)
DISTORTION = PhotometricDistortion(0.1, 0.1, 0.1, 0.1)
DEEP = PixelFormat(4, value_range=(0, 4095))
PLANES = {"photometric": "rgb", "planarconfig": "separate"}


def levels(channels, dtype=np.uint8, seed=0, size=SIZE):
    most = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, most + 1, (*size, channels)).astype(dtype)


def save_pages(path, pages):
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(path, save_all=True, append_images=others)


def touch(root, *names):
    """Write empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def save_with_opencv(path, image):
    cv2.imwrite(str(path), image[..., [2, 1, 0, 3][: image.shape[2]]] if image.shape[2] > 1 else image)


def write_tiff(path, image):
    """Write an image of one channel, of RGB, or of RGB and premultiplied alpha."""
    if image.shape[2] == 1:
        tifffile.imwrite(path, image[..., 0], photometric="minisblack")
    else:
        tifffile.imwrite(path, image, photometric="rgb", extrasamples=["assocalpha"] * (image.shape[2] - 3))


def save_grey_and_alpha(path, image):
    """Write a PNG file of two channels."""
    header = struct.pack(">IIBBBBB", *SIZE[::-1], 8 * image.itemsize, 4, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in image)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    content = b"".join(png_chunk(*chunk) for chunk in chunks.items())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("name", "channels", "write"),
    [
        *((f"a.{suffix}", channels, save_with_opencv) for suffix in ("png", "tif") for channels in (1, 3, 4)),
        ("grey_and_alpha.png", 2, save_grey_and_alpha),
        ("pages.tif", 7, lambda path, image: save_pages(path, np.moveaxis(image, 2, 0))),
        ("planes.tif", 3, lambda path, image: tifffile.imwrite(path, image.transpose(2, 0, 1), **PLANES)),
        ("zero_as_white.tif", 1, lambda path, image: tifffile.imwrite(path, ~image[..., 0], photometric="miniswhite")),
        ("alpha_that_changes_no_other_channel.tif", 4, write_tiff),
    ],
)
def test_files_of_8_and_16_bits_keep_their_levels(name, channels, write, dtype, tmp_path):
    image = levels(channels, dtype)
    write(tmp_path / name, image)
    assert np.array_equal(read_levels(tmp_path / name, None), image)
    if channels == 3 and dtype == np.uint8:
        assert np.array_equal(read_image(tmp_path / name), image)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<f4", "<f8", "<f2", "<i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_keep_their_levels(order, dtype, tmp_path):
    values = np.asarray(np.random.default_rng(0).integers(0, 200, (*SIZE, 5)).astype(dtype), order=order)
    np.save(tmp_path / "a.npy", values)
    value_range = None if np.dtype(dtype).kind == "u" else [-50, 205]
    wanted = values if value_range is None else np.round((values.astype(float) + 50) * 257)
    assert np.array_equal(read_levels(tmp_path / "a.npy", value_range), wanted)
    assert PixelFormat(5).size(tmp_path / "a.npy") == SIZE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("images/a.jpg", "nir/a.png"),
        ("x_images.png", "x_nir.png"),
        ("images/sub/a_images.png", "nir/sub/a_nir.tif"),
        ("old/images/images/a.png", "old/images/nir/a.npy"),
        ("images/a.png", "nir/a.TIF"),
        ("images/a_images.png", "nir/a_images.png"),
        ("images/a_images.png", "images/a_nir.png"),
    ],
)
def test_further_files_are_found_by_their_word(first, second, tmp_path):
    root = tmp_path / "images" / "my_images_1"
    touch(root, first, second)
    assert PixelFormat(4, ("images", "nir")).paths(root / first) == [root / first, root / second]


def test_a_file_of_both_replacements_comes_first(tmp_path):
    first, *names = ("images/x_images.png", "nir/x_nir.png", "images/x_nir.png", "nir/x_images.png")
    touch(tmp_path, first, *names)
    for name in names:
        assert PixelFormat(4, ("images", "nir")).paths(tmp_path / first)[1] == tmp_path / name
        (tmp_path / name).unlink()


def paths_of(*names):
    """Write empty files, and return the files of the first one's image."""
    touch(Path(), *names)
    return PixelFormat(4, ("images", "nir")).paths(Path(names[0]))


def read_pair(*arguments, **options):
    """Return a function that reads an image and its infrared in a format."""

    def read():
        save(Path("nir/a.png"), levels(1, seed=1)[..., 0])
        return PixelFormat(*arguments, **options).read(save(Path("rgb/a.png"), levels(3)))

    return read


def read_array(values, value_range=None, size=None):
    """Return a function that reads an array, of whose file the first bytes are there."""

    def read():
        np.save("a.npy", values)
        os.truncate("a.npy", Path("a.npy").stat().st_size if size is None else size)
        return read_levels(Path("a.npy"), value_range)

    return read


NO_FILES = ("data.channels=3; or set data/pixels=files, and ", " data.pixels.files, ", " [images,nir]")
test_message_names_value_and_remedy = refusals(
    {
        "another sum": (read_pair(files=["rgb", "nir"]), "3 + 1 channels, and data.channels=3"),
        "no file of a word": (read_pair(4, ["rgb", "depth"]), "no file of `depth`"),
        "no word": (read_pair(4, ["images", "nir"]), "no file of `nir`"),
        "no words": (read_pair(4), *NO_FILES),
        "order beyond the end": (
            read_pair(4, ["rgb", "nir"], [0, 1, 2, 4]),
            "order=[0, 1, 2, 4]. Give numbers from 0 to 3",
        ),
        "short order": (lambda: PixelFormat(4, order=[0, 1]), "order=[0, 1] has 2 numbers, and data.channels=4"),
        "one word": (read_pair(files=["rgb"]), "at least two"),
        "empty range": (read_pair(value_range=(5, 5)), "lowest < highest"),
        "endless range": (read_pair(value_range=(0, float("inf"))), "finite"),
        "floats": (read_array(np.zeros((4, 4), np.float32)), "unknown range"),
        "no numbers": (read_array(np.full((4, 4), np.nan), [0, 1]), "nan"),
        "above the range": (read_array(np.full((4, 4), 2.0), [0, 1]), "from 2 to 2"),
        "objects": (read_array(np.zeros((4, 4), object)), "Object arrays"),
        "four axes": (read_array(np.zeros((2, 4, 4, 3), np.uint8)), "[2, 4, 4, 3]"),
        "no rows": (read_array(np.zeros((0, 4), np.uint8)), "[0, 4]"),
        "truncated": (read_array(levels(4), size=200), "truncated"),
        "a word within another": (lambda: paths_of("myimages/a.png", "nir/a.png"), "no file of `nir`"),
        "a word before another": (lambda: paths_of("images2/a.png", "nir/a.png"), "no file of `nir`"),
        "two files": (lambda: paths_of("images/a.png", "nir/a.png", "nir/a.tif"), "two files of `nir`:", "a.tif"),
        "no array": (lambda: Path("a.npy").write_bytes(b"none") and read_levels(Path("a.npy"), None), "as an image"),
        "no file": (lambda: read_levels(Path("b.npy"), None), "b.npy", "not found"),
        "RGB only": (lambda: check_rgb(PixelFormat(5), "a frame"), "A frame has 3 channels", "data.channels=5"),
        "16 bits": (lambda: DISTORTION(levels(3, np.uint16), np.zeros(9)), "color=jitter"),
        "integers": (lambda: list(pictures(torch.full((4, 5, 6), 4095), pixels=DEEP)), "is of int64: give uint8"),
        "values": (lambda: list(pictures(torch.full((4, 5, 6), 4095.0), pixels=DEEP)), "levels in 0..1"),
    }
)


@pytest.mark.parametrize("function", [PixelFormat.read, PixelFormat.size])
def test_files_of_different_sizes_are_refused(function, tmp_path):
    save(tmp_path / "nir/a.png", levels(1, size=(5, 6))[..., 0])
    path = save(tmp_path / "rgb/a.png", levels(3))
    assert_refused(lambda: function(PixelFormat(4, ("rgb", "nir")), path), "5 x 6 pixels, and", "21 x 34")


@pytest.mark.parametrize("shape", ["(-2, -2)", "(True, True)", "-" * 6000 + "1", "('a', 2)", "7"])
def test_hostile_headers_of_arrays_are_refused_shortly(shape, tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    message = assert_refused(lambda: read_levels(tmp_path / "a.npy", None), "a.npy")
    assert len(message) < len(str(tmp_path)) + 150


def test_large_files_of_16_bits_are_refused_before_decoding(tmp_path, monkeypatch):
    image = levels(3, np.uint16)
    cv2.imwritemulti(str(tmp_path / "a.tif"), [image[..., ::-1]] * 3)
    assert np.array_equal(read_levels(tmp_path / "a.tif", None), np.dstack([image] * 3))
    monkeypatch.setattr(levels_module, "MAX_NUMBERS", 8 * 21 * 34)
    monkeypatch.setattr(TiffPage, "read", None)
    assert_refused(lambda: read_levels(tmp_path / "a.tif", None), "numbers")


def tiff_of_pages(*pages):
    """Return a TIFF file of grey pages that share 4 x 4 black pixels; each page is its tags (number, type, value)."""
    content = bytes(16)
    place = 8 + 16
    for number, tags in enumerate(pages):
        following = place + 2 + 12 * len(tags) + 4 if number + 1 < len(pages) else 0
        entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        content += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
        place = following
    return b"II*\0" + struct.pack("<I", 24) + content


PAGE = [(256, 4, 4), (257, 4, 4), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 4), (279, 4, 16)]


@pytest.mark.parametrize(
    "page",
    [PAGE[1:], [*PAGE[:3], (259, 3, 99), *PAGE[4:]], [*PAGE[:5], (273, 11, 8), *PAGE[6:]], []],
    ids=["no width", "unknown compression", "fractional offset", "no tags"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_damaged_pages_are_refused(place, page, tmp_path):
    pages = [PAGE, PAGE]
    pages[place] = page
    (tmp_path / "a.tif").write_bytes(tiff_of_pages(*pages))
    assert_refused(lambda: PixelFormat(2).read(tmp_path / "a.tif"), "a.tif")


def test_values_that_are_no_levels_need_a_range(tmp_path):
    values = levels(1).view(np.int8)
    tifffile.imwrite(tmp_path / "a.tif", values[..., 0], photometric="minisblack")
    assert_refused(lambda: read_levels(tmp_path / "a.tif", None), "int8 values of unknown range")
    assert_refused(lambda: read_image(tmp_path / "a.tif"), "values from -", "data.pixels.value_range")
    expected = to_levels(values, [-128, 127], "The image")
    assert np.array_equal(read_levels(tmp_path / "a.tif", [-128, 127]), expected)


@pytest.mark.parametrize(("bands", "dtype"), [(2, np.uint8), (4, np.uint16), (6, np.uint32), (8, np.float32)])
def test_tiff_bands_stored_together_or_in_planes_are_read(dtype, bands, tmp_path):
    values = levels(bands, np.uint16).astype(dtype)
    value_range = None if dtype in (np.uint8, np.uint16) else (0, 65535)
    expected = values if dtype == np.uint8 else values.astype(np.uint16)
    for compression, tile, order in ((None, None, ">"), ("lzw", (16, 16), "<"), ("zstd", (16, 16), ">")):
        options = {"compression": compression, "tile": tile, "byteorder": order, "photometric": "minisblack"}
        options["bigtiff"] = order == ">"
        for planes, stored in (("contig", values), ("separate", values.transpose(2, 0, 1))):
            tifffile.imwrite(tmp_path / "a.tif", stored, planarconfig=planes, **options)
            assert np.array_equal(PixelFormat(bands, value_range=value_range).read(tmp_path / "a.tif"), expected)
            assert read_levels_size(tmp_path / "a.tif") == SIZE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_files_of_16_bits(orientation, tmp_path):
    image = levels(3, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    (tmp_path / "deep.png").write_bytes(content[:33] + png_chunk(b"eXIf", exif.tobytes()[6:]) + content[33:])
    Image.fromarray((image >> 8).astype(np.uint8)).save(tmp_path / "flat.png", exif=exif)
    found = read_levels(tmp_path / "deep.png", None)
    assert found.shape[:2] == read_levels_size(tmp_path / "deep.png")
    assert np.array_equal(found >> 8, read_levels(tmp_path / "flat.png", None))


def test_further_frames_of_a_png_are_not_decoded(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.png"), levels(3, np.uint16))
    decode = cv2.imdecodemulti
    asked = []
    monkeypatch.setattr(cv2, "imdecodemulti", lambda *args, **kwargs: asked.append(kwargs) or decode(*args, **kwargs))
    read_levels(tmp_path / "a.png", None)
    assert asked == [{"range": (0, 1)}]


def test_large_arrays_are_scaled_in_bands_of_rows():
    values = np.random.default_rng(0).random((4096, 2048), np.float32)
    tracemalloc.start()
    found = to_levels(values[..., None], [0, 1], "The image")
    assert tracemalloc.get_traced_memory()[1] < 4 * values.nbytes  # float64 values alone have twice its bytes
    tracemalloc.stop()
    assert np.array_equal(found[..., 0], np.round(values.astype(float) * 65535))
    smallest = to_levels(np.array([[[0.0], [5e-324]]]), [0, 5e-324], "The image")  # without overflow
    assert smallest.ravel().tolist() == [0, 65535]


def test_pages_of_different_depths_are_scaled_as_files(tmp_path):
    save_pages(tmp_path / "a.tif", [levels(3), levels(1, np.uint16)[..., 0]])
    found = read_levels(tmp_path / "a.tif", None)
    assert np.array_equal(found, np.dstack([levels(3).astype(np.uint16) * 257, levels(1, np.uint16)]))
    Image.frombytes("RGBX", SIZE[::-1], levels(4).tobytes()).save(tmp_path / "a.tif")  # X: an unspecified channel
    assert np.array_equal(PixelFormat(4).read(tmp_path / "a.tif"), levels(4))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_arrays_are_scaled_as_files_are(dtype, tmp_path):
    values = (levels(4, np.uint16) >> 4).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    of_file, of_array = (image for _, image in pictures([tmp_path / "a.npy", values], pixels=DEEP))
    assert of_file.dtype == np.uint16 and of_file.max() > 60000
    assert np.array_equal(of_file, of_array)
    above = values + values.dtype.type(1)
    assert_refused(lambda: list(pictures([above], pixels=DEEP)), "image 0 holds values", "outside")


def test_arrays_are_read_only_for_extra_channels(tmp_path):
    touch(tmp_path / "train", "images/b.npy", "masks/a.png")
    save(tmp_path / "train/images/a.png", levels(3))
    data = folder_dataset(tmp_path, "train", classes=["a", "b"])
    assert data.names == ["a"] and not data.lacking
    suffixes = PixelFormat(4).suffixes
    data = folder_dataset(tmp_path, "train", classes=["a", "b"], suffixes=suffixes)
    assert data.names == ["a"] and list(data.lacking) == ["b"]
    images = str(tmp_path / "train/images")
    assert [path.name for path in list_inputs(images)] == ["a.png"]
    assert [path.name for path in list_inputs(images, suffixes=suffixes)] == ["a.png", "b.npy"]
    assert [path.name for path, _ in pictures(images)] == ["a.png"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_levels_of_tensors_are_not_scaled_again(dtype):
    image = torch.from_numpy(levels(4, np.uint8 if dtype == torch.uint8 else np.uint16))
    given = (image / 65535 if dtype == torch.float32 else image).permute(2, 0, 1)
    (found,) = (pixels for _, pixels in pictures(given, pixels=DEEP))
    assert np.array_equal(found, image)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (2, np.uint8), (4, np.uint16), (5, np.uint8)])
@pytest.mark.parametrize(("resample", "padding"), [("area", "spread"), ("antialias", "end"), ("bilinear", "spread")])
def test_views_move_all_channels_alike(padding, resample, channels, dtype):
    """A view of several channels is that of each channel alone."""
    image = levels(channels, dtype, size=(50, 40))
    mask = np.zeros((50, 40), np.uint8)
    moves = {"scale": (0.4, 0.9), "padding": padding, "resample": resample, "fill": (9, 9, 9)}
    augment = Augment((32, 48), affine=Affine(degrees=0 if padding == "end" else 20), **moves)
    seen, _ = augment(image, mask, np.random.default_rng(3))
    assert seen.dtype == dtype and seen.shape == (32, 48, channels)
    for channel in range(channels):
        alone, _ = augment(image[..., [channel]], mask, np.random.default_rng(3))
        assert np.array_equal(seen[..., channel], alone[..., 0])


def test_views_of_rgb_do_not_depend_on_further_channels():
    image = levels(5, size=(50, 40))
    mask = np.zeros((50, 40), np.uint8)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.2)
    augment, plain = (Augment((32, 48), scale=(0.5, 2), flip=0.5, color=color) for color in (jitter, ColorJitter()))
    for seed in range(5):
        seen, rgb = (augment(image[..., :count], mask, np.random.default_rng(seed))[0] for count in (5, 3))
        unchanged, _ = plain(image, mask, np.random.default_rng(seed))
        assert np.array_equal(seen[..., :3], rgb) and not np.array_equal(rgb, unchanged[..., :3])
        assert np.array_equal(seen[..., 3:], unchanged[..., 3:])


@pytest.mark.parametrize(("channels", "changes"), [(1, True), (2, False)])
def test_a_single_channel_is_augmented_as_grey(channels, changes):
    image = levels(channels, size=(50, 40))
    mask = np.zeros((50, 40), np.uint8)
    augment = Augment((50, 40), color=ColorJitter(0.4, 0.4, 0.4, 0.2))
    seen, _ = augment(image, mask, np.random.default_rng(1))
    grey, _ = augment(image[..., :1].repeat(3, axis=2), mask, np.random.default_rng(1))
    assert not np.array_equal(grey[..., :1], image[..., :1])
    assert np.array_equal(seen, grey[..., :1] if changes else image)


def test_views_of_16_bits_are_those_of_8_with_their_fill():
    image = levels(4, size=(50, 40))
    mask = np.zeros((50, 40), np.uint8)
    augment = Augment((32, 48), scale=(0.5, 2), color=ColorJitter(0.2, 0.2, 0.2, 0.1))
    seen, deep = (augment(each, mask, np.random.default_rng(1))[0] for each in (image, image.astype(np.uint16) * 257))
    assert np.abs(deep / 257 - seen).max() < 1.01
    image = levels(5, np.uint16, size=(4, 4))
    mask = np.zeros((4, 4), np.uint8)
    seen, _ = Augment((8, 8), padding="end", fill=(0, 30, 60))(image, mask, np.random.default_rng(0))
    assert (seen[-1, -1] == 257 * np.array([0, 30, 60, 30, 30])).all()


def dataset(root, count=3, **values):
    """Return a dataset of RGB in 8 bits and infrared in 16."""
    pairs = []
    for number in range(count):
        save(root / f"rgb/{number}.png", levels(3, seed=number))
        save(root / f"nir/{number}.png", levels(1, np.uint16, seed=number)[..., 0], np.uint16)
        save(root / f"masks/{number}.png", levels(1, seed=9)[..., 0] > 100)
        pairs.append(Pair(f"{number}", root / f"rgb/{number}.png", root / f"masks/{number}.png"))
    data = PairDataset(pairs, Labels.of(["a", "b"], None, 255), Masks())
    return data.read_as(PixelFormat(4, ("rgb", "nir"), **values))


def datasets_of(root, images, pixels=PixelFormat()):  # noqa: B008 (frozen)
    """Write each image with a mask, and return a dataset of each."""
    mask = save(root / "mask.png", levels(1)[..., 0] > 100)
    datasets = []
    for number, image in enumerate(images):
        write_tiff(root / f"{number}.tif", image)
        pair = Pair(f"{number}", root / f"{number}.tif", mask)
        datasets.append(PairDataset([pair], Labels.of(["a", "b"], None, 255), Masks()).read_as(pixels))
    return datasets


def test_datasets_are_packed_and_read_in_several_formats(tmp_path):
    data = dataset(tmp_path)
    packed = pack(data, cache_dir=tmp_path / "cache", workers=1)
    for first, second in zip(data, packed, strict=True):
        assert second["image"].dtype == torch.uint16 and second["image"].shape == (4, *SIZE)
        assert torch.equal(first["image"], second["image"]) and torch.equal(first["mask"], second["mask"])
    reduced = pack(data, cache_dir=tmp_path / "cache", longest=16, workers=1)
    assert reduced[0]["image"].shape == (4, 10, 16) and np.array_equal(reduced.mask(0), reduced[0]["mask"].numpy())
    two = data.read_as(PixelFormat(2, ("rgb", "nir"), order=(3, 0)))
    rgb = data.read_as(PixelFormat())
    assert torch.equal(two[0]["image"], data[0]["image"][[3, 0]]) and data[0]["image"].shape[0] == 4
    assert rgb[0]["image"].dtype == torch.uint8


def test_a_changed_file_or_format_is_other_data(tmp_path):
    data = dataset(tmp_path)
    seen = [(data.fingerprint(), data.image_hash(0))]
    save(tmp_path / "nir/0.png", levels(1, np.uint16, seed=7)[..., 0], np.uint16)
    for each in (data, data.read_as(PixelFormat(4, ("rgb", "nir"), order=(3, 0, 1, 2)))):
        seen.append((each.fingerprint(), each.image_hash(0)))
    assert all(len(set(values)) == 3 for values in zip(*seen, strict=True))


def test_frames_of_videos_are_rgb_and_stay_frames():
    frame = VideoFrame(Path("film.avi"), 3)
    data = PairDataset([Pair("a", frame, Path("a.png"))], Labels.of(["a", "b"], None, 255), Masks())
    assert data.read_as(PixelFormat()).pairs[0].image is frame and not has_own_file(frame)
    assert_refused(lambda: data.read_as(PixelFormat(4)), "Frame 3 of film.avi has 3 channels", "data.channels=4")


def test_the_stamp_of_an_image_is_that_of_its_newest_file(tmp_path):
    source = dataset(tmp_path).pairs[0].image
    infrared = tmp_path / "nir/0.png"
    os.utime(infrared, (1, 1))  # as unpacked from an archive
    seen = [stamp(source)]
    (tmp_path / "other.png").write_bytes(infrared.read_bytes() + b"more")
    os.utime(tmp_path / "other.png", (1, 1))
    os.replace(tmp_path / "other.png", infrared)
    seen.append(stamp(source))
    for folder in ("rgb", "nir"):
        later = 10**9 + max(path.stat().st_mtime_ns for path in source.paths)
        os.utime(tmp_path / folder / "0.png", ns=(later, later))
        seen.append(stamp(source))
    assert len(set(seen)) == 4
    infrared.unlink()
    assert stamp(source) is None


@pytest.mark.parametrize("images", [True, False])
def test_the_data_check_reports_a_missing_file(images, tmp_path):
    data = dataset(tmp_path)
    assert not measure(data.pairs[0], data.reader, images=images).problems
    (tmp_path / "nir/0.png").unlink()
    record = measure(data.pairs[0], data.reader, images=images)
    assert "no file of `nir`" in record.problems["unreadable_image"]


@pytest.mark.parametrize(("bits", "channels"), [(8, 3), (10, 1), (12, 4), (12, 3), (14, 4), (16, 1), (16, 3)])
def test_sixteen_bit_images_of_fewer_bits_get_a_warning(bits, channels, tmp_path, caplog):
    images = [np.random.default_rng(number).integers(0, 2**bits, (*SIZE, channels)) for number in range(2)]
    for image in images:
        image[0, 0] = 2**bits - 1
    train, val = datasets_of(tmp_path, [image.astype(np.uint16) for image in images], PixelFormat(channels))
    check_for_errors(train, val, cache_dir=tmp_path)
    message = f"highest levels of the images of 16 bits that were read (2) are {2**bits - 1} (channel 0)"
    expected = bits < 16 and channels != 3  # reading an image as RGB warns by itself, see test_images.py
    assert caplog.text.count(message) == caplog.text.count(f"data.pixels.value_range=[0,{2**bits - 1}]") == expected
    record = measure(train.pairs[0], train.reader, images=True)
    findings = check_range([describe_split("train", train, [record])])
    assert [finding.severity for finding in findings] == ["warning"] * (bits < 16)


def test_dark_images_are_listed_with_the_next_range(tmp_path):
    images = [np.full((*SIZE, 1), 255, np.uint8), np.full((*SIZE, 1), 256, np.uint16)]
    sets = datasets_of(tmp_path, images)
    records = [measure(data.pairs[0], data.reader, images=True) for data in sets]
    (finding,) = check_range([describe_split("train", sets[0], records)])
    assert finding.lines == (str(tmp_path / "1.tif"),) and "value_range=[0,1023]" in finding.remedy


@pytest.mark.parametrize("most", [65535, 4095])
def test_dark_channels_next_to_a_bright_one_are_named(most, tmp_path, caplog):
    images = [np.minimum(levels(4, seed=number).astype(np.uint16), 247) for number in range(2)]
    for image in images:
        image[0, 0] = (247, 255, 255, most)
    train, val = datasets_of(tmp_path, images, PixelFormat(4))
    records = scan(train.pairs, train.reader, cache_dir=tmp_path)
    assert scan(train.pairs, train.reader, cache_dir=tmp_path) == records  # as they are stored
    (finding,) = check_range([describe_split("train", train, records)])
    assert "247 (channel 0), 255 (channel 1), 255 (channel 2)" in finding.message
    assert ("(channel 3)" in finding.message) == ("value_range=[0,4095]" in finding.remedy) == (most == 4095)
    assert "scale each to 0..65535" in finding.remedy
    check_for_errors(train, val, cache_dir=tmp_path)
    assert caplog.text.count("247 (channel 0), 255 (channel 1), 255 (channel 2)") == 1


@pytest.mark.parametrize("kind", ["declared", "mixed", "flat"])
def test_declared_ranges_and_8_bits_get_no_warning(kind, tmp_path):
    data = dataset(tmp_path, count=1, **({"value_range": (0, 4095)} if kind == "declared" else {}))
    infrared = levels(1)[..., 0] if kind == "flat" else levels(1, np.uint16)[..., 0] % 4096
    save(tmp_path / "nir/0.png", infrared, infrared.dtype)
    peaks = measure(data.pairs[0], data.reader, images=True).peaks
    assert peaks == ((0, 0, 0, infrared.max()) if kind == "mixed" else ())  # colours of 8 bits are not counted


def test_batches_of_8_and_16_bits_keep_the_share_of_white():
    images = [torch.from_numpy(levels(4, dtype)).permute(2, 0, 1) for dtype in (np.uint8, np.uint16)]
    samples = [{"image": image, "mask": torch.zeros(SIZE), "name": "x"} for image in images]
    wanted = torch.stack([to_unit_range(image) for image in images])
    parts = [Batch.stack([sample]) for sample in samples]
    for batch in (Batch.stack(samples), join_batches(parts)):
        assert torch.equal(to_unit_range(batch.image), wanted)
        parts = batch.to(torch.device("cpu")).split(2)
        assert torch.equal(torch.cat([to_unit_range(part.image) for part in parts]), wanted)


def test_figures_show_the_first_three_channels():
    image = levels(5, np.uint16)
    assert np.array_equal(to_display(image), np.round(image[..., :3] / 257).astype(np.uint8))
    grey = to_display(levels(2))
    assert grey.dtype == np.uint8 and np.array_equal(grey, levels(2)[..., [0, 0, 0]])
