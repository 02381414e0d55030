import errno
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from making import save, train_batches, write_video
from PIL import Image

from dinoseg.core.channels import PixelFormat
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.packed import pack as packed
from dinoseg.data.packed.pack import pack
from dinoseg.data.packed.read import downscale_sample, paying_workers
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.transforms import Affine, Augment, ColorJitter
from dinoseg.data.video.access import VideoFrame
from dinoseg.models.model import backbone_size
from dinoseg.utils.errors import UserError
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
    items = [plain[index] for index in range(len(plain))]
    forbid_reading(monkeypatch)
    again = make(data(), cache)
    assert all(torch.equal(again[index]["image"], items[index]["image"]) for index in range(len(items)))
    folder = store_of(cache)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "pixels.bin"]


def test_returned_item_can_be_modified_safely(data, cache):
    dataset = make(data(), cache)
    dataset[1]["image"].zero_()
    dataset[1]["mask"].zero_()
    assert_same(dataset, data())


def test_keep_selects_rows_of_the_same_store(data, cache, monkeypatch):
    names = ["video/b", "flat", "unknown"]
    kept = make(data(), cache).keep(names)
    assert_same(kept, data().keep(names))
    assert kept.names == ["flat", "video/b"] and [pair.name for pair in kept.pairs] == kept.names
    assert kept.fingerprint() == data().keep(names).fingerprint()
    assert_same(kept.keep(["video/b"]), data().keep(["video/b"]))
    assert len(list(cache.glob("packed_*"))) == 1


@pytest.mark.parametrize("longest", [1, 20, 60, 64, 200])
def test_reduced_sizes_are_those_of_the_model(data, cache, longest):
    dataset = make(data(), cache, longest)
    for index, name in enumerate(NAMES):
        assert tuple(dataset.mask(index).shape) == backbone_size(SIZES[name], 1.0, longest)
    assert dataset.fingerprint() != data().fingerprint()
    assert len({make(data(), cache, other).fingerprint() for other in (None, longest, 7)}) == 3


def test_reduction_averages_areas_and_takes_the_nearest_id():
    rng = np.random.default_rng(1)
    image, mask = rng.integers(0, 256, (60, 90, 3), np.uint8), rng.integers(0, 4, (60, 90), np.uint8)
    small, ids = downscale_sample(image, mask, 30, 255)
    mean = image.astype(np.float64).reshape(20, 3, 30, 3, 3).mean((1, 3))
    assert np.abs(small - mean).max() <= 0.5 + 1e-9
    assert np.array_equal(ids, mask[1::3, 1::3])
    for longest in (41, 67, 89):  # by other factors: the file's pixel whose centre is nearest
        small, ids = downscale_sample(image, mask, longest, 255)
        rows, columns = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(ids.shape, mask.shape, strict=True))
        decided = [np.abs(at % 1 - 0.5) > 0.01 for at in (rows, columns)]  # a tie may go either way
        nearest = mask[np.rint(rows).astype(int)][:, np.rint(columns).astype(int)]
        assert sum(map(np.sum, decided)) > 40
        assert np.array_equal(ids[decided[0]][:, decided[1]], nearest[decided[0]][:, decided[1]])
    same, unchanged = downscale_sample(image, mask, 90, 255)
    assert same is image and unchanged is mask


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


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files(data, cache, workers):
    augment = Augment((24, 20), scale=(0.7, 1.4), affine=Affine(15, 0.1, 5), flip=0.5, color=ColorJitter(0.2))
    options = {"batch_size": 4, "seed": 5}
    plain = list(itertools.islice(train_batches(data(), augment, **options), 6))
    ours = itertools.islice(train_batches(make(data(), cache), augment, workers=workers, **options), 6)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.names == theirs.names
        assert torch.equal(mine.image, theirs.image) and torch.equal(mine.mask, theirs.mask)


def test_verified_mask_is_read_without_its_image(data, cache, monkeypatch):
    dataset, plain, read = make(data(), cache), data(), []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **at: read.append(at["count"]) or fromfile(*args, **at))
    for _ in range(2):
        for index in range(len(plain)):
            assert np.array_equal(dataset.mask(index), plain.mask(index))
    areas = [SIZES[name][0] * SIZES[name][1] for name in NAMES]
    assert read == [4 * area for area in areas] + areas


def test_packed_dataset_pickles_small_and_is_reopened(data, cache):
    dataset = make(data(), cache)
    unread = len(pickle.dumps(dataset))
    item = dataset[3]
    assert len(pickle.dumps(dataset)) < unread + 100  # what it read does not go along
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        image = pool.apply(sum_of, (dataset, 3))
    assert image == int(item["image"].sum())


def sum_of(dataset, index):
    return int(dataset[index]["image"].sum())


def test_packing_reports_its_size_first(data, cache, caplog):
    with caplog.at_level(logging.INFO):
        make(data(), cache, 40)
    told = caplog.messages[0]
    assert told.startswith("packing 6 images and masks reduced to at most 40 pixels a side: 0.0 MiB in ")
    assert str(store_of(cache)) in told and "free" in told
    assert caplog.messages[-1].startswith("reading 6 packed images")


def test_estimated_size_equals_the_file_size(data, cache):
    for longest in (None, 40):
        expected = sum(4 * h * w for h, w in packed._sizes(data(), longest))
        size = (make(data(), cache, longest).store.folder / "pixels.bin").stat().st_size
        assert size == expected


def test_too_little_disk_space_is_refused_before_packing(data, cache, monkeypatch):
    make(data(), cache)
    room = shutil.disk_usage(cache)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(packed, "in_bytes", lambda size: f"{size} bytes")
    with pytest.raises(UserError, match=r"takes \d{5} bytes, and .*cache has 5000 bytes free\. Free some space"):
        make(data(masks=Masks(ids={2: 1})), cache)
    assert len(list(cache.glob("packed_*"))) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(data, cache, monkeypatch, error):
    read, left = packed.read_all, [3]

    def stop(*args):
        for item in read(*args):
            left[0] -= 1
            if left[0] < 0:
                raise error
            yield item

    monkeypatch.setattr(packed, "read_all", stop)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        make(data(), cache)
    assert (
        isinstance(error, KeyboardInterrupt) or "Cannot pack to" in str(caught.value) and "no room" in str(caught.value)
    )
    assert not list(cache.iterdir())
    monkeypatch.undo()
    assert_same(make(data(), cache), data())


def spoil(path, place, value=None):
    content = bytearray(path.read_bytes())
    content[place] = content[place] ^ 1 if value is None else value
    path.write_bytes(content)


def until(is_so, seconds=300):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_item_is_noticed(data, cache, place):
    make(data(), cache)
    spoil(store_of(cache) / "pixels.bin", place)
    damaged = 0 if place == 0 else len(NAMES) - 1
    dataset = make(data(), cache)
    with pytest.raises(UserError, match=rf"pixels\.bin is damaged: item {NAMES[damaged]}.*Delete the folder .*packed_"):
        dataset[damaged]
    with pytest.raises(UserError, match="is damaged"):
        dataset.mask(damaged)
    dataset[1]
    shutil.rmtree(store_of(cache))
    assert_same(make(data(), cache), data())


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "index.json").unlink(),
        lambda folder: (folder / "index.json").write_text("{}"),
        lambda folder: (folder / "index.json").write_text("[" * 10),
        lambda folder: (folder / "index.json").write_bytes((folder / "index.json").read_bytes()[:-9]),
        lambda folder: os.truncate(folder / "pixels.bin", 3000),
        lambda folder: (folder / "pixels.bin").unlink(),
        lambda folder: change_index(folder, lambda index: index["key"].update(version=0)),
        lambda folder: change_index(folder, lambda index: index["key"].update(fingerprint="0" * 64)),
        lambda folder: change_index(folder, lambda index: index["names"].reverse()),
        lambda folder: change_index(folder, lambda index: index["places"].pop()),
        lambda folder: change_index(folder, lambda index: index["places"][0].__setitem__(0, 10**9)),
    ],
)
def test_damaged_store_is_packed_again(data, cache, caplog, damage):
    make(data(), cache)
    damage(store_of(cache))
    assert_same(make(data(), cache), data())
    assert "incomplete or damaged: packing again" in caplog.text


def change_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_an_index_that_turns_an_image_is_noticed(data, cache):
    make(data(), cache)
    row = NAMES.index("odd")
    change_index(store_of(cache), lambda index: index["places"][row].__setitem__(slice(1, 3), [23, 37]))
    with pytest.raises(UserError, match="item odd does not match its checksum"):
        make(data(), cache)[row]


def test_an_index_of_other_channels_is_noticed(cache, tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (8, 6, 2)).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    save(tmp_path / "mask.png", values[..., 0] % 2)
    pixels = PixelFormat(2)
    pair = Pair("a", pixels.source(tmp_path / "a.npy"), tmp_path / "mask.png")
    data = PairDataset([pair], Labels.of(["a", "b"], None, 255), Masks())
    assert make(data, cache)[0]["image"].shape == (2, 8, 6)
    change_index(store_of(cache), lambda index: index["places"][0].__setitem__(slice(4, 6), [4, 1]))
    with pytest.raises(UserError, match="item a does not match its checksum"):
        make(data, cache)[0]


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
    read, path = PairDataset.__getitem__, tmp_path / "data/train/masks/wide.png"

    def touch(self, index):
        os.utime(path, ns=(index, index))
        return read(self, index)

    monkeypatch.setattr(PairDataset, "__getitem__", touch)
    with pytest.raises(UserError, match="were changed while they were packed"):
        make(data(), cache)
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, index: (path.unlink(True), read(self, 0))[1])
    with pytest.raises(UserError, match="were changed while they were packed"):
        make(data(), cache)
    assert not list(cache.glob("packed_*"))


@pytest.mark.heavy
def test_bad_files_are_all_named_by_any_number_of_processes(data, cache, tmp_path):
    write(tmp_path / "data", {f"n{i:02}": (6, 8) for i in range(25)})
    for i in range(23):
        path = next((tmp_path / "data/train/images").glob(f"n{i:02}.*"))
        path.write_bytes(path.read_bytes()[:60])
    save(tmp_path / "data/train/masks/one.png", [[7]])
    messages = []
    for workers in (1, 2):
        with pytest.raises(UserError) as caught:
            make(data(), cache / str(workers), 30, workers)
        messages.append(str(caught.value))
    message = messages[0]
    assert message.startswith("24 of 31 images cannot be packed:\n- n00: Cannot read ") and "on_error=skip" in message
    assert message.count("\n- ") == 20 and "\nand 4 more: n20, " in message
    assert messages[1] == message and not list(cache.glob("*/*"))
    good = data().keep([name for name in NAMES if name != "one"])
    assert_same(make(good, cache, workers=2), good)


@pytest.mark.heavy
def test_killed_packing_process_raises_an_error(data, cache):
    with pytest.raises(UserError, match=r"was killed.*fewer than workers=2 and run again"):
        make(Deadly(data()), cache, workers=2)


class Deadly:
    """A data set whose reading kills the process."""

    def __init__(self, source):
        self.names, self.pairs, self.fingerprint = source.names, source.pairs, source.fingerprint

    def __len__(self):
        return len(self.names)

    def __getitem__(self, _):
        os._exit(9)


def test_a_second_build_waits_for_the_first(data, cache, monkeypatch, caplog):
    key_folder = make(data(), cache).store.folder
    done = cache / "done"
    key_folder.rename(done)
    forbid_reading(monkeypatch)
    lock = cache / f".{key_folder.name}.lock"
    result = []
    with hold_lock(lock):
        second = threading.Thread(target=lambda: result.append(make(data(), cache)))
        second.start()
        until(lambda: "waiting for it" in caplog.text)
        time.sleep(0.05)
        assert second.is_alive() and not list(cache.glob(".*.part"))
        done.rename(key_folder)
    second.join(300)
    assert len(result) == 1 and len(result[0]) == len(NAMES)


def test_unwritable_folder_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot pack to .*file.*cache_dir=FOLDER.*[(]cache=null"):
        make(data(), tmp_path / "file")


def test_a_read_only_folder_still_serves_its_store(data, cache, monkeypatch):
    make(data(), cache)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(packed, "hold_lock", refuse)
    assert_same(make(data(), cache), data())
    with pytest.raises(UserError, match=r"Cannot pack to .*Permission denied"):
        make(data(), cache, 20)


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
    read, rows = PairDataset.__getitem__, []
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, index: rows.append(index) or read(self, index))
    assert list(packed._sizes(source, None)) == [(32, 48)] * 3 + [(48, 64)] * 3
    assert rows == [0, 3]


@pytest.mark.parametrize(("cores", "items", "expected"), [(16, 10**5, 8), (4, 10**5, 4), (4, 120, 2), (4, 30, 1)])
def test_processes_are_used_where_they_pay(monkeypatch, cores, items, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert paying_workers(items) == expected


def test_roots_with_equal_file_stats_have_own_stores(cache, tmp_path):
    masks = []
    for place, value in (("a", 0), ("b", 1)):
        for kind in ("images", "masks"):
            path = save(tmp_path / place / f"train/{kind}/x.png", np.full((4, 6), value), compress_level=0)
            os.utime(path, ns=(7, 7))
        masks.append(make(folder_dataset(tmp_path / place, "train", classes=["a", "b"]), cache).mask(0).max())
    assert masks == [0, 1]


def test_store_removed_during_use_raises_an_error(data, cache):
    for spoil in (shutil.rmtree, lambda folder: (folder / "pixels.bin").write_bytes(b"")):
        dataset = make(data(), cache)
        again = pickle.loads(pickle.dumps(dataset))  # as a loading process has it
        spoil(dataset.store.folder)
        with pytest.raises(UserError, match=r"Cannot read .*pixels\.bin .*removed or truncated during .*resume=auto"):
            again[0]
    assert_same(make(data(), cache), data())


def test_a_store_that_is_cut_while_it_is_read_ends_no_process(data, cache):
    dataset = make(data(), cache)
    last = max(range(len(dataset)), key=lambda row: dataset.store.extents[row].offset)
    first = dataset[min(range(len(dataset)), key=lambda row: dataset.store.extents[row].offset)]
    os.truncate(dataset.store.folder / "pixels.bin", first["mask"].numel() * 4)  # a mapped file would be a bus error
    with pytest.raises(UserError, match=r"Cannot read .*pixels\.bin \(it is truncated\).*resume=auto"):
        dataset[last]


def test_undecodable_names_are_packed(cache, tmp_path):
    write(tmp_path / "data", {os.fsdecode(b"caf\xe9"): (5, 7), "x": (4, 4)})
    source = folder_dataset(tmp_path / "data", "train", classes=["a", "b", "c"])
    assert_same(make(source, cache), source)
    assert_same(make(source, cache), source)  # read back from its index


def test_packed_dataset_lists_unpaired_files(data, cache, tmp_path):
    (tmp_path / "data/train/masks/odd.png").unlink()
    dataset = make(data(), cache)
    assert list(dataset.lacking) == list(dataset.keep(["flat"]).lacking) == ["odd"] and dataset.remedy
