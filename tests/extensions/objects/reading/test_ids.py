"""Objects of files of ids equal an independent count, and files that contradict each other are refused."""

from zipfile import ZipFile

import numpy as np
import pytest
from composed_data import load
from making import DATA, save
from mistakes import assert_refused
from PIL import Image

from dinoseg.config.nodes import instantiate
from dinoseg.core.object_ids import OBJECTS, crowd_flags, object_classes, object_numbers
from dinoseg.data.scan.scan import scan
from dinoseg.extensions.rendering.surgery.write import render_dataset
from dinoseg.testing import check_dataset
from dinoseg.utils.images import read_ids

SIZE = (20, 30)


def read(name, root, *overrides, background=None):
    data = load(name, root, *overrides)
    return instantiate(data.objects)(instantiate(data.reader)(split="train"), background=background)


def write(root, ids, masks=None):
    """Write an image and its file of ids, and its mask if that is another file."""
    save(root / "train/images/a.png", np.zeros((*ids.shape, 3)))
    save(root / f"train/{'masks' if masks is None else 'ids'}/a.png", ids, np.uint16)
    if masks is not None:
        save(root / "train/masks/a.png", masks)


def counted(objects):
    """Return (class, crowd, pixels) of each object of one layer, sorted."""
    (layer,) = objects.numpy()
    values = np.unique(layer[layer > 0])
    return sorted((int(object_classes(v)), int(crowd_flags(v)), int((layer == v).sum())) for v in values)


def expected_of(ids, rule):
    """Return the same, by a rule from id to (class, crowd) or None."""
    found = [(int(value), rule(int(value))) for value in np.unique(ids)]
    return sorted((*each, int((ids == value).sum())) for value, each in found if each is not None)


def test_each_id_is_an_object_of_the_one_thing(tmp_path):
    ids = np.random.default_rng(0).choice([0, 0, 1, 2, 300, 65535], SIZE)
    write(tmp_path, ids)
    (tmp_path / "classes.yaml").write_text(
        "classes:\n  background: {ids: [0]}\n  cell:\nbackground: background\nothers: cell\n"
    )
    data = read("folder_instances", tmp_path, background=0)
    plain = instantiate(load("folder", tmp_path).reader)(split="train")
    assert (data[0]["mask"] == plain[0]["mask"]).all() and (data[0]["mask"].numpy() == (ids > 0)).all()
    objects = data[0]["maps"][OBJECTS]
    assert counted(objects) == expected_of(ids, lambda value: (1, 0) if value else None)
    assert object_numbers(objects).unique().tolist() == [0, 1, 2, 3, 4]
    check_dataset(read("folder_instances", tmp_path, background=0))
    assert_refused(lambda: read("folder_instances", tmp_path), "data.instances=true", "background, cell", "data.things")
    ids[ids == 300] = 255
    write(tmp_path, ids)
    (tmp_path / "classes.yaml").unlink()
    words = ("data.classes=[background,cell]", "data.reader.masks.others=cell", "data.reader.masks.ids={255:1}")
    for given, numbers in ((words[:2], 3), (words, 4)):
        assert len(counted(read("folder_instances", tmp_path, *given, background=0)[0]["maps"][OBJECTS])) == numbers
    write(tmp_path, np.where(ids == 2, 256, ids))  # 255 beside 256 is the id of an object
    silent = read("folder_instances", tmp_path, *words[:2], background=0)
    assert_refused(lambda: silent[0], "a.png", "the id 255", "++data.reader.masks.ids={255: 255}")
    for target, numbers in ((1, 4), (255, 3)):
        mapped = (*words[:2], f"data.reader.masks.ids={{255:{target}}}")
        assert len(counted(read("folder_instances", tmp_path, *mapped, background=0)[0]["maps"][OBJECTS])) == numbers
    write(tmp_path, np.zeros(SIZE))
    assert read("folder_instances", tmp_path, *words, background=0)[0]["maps"][OBJECTS].shape == (0, *SIZE)


def test_more_ids_than_a_byte_holds_need_no_mapping(tmp_path):
    """One thing of two classes: its mask is all ids but 0; in a file of 8 bits, 255 is ignored."""
    ids = np.arange(20 * 30).reshape(SIZE) // 2  # 0 to 299
    write(tmp_path, ids)
    words = ("data.classes=[background,cell]",)
    data = read("folder_instances", tmp_path, *words, background=0)
    assert (data[0]["mask"].numpy() == (ids > 0)).all()
    expected = expected_of(ids, lambda value: (1, 0) if value else None)
    assert counted(data[0]["maps"][OBJECTS]) == expected and len(expected) == 299
    check_dataset(read("folder_instances", tmp_path, *words, background=0))
    (record,) = scan(data.pairs, data.reader)
    assert not record.problems and record.pixels == {0: 2, 1: 598}
    numbers = read("folder_instances", tmp_path, *words, "data.reader.masks.ids={255:255,7:0}", background=0)
    assert numbers.fingerprint() != data.fingerprint()
    unseen = (ids == 255).astype(int) * 255 + ((ids > 0) & (ids != 255) & (ids != 7))
    assert (numbers[0]["mask"].numpy() == unseen).all() and len(counted(numbers[0]["maps"][OBJECTS])) == 297
    reversed_ids = read("folder_instances", tmp_path, "data.classes=[cell,background]", background=1)
    assert (reversed_ids[0]["mask"].numpy() == (ids == 0)).all()
    save(tmp_path / "train/masks/a.png", np.where(ids < 255, ids % 100, 255))  # 8 bits: 255 is ignored
    narrow = read("folder_instances", tmp_path, *words, background=0)
    assert (narrow[0]["mask"].numpy() == np.where(ids < 255, ids % 100 > 0, 255)).all()
    save(tmp_path / "train/masks/a.png", np.minimum(ids, 255))
    assert_refused(lambda: narrow[0], "a.png", "the id 255", "++data.reader.masks.ids={255: 255}")
    mapped = read("folder_instances", tmp_path, *words, "data.reader.masks.ids={255:1}", background=0)
    assert len(counted(mapped[0]["maps"][OBJECTS])) == 255
    (tmp_path / "classes.yaml").write_text("classes: [background, cell]\nbackground: background\n")
    save(tmp_path / "train/masks/a.png", ids, np.uint16)
    assert (read("folder_instances", tmp_path, background=0)[0]["mask"].numpy() == (ids > 0)).all()
    three = read("folder_instances", tmp_path, "data.classes=[a,b,c]", "data.things=[c]")
    assert_refused(lambda: three[0], "a.png", "which are not classes")
    image = tmp_path / "train/masks/a.png"
    Image.fromarray(np.uint8(ids % 100)).save(image, format="JPEG")
    (record,) = scan(narrow.pairs, narrow.reader)
    assert [*record.problems] == ["mask_is_jpeg"]


def test_wide_ids_hold_their_class(tmp_path):
    ids = np.arange(20 * 30).reshape(SIZE) // 2 * 200  # class 0 to 59
    write(tmp_path, ids)
    names = ",".join(f"c{number}" for number in range(60))
    data = read("folder_instances", tmp_path, f"data.classes=[{names}]", "data.instances=1000", background=0)
    expected = expected_of(ids, lambda value: (value // 1000, 0) if value >= 1000 else None)
    assert counted(data[0]["maps"][OBJECTS]) == expected and len(expected) == 295


@pytest.mark.parametrize("divisor", [1000, 256])
def test_ids_hold_their_class(tmp_path, divisor):
    values = [0, divisor, divisor + 1, 2 * divisor + 5, 2 * divisor + 7]
    ids = np.random.default_rng(1).choice(values, SIZE)
    write(tmp_path, ids)
    words = ("data.classes=[background,cell,fibre]", f"data.instances={divisor}")
    data = read("folder_instances", tmp_path, *words, background=0)
    assert (data[0]["mask"].numpy() == ids // divisor).all()
    expected = expected_of(ids, lambda value: (value // divisor, 0) if value else None)
    assert counted(data[0]["maps"][OBJECTS]) == expected and len(expected) == 4
    one = read("folder_instances", tmp_path, *words, "data.things=[fibre]")
    assert {each[0] for each in counted(one[0]["maps"][OBJECTS])} == {2}
    assert one.fingerprint() != data.fingerprint()
    write(tmp_path, np.where(ids, ids, np.arange(SIZE[1]) % 3))  # ids 1 and 2 of class 0, and 0, no object
    first = read("folder_instances", tmp_path, *words, "data.things=[background]")[0]["maps"][OBJECTS]
    assert [each[:2] for each in counted(first)] == [(0, 0)] * 2
    write(tmp_path, ids + 3 * divisor)
    assert_refused(lambda: data[0], "a.png", "the ids 3", "not classes")
    assert_refused(
        lambda: read("folder_instances", tmp_path, *words[:1], "data.instances=1"), "instances", "2 to 65535"
    )


def test_ids_with_masks_take_their_class(tmp_path):
    ids = np.random.default_rng(2).choice([0, 4, 7, 9, 11], SIZE)
    masks = np.select([ids == 4, ids == 7, ids == 9], [1, 2, 2], 0)
    words = ("data.classes=[background,cell,fibre]", "data.objects.files=[masks,ids]")
    write(tmp_path, ids, masks)
    data = read("folder_instances", tmp_path, *words, background=0)
    rule = {4: (1, 0), 7: (2, 0), 9: (2, 0)}.get
    assert counted(data[0]["maps"][OBJECTS]) == expected_of(ids, rule)
    masks[tuple(np.argwhere(ids == 7)[0])] = 1
    write(tmp_path, ids, masks)
    assert_refused(lambda: data[0], "ids/a.png", "id 7", "cell, fibre")
    write(tmp_path, ids[:9], masks)
    assert_refused(lambda: data.pairs[0].objects.read(), "(30, 9)", "(30, 20)")
    (tmp_path / "train/ids/a.png").unlink()
    assert_refused(lambda: read("folder_instances", tmp_path, *words), "masks/a.png", "ids/a.png", "data.objects.files")
    one = (*words[:1], "data.objects.files=[masks]")
    assert_refused(lambda: read("folder_instances", tmp_path, *one), "data.objects.files", "a list of 2 texts")


def test_cityscapes_objects_and_crowds(tmp_path):
    """By Cityscapes' own rule: ids from 1000 are label id * 1000 + number, and a thing's lower id is a group."""
    ids = np.random.default_rng(3).choice([3, 7, 11, 24, 26, 24000, 24001, 26002, 29001, 33000], SIZE)
    labels = np.where(ids < 1000, ids, ids // 1000)
    for folder, kind, array, dtype in (
        ("leftImg8bit", "leftImg8bit", np.zeros((*SIZE, 3)), np.uint8),
        ("gtFine", "gtFine_labelIds", labels, np.uint8),
        ("gtFine", "gtFine_instanceIds", ids, np.uint16),
    ):
        save(tmp_path / f"{folder}/train/ulm/ulm_1_{kind}.png", array, dtype)
    data = read("cityscapes_instances", tmp_path)
    plain = instantiate(load("cityscapes", tmp_path).reader)(split="train")
    assert (data[0]["mask"] == plain[0]["mask"]).all() and data.names == plain.names == ["ulm/ulm_1"]
    train_ids = {24: 11, 26: 13, 33: 18}  # 29, caravan, is not evaluated

    def rule(value):
        label = value if value < 1000 else value // 1000
        return (train_ids[label], int(value < 1000)) if label in train_ids else None

    assert counted(data[0]["maps"][OBJECTS]) == expected_of(ids, rule)
    assert len(expected_of(ids, rule)) == 6 and data.maps[OBJECTS].things == tuple(range(11, 19))


@pytest.mark.data
def test_real_masks_as_ids_give_one_object_each():
    root = DATA / "person"
    if not root.is_dir():
        pytest.skip(f"no real data in {root}: set DINOSEG_DATA")
    data = load("person", root)
    things = load("folder_instances", root, "data.classes=[background,person]", "data.instances=true")
    dataset = instantiate(things.objects)(instantiate(data.reader)(split="val"), background=0)
    for index in range(0, len(dataset), 8):
        sample = dataset[index]
        (layer,) = sample["maps"][OBJECTS]
        assert bool(((layer > 0) == (sample["mask"] == 1)).all()) and len(layer.unique()) == 2


def test_rendered_parts_of_instruments_are_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the frame indexes of videos
    render_dataset(tmp_path, train_videos=2, test_videos=1, seconds=1, size=(32, 48), workers=1)
    for path in tmp_path.glob("*/*.zip"):
        with ZipFile(path) as archive:
            archive.extractall(path.with_suffix(""))
    data = read("sarrarp_instances", tmp_path, "data.source=video", background=0)
    assert len(data) and len(data.maps[OBJECTS].things) == 9
    for pair, sample in zip(data.pairs, data, strict=True):
        ids = read_ids(str(pair.mask).replace("segmentation", "instances"))
        assert counted(sample["maps"][OBJECTS]) == expected_of(ids, lambda value: (value // 1000, 0) if value else None)
        assert ((sample["maps"][OBJECTS][0] > 0) == (sample["mask"] > 0)).all()
