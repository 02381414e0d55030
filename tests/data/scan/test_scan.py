"""The scan against what the data set itself reads, on good files and on every kind of bad one."""

import errno
import os
from functools import partial

import cv2
import numpy as np
import pytest
from making import Pictures, save
from mistakes import assert_refused
from overlapping_shapes import CLASSES as OVERLAPPING
from overlapping_shapes import write_overlaps
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.scan import scan as scan_module
from dinoseg.data.scan.measure import Details, digest
from dinoseg.data.scan.scan import class_counts, scan, unreadable
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image
from dinoseg.utils.wording import list_reasons

CLASSES = ("a", "b", "c")


def picture(seed, size=(40, 56)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def ids(seed, size=(40, 56)):
    coarse = np.random.default_rng(seed).choice([0, 1, 2, 255], (4, 5)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)


@pytest.fixture
def fill(tmp_path):
    """Write pairs and return their data set."""

    def write(count=5, **masks):
        for index in range(count):
            save(tmp_path / f"train/images/n{index}.png", picture(index))
            save(tmp_path / f"train/masks/n{index}.png", ids(index))
        return folder_dataset(tmp_path, "train", classes=CLASSES, masks=Masks(**masks))

    return write


def test_counts_and_sizes(fill):
    data = fill()
    records = scan(data.pairs, data.reader)
    assert [record.name for record in records] == data.names and not unreadable(records)
    for index, record in enumerate(records):
        assert record.image_size == record.mask_size == (40, 56)
        np.testing.assert_array_equal(record.counts, np.bincount(ids(index).ravel(), minlength=256))
        assert record.raw == {str(value): count for value, count in record.pixels.items()}
    assert len({record.image_digest for record in records}) == len({record.mask_digest for record in records}) == 5
    for record in scan(data.pairs, data.reader, images=False):
        assert record.image_size == (40, 56) and record.pixels and record.image_digest == ""


def test_resized_and_turned_masks_count_as_training_sees_them(fill, tmp_path):
    data = fill(3, on_size_mismatch="resize_mask")
    save(tmp_path / "train/masks/n0.png", ids(0, (20, 28)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    save(tmp_path / "train/images/n1.png", picture(1, (56, 40)), exif=exif)
    for images in (True, False):
        records = scan(data.pairs, data.reader, images=images)
        assert [record.mask_size for record in records] == [(20, 28), (40, 56), (40, 56)]
        assert {record.image_size for record in records} == {(40, 56)} and not unreadable(records)
        for index, record in enumerate(records):
            np.testing.assert_array_equal(record.counts, np.bincount(data.mask(index).ravel(), minlength=256))
    save(tmp_path / "train/masks/n0.png", ids(0, (56, 40)))  # of other proportions
    assert_refused(lambda: data[0], "n0.png")
    assert list(scan(data.pairs, data.reader)[0].problems) == ["size_mismatch"]


def test_raw_counts_are_the_values_in_the_file(tmp_path):
    mask = save(tmp_path / "m.png", [[0, 0, 5], [1, 255, 255]])
    save(tmp_path / "i.png", np.zeros((2, 3, 3)))

    def raw(masks, classes=CLASSES, palette=None, path=mask):
        reader = MaskReader(Labels.of(classes, palette, 255), masks)
        return scan([Pair("x", tmp_path / "i.png", path)], reader)[0].raw

    assert raw(Masks(ids={5: 0, 255: 1})) == {"0": 2, "1": 1, "5": 1, "255": 2}
    assert raw(Masks()) == {"0": 2, "1": 1, "5": 1, "255": 2}
    binary = save(tmp_path / "b.png", [[0, 0, 0], [255, 255, 0]])
    assert raw(Masks("binary"), CLASSES[:2], path=binary) == {"0": 4, "255": 2}
    colored = save(tmp_path / "c.png", [[[9, 8, 7]] * 3, [[1, 2, 3]] * 3])
    assert raw(Masks("palette"), ["u"], [[9, 8, 7]], colored) == {"(9, 8, 7)": 3, "(1, 2, 3)": 3}


def spoil(root):
    """Make every pair but the first a bad one; return the code of each."""
    for path in ("images/n1.png", "masks/n2.png"):
        os.truncate(root / path, (root / path).stat().st_size // 2)
    (root / "masks/n3.png").write_bytes(b"")
    save(root / "masks/n4.png", np.full((40, 56), 77))
    save(root / "masks/n5.png", ids(5, (40, 55)))
    (root / "masks/n6.png").unlink()
    save(root / "masks/n7.png", picture(7))
    (root / "images/n8.png").write_text("no picture")
    save(root / "masks/n9.png", np.full((40, 56), 700), np.uint16)
    codes = {"unreadable_image": "18", "unreadable_mask": "236", "foreign_ids": "479", "size_mismatch": "5"}
    return {f"n{number}": code for code, numbers in codes.items() for number in numbers}


def test_a_pair_is_bad_exactly_where_reading_it_fails(fill, tmp_path):
    data = fill(10)
    expected = spoil(tmp_path / "train")
    records = scan(data.pairs, data.reader, cache_dir=tmp_path / "cache")
    failing = set()
    for index, name in enumerate(data.names):
        try:
            data[index]
        except UserError:
            failing.add(name)
    bad = unreadable(records)
    assert bad.keys() == failing == expected.keys()
    problems = {record.name: list(record.problems) for record in records if record.problems}
    assert problems == {name: [code] for name, code in expected.items()}
    assert all(name in reason for name, reason in bad.items())
    assert "28 x 20" not in bad["n5"] and "55 x 40" in bad["n5"]
    assert len(data.keep(set(data.names) - bad.keys())) == 1


def test_reasons_list_three_and_count_the_others():
    text = list_reasons({f"n{index}": "It is empty." for index in range(23)})
    assert text.endswith("\n- n2: It is empty.\n- and 20 more") and text.count("\n- ") == 4 and list_reasons({}) == ""


@pytest.mark.parametrize("side", ["images", "masks"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(), cv2.error("no memory")])
def test_file_that_failed_by_a_machine_error_is_read_again(fill, tmp_path, monkeypatch, side, error):
    data = fill(3)
    cache = tmp_path / "cache"
    openings = Image.open
    if isinstance(error, cv2.error):
        error.code = cv2.Error.StsNoMem
    (tmp_path / "train/masks/n2.png").write_bytes(b"")

    def fail(file, **options):
        if str(file.name).endswith(f"{side}/n1.png"):
            raise error
        return openings(file, **options)

    monkeypatch.setattr(Image, "open", fail)
    assert list(unreadable(scan(data.pairs, data.reader, cache_dir=cache))) == ["n1", "n2"]
    monkeypatch.setattr(Image, "open", openings)
    seen = count_reads(monkeypatch)
    assert list(unreadable(scan(data.pairs, data.reader, cache_dir=cache))) == ["n2"] and seen == ["n1", "n2"]


def test_scan_reads_other_files_with_equal_names_and_times(tmp_path):
    link = tmp_path / "link"
    counts = []
    for place, value in (("one", 0), ("two", 1)):
        for kind in ("images", "masks"):
            path = save(tmp_path / f"{place}/train/{kind}/n.png", np.full((40, 56), value), compress_level=0)
            os.utime(path, ns=(7, 7))
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / place)
        data = folder_dataset(link, "train", classes=CLASSES)
        records = scan(data.pairs, data.reader, cache_dir=tmp_path / "cache")
        counts.append([records[0].pixels, class_counts(data, tmp_path / "cache").tolist()])
    assert counts == [[{0: 2240}, [2240, 0, 0]], [{1: 2240}, [0, 2240, 0]]]


def count_reads(monkeypatch):
    seen = []
    measure = scan_module.measure

    def measure_and_count(pair, *rest, **options):
        seen.append(pair.name)
        return measure(pair, *rest, **options)

    monkeypatch.setattr(scan_module, "measure", measure_and_count)
    return seen


def test_a_second_scan_reads_nothing_and_a_changed_file_alone(fill, tmp_path, monkeypatch):
    data = fill()
    cache = tmp_path / "cache"
    first = scan(data.pairs, data.reader, cache_dir=cache)
    seen = count_reads(monkeypatch)
    assert scan(data.pairs, data.reader, cache_dir=cache) == first and seen == []
    assert [r.name for r in scan(data.pairs[3:], data.reader, cache_dir=cache)] == ["n3", "n4"] and seen == []
    save(tmp_path / "train/masks/n2.png", np.ones((40, 56)))
    os.utime(tmp_path / "train/images/n4.png", ns=(1, 1))
    again = scan(data.pairs, data.reader, cache_dir=cache)
    assert seen == ["n2", "n4"] and again[2].pixels == {1: 40 * 56} and again[3] == first[3]
    assert scan(data.pairs, data.reader, cache_dir=cache, images=False) == again and len(seen) == 2
    other = PairDataset(data.pairs, Labels.of(("a", "b", "c", "d"), None, 255), Masks())
    scan(other.pairs, other.reader, cache_dir=cache)
    assert len(seen) == 7


def test_masks_first_and_images_later(fill, tmp_path, monkeypatch):
    data = fill(2)
    cache = tmp_path / "cache"
    scan(data.pairs, data.reader, cache_dir=cache, images=False)
    seen = count_reads(monkeypatch)
    assert scan(data.pairs, data.reader, cache_dir=cache)[0].image_digest and seen == ["n0", "n1"]
    other = PairDataset(data.pairs, data.reader.labels, Masks(ids={}, ignore_colors=[], colors={}))  # the same rules
    scan(other.pairs, other.reader, cache_dir=cache)
    assert len(seen) == 2 and other.fingerprint() == data.fingerprint()


def test_details_are_measured_in_the_same_read_and_stored(fill, tmp_path, monkeypatch):
    data = fill(2)
    read = partial(scan, data.pairs, data.reader, cache_dir=tmp_path / "cache")
    plain = read()
    assert [record.details for record in plain] == [{}, {}]
    details = Details(lambda pixels: {"width": pixels.shape[1]}, lambda mask: {"digest": digest(mask)})
    seen = count_reads(monkeypatch)
    records = read(details=details)
    assert [record.details for record in records] == [{"width": 56, "digest": record.mask_digest} for record in plain]
    assert seen == ["n0", "n1"] and read(details=details) == read() == read(images=False) == records and len(seen) == 2


@pytest.mark.parametrize("damage", [b"", b"junk"])
def test_a_damaged_cache_costs_a_scan(fill, tmp_path, caplog, damage):
    data = fill(2)
    cache = tmp_path / "cache"
    first = scan(data.pairs, data.reader, cache_dir=cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(damage)
    assert scan(data.pairs, data.reader, cache_dir=cache) == first
    assert "scanning again" in caplog.text
    caplog.clear()
    assert scan(data.pairs, data.reader, cache_dir=cache) == first and not caplog.text


def test_masks_with_layers_are_scanned_once(tmp_path, monkeypatch, caplog):
    write_overlaps(tmp_path / "data", train=2, val=1)
    layout = FolderLayout(images="data/{split}/images", masks="data/{split}/masks")
    data = folder_dataset(tmp_path, "train", classes=OVERLAPPING, layout=layout, layers=True)
    first = scan(data.pairs, data.reader, cache_dir=tmp_path / "cache")
    seen = count_reads(monkeypatch)
    assert scan(data.pairs, data.reader, cache_dir=tmp_path / "cache") == first and not caplog.text
    assert not seen and "1: 1" in first[0].raw


def test_scan_resumes_after_an_interruption(fill, tmp_path, monkeypatch):
    data = fill()
    cache = tmp_path / "cache"
    monkeypatch.setattr(scan_module, "_CHUNK", 1)
    measure = scan_module.measure

    def stop(pair, *rest, **options):
        if pair.name == "n3":
            raise KeyboardInterrupt
        return measure(pair, *rest, **options)

    monkeypatch.setattr(scan_module, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        scan(data.pairs, data.reader, cache_dir=cache)
    monkeypatch.setattr(scan_module, "measure", measure)
    seen = count_reads(monkeypatch)
    scan(data.pairs, data.reader, cache_dir=cache)
    assert seen == ["n3", "n4"]


def test_threads_return_the_same_records(fill, tmp_path, monkeypatch):
    data = fill(10)
    spoil(tmp_path / "train")
    monkeypatch.setattr(scan_module, "_CHUNK", 3)
    assert scan(data.pairs, data.reader, workers=2) == scan(data.pairs, data.reader, workers=1)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_found_without_decoding_the_others(tmp_path, monkeypatch, suffix):
    pairs, decoded = [], []
    for index in range(4):
        image = save(tmp_path / f"n{index}.{suffix}", picture(index, (200, 300)))
        pairs.append(Pair(f"n{index}", image, save(tmp_path / f"m{index}.png", ids(index, (200, 300)))))
    os.truncate(pairs[2].image, pairs[2].image.stat().st_size // 2)
    pairs[3].image.write_bytes(pairs[3].image.read_bytes() + b"a camera's own trailer")
    monkeypatch.setattr("dinoseg.data.scan.measure.read_image", lambda path: decoded.append(path) or read_image(path))
    records = scan(pairs, MaskReader(Labels.of(CLASSES, None, 255), Masks()), images=False)
    assert list(unreadable(records)) == ["n2"] and "truncated" in unreadable(records)["n2"]
    assert decoded == [pairs[2].image] and records[3].image_size == (200, 300)


@pytest.fixture
def counted(tmp_path):
    for name, mask in {"x": [[0, 1, 1], [255, 255, 1]], "y": [[0, 0, 0], [0, 3, 3]]}.items():
        save(tmp_path / f"train/images/{name}.png", np.zeros((2, 3, 3)))
        save(tmp_path / f"train/masks/{name}.png", mask)

    return partial(folder_dataset, tmp_path, "train", classes=["a", "b", "c", "d"])


@pytest.mark.parametrize("scanned", [False, True])
def test_class_counts_are_exact_and_cached(counted, tmp_path, monkeypatch, scanned):
    data = counted()
    cache = tmp_path / "new/cache"
    if scanned:
        scan(data.pairs, data.reader, images=False, cache_dir=cache)
    else:
        counts = class_counts(data, cache)
        assert counts.dtype == np.int64 and counts.tolist() == [5, 3, 0, 2]
    monkeypatch.setattr(MaskReader, "read", lambda *_: pytest.fail("read twice"))
    assert class_counts(counted(), cache).tolist() == [5, 3, 0, 2]


def test_class_counts_leave_out_ignored_and_refuse_foreign_ids(counted, tmp_path):
    save(tmp_path / "train/masks/x.png", [[2, 2, 2], [1, 1, 2]])
    assert class_counts(counted(ignore_index=0), tmp_path / "cache").tolist() == [0, 2, 4, 2]
    save(tmp_path / "train/masks/y.png", [[9, 0, 0], [0, 0, 0]])
    assert_refused(lambda: class_counts(counted(), tmp_path / "cache"), "y.png holds the ids 9")


def test_a_cache_that_cannot_be_written_only_warns(counted, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("")
    assert class_counts(counted(), tmp_path / "file").tolist() == [5, 3, 0, 2]
    assert "Cannot store" in caplog.text
    caplog.clear()
    monkeypatch.setattr(scan_module, "write_text", full)
    assert class_counts(counted(), tmp_path / "cache").tolist() == [5, 3, 0, 2]
    assert "Cannot store" in caplog.text


def test_data_without_files_is_counted_each_time(tmp_path):
    data = Pictures([(5, 5), (6, 4)])
    counts = class_counts(data, tmp_path / "c")
    assert counts.shape == (3,) and counts.sum() == 49
    assert not (tmp_path / "c").exists()
