import errno
import itertools
import json
import logging
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from making import save, train_batches, write_video
from mistakes import assert_refused
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.transforms import Affine, Augment, ColorJitter
from dinoseg.extensions.packed import pack as packed
from dinoseg.extensions.packed.pack import pack
from dinoseg.extensions.packed.read import downscale_sample, paying_workers
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.models.model import backbone_size
from dinoseg.utils.locks import hold_lock

SIZES = {"one": (1, 1), "odd": (37, 23), "flat": (1, 90), "video/a": (48, 64), "video/b": (48, 64), "wide": (31, 97)}
NAMES = sorted(SIZES)
COLORS = [0, 0, 0, 200, 10, 10, 10, 200, 10] + 253 * [90, 90, 90]


def write(root, sizes=None):
    """Write noise images and masks: RGB and grey images, PNG and JPEG, grey and palette masks."""
    rng = np.random.default_rng(0)
    for number, (name, (height, width)) in enumerate((sizes or SIZES).items()):
        image = rng.integers(0, 256, (height, width, 3) if number % 3 else (height, width))
        save(root / f"train/images/{name}{'.jpg' if number % 4 == 3 else '.png'}", image)
        mask = Image.fromarray(rng.choice([0, 1, 2, 255], (height, width)).astype(np.uint8), "P" if number % 2 else "L")
        if number % 2:
            mask.putpalette(COLORS)
        path = root / f"train/masks/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data")
    return lambda **options: folder_dataset(tmp_path / "data", "train", classes=["a", "b", "c"], **options)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def make(dataset, cache, longest=None, workers=1, **options):
    return pack(dataset, cache_dir=cache, longest=longest, workers=workers, **options)


def assert_same(first, second):
    assert len(first) == len(second) and list(first.names) == list(second.names)
    for index in range(len(first)):
        a, b = first[index], second[index]
        assert a["name"] == b["name"] and a["image"].dtype == b["image"].dtype == torch.uint8
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
        assert np.array_equal(first.mask(index), second.mask(index))


def store_of(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def forbid_reading(monkeypatch):
    monkeypatch.setattr(PairDataset, "__getitem__", lambda *_: pytest.fail("a picture was read"))


def test_full_size_items_are_those_of_the_files(data, cache, monkeypatch):
    plain = data()
    first = make(plain, cache)
    assert_same(first, plain)
    assert first.classes == plain.classes and first.palette == plain.palette and first.ignore_index == 255
    assert first.pairs == plain.pairs and first.reader is plain.reader and first.fingerprint() == plain.fingerprint()
    for key in ("image", "mask"):
        first[1][key].zero_()
    assert_same(first, plain)  # an item that was returned may be modified
    items = [plain[index] for index in range(len(plain))]
    forbid_reading(monkeypatch)
    again = make(data(), cache)
    assert all(torch.equal(again[index]["image"], items[index]["image"]) for index in range(len(items)))
    assert sorted(path.name for path in store_of(cache).iterdir()) == ["index.json", "pixels.bin"]


def test_keep_selects_rows_of_the_same_store(data, cache):
    names = ["video/b", "flat", "unknown"]
    kept = make(data(), cache).keep(names)
    assert_same(kept, data().keep(names))
    assert kept.names == ["flat", "video/b"] and [pair.name for pair in kept.pairs] == kept.names
    assert kept.fingerprint() == data().keep(names).fingerprint()
    assert_same(kept.keep(["video/b"]), data().keep(["video/b"]))
    assert len(list(cache.glob("packed_*"))) == 1


@pytest.mark.parametrize("longest", [1, 20, 64, 200])
def test_reduced_sizes_are_those_of_the_model(data, cache, longest):
    dataset = make(data(), cache, longest)
    for index, name in enumerate(NAMES):
        assert tuple(dataset.mask(index).shape) == backbone_size(SIZES[name], 1.0, longest)
    assert len({data().fingerprint(), dataset.fingerprint(), make(data(), cache, 7).fingerprint()}) == 3


def test_reduction_averages_areas_and_takes_the_nearest_id():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (60, 90, 3), np.uint8)
    mask = rng.integers(0, 4, (60, 90), np.uint8)
    objects = np.stack([mask, mask[::-1]]).astype(np.int32) << 20
    small, ids, moved = downscale_sample(image, mask, 30, 255, objects)
    mean = image.astype(np.float64).reshape(20, 3, 30, 3, 3).mean((1, 3))
    assert np.abs(small - mean).max() <= 0.5 + 1e-9
    assert np.array_equal(ids, mask[1::3, 1::3])
    assert np.array_equal(moved, objects[:, 1::3, 1::3])
    for longest in (41, 67, 89):  # by other factors: the file's pixel whose centre is nearest
        small, ids, _ = downscale_sample(image, mask, longest, 255, objects)
        rows, columns = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(ids.shape, mask.shape, strict=True))
        decided = [np.abs(at % 1 - 0.5) > 0.01 for at in (rows, columns)]  # a tie may go either way
        nearest = mask[np.rint(rows).astype(int)][:, np.rint(columns).astype(int)]
        assert sum(map(np.sum, decided)) > 40
        assert np.array_equal(ids[decided[0]][:, decided[1]], nearest[decided[0]][:, decided[1]])
    unchanged = downscale_sample(image, mask, 90, 255, objects)
    assert all(each is given for each, given in zip(unchanged, (image, mask, objects), strict=True))


@pytest.mark.parametrize("longest", [24, 48])
def test_a_view_without_scaling_is_that_of_the_file(data, cache, longest):
    augment = Augment((16, 20), longest=longest, color=ColorJitter(0.2, 0.2))
    options = {"batch_size": 3, "seed": 3}
    plain = itertools.islice(train_batches(data(), augment, **options), 12)
    for ours, theirs in zip(train_batches(make(data(), cache, longest), augment, **options), plain, strict=False):
        assert ours.names == theirs.names
        assert (ours.image.int() - theirs.image.int()).abs().max() <= 3
        assert torch.equal(ours.mask, theirs.mask)


def test_a_scaled_view_shows_the_same_place(tmp_path, cache):
    rows, columns = np.mgrid[:90, :120]
    smooth = np.stack([rows * 2, columns * 2, 255 - rows - columns], -1).clip(0, 255)
    for name in "abcd":
        save(tmp_path / f"s/train/images/{name}.png", smooth)
        save(tmp_path / f"s/train/masks/{name}.png", (rows // 30))
    source = folder_dataset(tmp_path / "s", "train", classes=["a", "b", "c"])
    augment = Augment((40, 50), scale=(0.6, 1.6), longest=60, affine=Affine(20, 0.1, 5), flip=0.5)
    options = {"batch_size": 4, "seed": 1}
    plain = itertools.islice(train_batches(source, augment, **options), 4)
    for ours, theirs in zip(train_batches(make(source, cache, 60), augment, **options), plain, strict=False):
        both = (ours.mask != 255) & (theirs.mask != 255)
        assert both.float().mean() > 0.3 and ((ours.mask == 255) != (theirs.mask == 255)).float().mean() < 0.02
        apart = (ours.image.float() - theirs.image.float()).abs().amax(1)[both]
        assert apart.mean() < 2 and (ours.mask != theirs.mask)[both].float().mean() < 0.05


def test_verified_mask_is_read_without_its_image(data, cache, monkeypatch):
    dataset = make(data(), cache)
    read = []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **at: read.append(at["count"]) or fromfile(*args, **at))
    first = dataset.mask(0)
    assert np.array_equal(dataset.mask(0), first) and read == [4 * first.size, first.size]


@pytest.mark.parametrize("longest", [None, 40])
def test_packing_reports_its_size_first(data, cache, caplog, longest):
    expected = sum(4 * h * w for h, w in packed._sizes(data(), longest))
    with caplog.at_level(logging.INFO):
        store = make(data(), cache, longest).store
    assert (store.folder / "pixels.bin").stat().st_size == expected
    first, last = caplog.messages[0], caplog.messages[-1]
    reduced = "reduced to at most 40 pixels a side" if longest else "at full size"
    assert first.startswith(f"packing 6 images and masks {reduced}: 0.0 MiB in ")
    assert str(store_of(cache)) in first and "free" in first and last.startswith("reading 6 packed images")


def test_too_little_disk_space_is_refused_before_packing(data, cache, monkeypatch):
    make(data(), cache)
    room = shutil.disk_usage(cache)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(packed, "in_bytes", lambda size: f"{size} bytes")
    other = data(masks=Masks(ids={2: 1}))
    size = sum(4 * h * w for h, w in SIZES.values())
    assert_refused(lambda: make(other, cache), f"takes {size} bytes", "cache has 5000 bytes free. Free some space")
    assert len(list(cache.glob("packed_*"))) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(data, cache, monkeypatch, error):
    read = packed.read_all

    def stop(*args):
        yield from itertools.islice(read(*args), 3)
        raise error

    monkeypatch.setattr(packed, "read_all", stop)
    if isinstance(error, OSError):
        assert_refused(lambda: make(data(), cache), "Cannot pack to", "no room")
    else:
        with pytest.raises(KeyboardInterrupt):
            make(data(), cache)
    assert not list(cache.iterdir())
    monkeypatch.undo()
    assert_same(make(data(), cache), data())


@pytest.mark.parametrize(("place", "damaged"), [(0, 0), (-1, len(NAMES) - 1)])
def test_a_damaged_item_is_noticed(data, cache, place, damaged):
    make(data(), cache)
    pixels = store_of(cache) / "pixels.bin"
    content = bytearray(pixels.read_bytes())
    content[place] ^= 1
    pixels.write_bytes(content)
    dataset = make(data(), cache)
    words = (f"pixels.bin is damaged: item {NAMES[damaged]}", "Delete the folder ", "packed_")
    assert_refused(lambda: dataset[damaged], *words)
    assert_refused(lambda: dataset.mask(damaged), "is damaged")
    dataset[1]
    shutil.rmtree(store_of(cache))
    assert_same(make(data(), cache), data())


DAMAGES = {
    "no index": lambda folder: (folder / "index.json").unlink(),
    "cut pixels": lambda folder: os.truncate(folder / "pixels.bin", 3000),
    "no pixels": lambda folder: (folder / "pixels.bin").unlink(),
    "fingerprint": lambda folder: change_index(folder, lambda index: index["key"].update(fingerprint="0" * 64)),
    "order": lambda folder: change_index(folder, lambda index: index["names"].reverse()),
    "places": lambda folder: change_index(folder, lambda index: index["places"].pop()),
    "offset": lambda folder: change_index(folder, lambda index: index["places"][0].__setitem__(0, 10**9)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_packed_again(data, cache, caplog, damage):
    make(data(), cache)
    DAMAGES[damage](store_of(cache))
    assert_same(make(data(), cache), data())
    assert "incomplete or damaged: packing again" in caplog.text


def change_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_an_index_of_another_shape_is_noticed(data, cache):
    make(data(), cache)
    row = NAMES.index("odd")
    change_index(store_of(cache), lambda index: index["places"][row].__setitem__(slice(1, 3), [23, 37]))
    turned = make(data(), cache)
    assert_refused(lambda: turned[row], "item odd does not match its checksum")


def test_changed_files_and_rules_are_packed_again(data, cache, tmp_path):
    old = make(data(), cache, 40).store.folder
    path = tmp_path / "data/train/masks/odd.png"
    save(path, np.ones((37, 23)))
    os.utime(path, ns=(5, 5))
    assert (make(data(), cache).mask(NAMES.index("odd")) == 1).all()
    other = make(data(masks=Masks(ids={0: 0, 1: 2, 2: 2})), cache)
    assert (other.mask(NAMES.index("odd")) == 2).all() and other.store.folder != old
    assert len(list(cache.glob("packed_*"))) == 3


def test_files_that_change_meanwhile_are_not_packed(data, cache, tmp_path, monkeypatch):
    read = PairDataset.__getitem__
    path = tmp_path / "data/train/masks/wide.png"

    def touch(self, index):
        os.utime(path, ns=(index, index))
        return read(self, index)

    monkeypatch.setattr(PairDataset, "__getitem__", touch)
    assert_refused(lambda: make(data(), cache), "were changed while they were packed")
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, index: (path.unlink(True), read(self, 0))[1])
    assert_refused(lambda: make(data(), cache), "were changed while they were packed")
    assert not list(cache.glob("packed_*"))


@pytest.mark.heavy
def test_bad_files_are_all_named_by_any_number_of_processes(data, cache, tmp_path):
    write(tmp_path / "data", {f"n{i:02}": (6, 8) for i in range(25)})
    for i in range(23):
        path = next((tmp_path / "data/train/images").glob(f"n{i:02}.*"))
        path.write_bytes(path.read_bytes()[:60])
    save(tmp_path / "data/train/masks/one.png", [[7]])
    words = ("24 of 31 images cannot be packed:\n- n00: Cannot read ", "on_error=skip", "\n- and 21 more\n")
    messages = [assert_refused(partial(make, data(), cache / str(n), 30, n), *words) for n in (1, 2)]
    assert messages[0].count("\n- ") == 4 and messages[1] == messages[0] and not list(cache.glob("*/*"))
    good = data().keep([name for name in NAMES if name != "one"])
    assert_same(make(good, cache, workers=2), good)


def test_a_second_build_waits_for_the_first(data, cache, monkeypatch, caplog):
    key_folder = make(data(), cache).store.folder
    done = key_folder.rename(cache / "done")
    forbid_reading(monkeypatch)
    with ThreadPoolExecutor(1) as pool, hold_lock(cache / f".{key_folder.name}.lock"):
        second = pool.submit(make, data(), cache)
        while "waiting for it" not in caplog.text:
            assert not second.done()
            time.sleep(0.02)
        time.sleep(0.05)
        assert not second.done() and not list(cache.glob(".*.part"))
        done.rename(key_folder)
    assert len(second.result(300)) == len(NAMES)


def test_a_read_only_folder_still_serves_its_store(data, cache, monkeypatch):
    make(data(), cache)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(packed, "hold_lock", refuse)
    assert_same(make(data(), cache), data())
    words = ("Cannot pack to ", "Permission denied", "cache_dir=FOLDER", "(cache=null")
    assert_refused(lambda: make(data(), cache, 20), *words)


def test_video_frames_are_packed_with_one_size_per_video(cache, tmp_path, monkeypatch):
    pairs = []
    for video, size in (("u", (48, 32)), ("v", (64, 48))):
        write_video(tmp_path / f"{video}.avi", 12, size)
        for index in (9, 0, 4):
            mask = save(tmp_path / f"masks/{video}{index}.png", np.full(size[::-1], index % 3))
            pairs.append(Pair(f"{video}{index}", VideoFrame(tmp_path / f"{video}.avi", index), mask))
    source = PairDataset(pairs, Labels.of(["a", "b", "c"], None, 255), Masks())
    assert_same(make(source, cache), source)
    assert make(source, cache, 32).mask(3).shape == (24, 32)
    read = PairDataset.__getitem__
    rows = []
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, index: rows.append(index) or read(self, index))
    assert list(packed._sizes(source, None)) == [(32, 48)] * 3 + [(48, 64)] * 3
    assert rows == [0, 3]


@pytest.mark.parametrize(("cores", "items", "expected"), [(16, 10**5, 8), (4, 10**5, 4), (4, 120, 2), (4, 30, 1)])
def test_processes_are_used_where_they_pay(monkeypatch, cores, items, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert paying_workers(items) == expected


# a mapped file that is cut would be a bus error
@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda folder: os.truncate(folder / "pixels.bin", 100)])
def test_store_removed_during_use_raises_an_error(data, cache, spoil):
    dataset = make(data(), cache)
    again = pickle.loads(pickle.dumps(dataset))  # as a loading process has it
    spoil(dataset.store.folder)
    assert_refused(lambda: again[0], "Cannot read ", "pixels.bin ", "removed or truncated during ", "resume=auto")
    assert_same(make(data(), cache), data())


def test_undecodable_names_are_packed_and_unpaired_files_listed(cache, tmp_path):
    write(tmp_path / "data", {os.fsdecode(b"caf\xe9"): (5, 7), "x": (4, 4), "odd": (2, 2)})
    (tmp_path / "data/train/masks/odd.png").unlink()
    source = folder_dataset(tmp_path / "data", "train", classes=["a", "b", "c"])
    assert_same(make(source, cache), source)
    dataset = make(source, cache)
    assert_same(dataset, source)  # read back from its index
    assert list(dataset.lacking) == list(dataset.keep(["x"]).lacking) == ["odd"] and dataset.remedy
