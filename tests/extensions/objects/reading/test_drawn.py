"""Objects of COCO's and LabelMe's files equal those that their own tools count."""

import json

import numpy as np
import pytest
from composed_data import load
from making import save
from mistakes import assert_refused
from pycocotools import mask as official
from pycocotools.coco import COCO

from dinoseg.api.compose import compose
from dinoseg.config.nodes import instantiate
from dinoseg.core.object_ids import OBJECTS, crowd_flags, object_classes, object_numbers
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.packed.pack import pack
from dinoseg.testing import check_dataset

SIZE = (40, 56)
NAMES = ["sky", "leaf", "stem"]


def read(name, root, *overrides, split="train", background=None):
    """Return a split of a data option with its objects."""
    data = load(name, root, *overrides)
    return instantiate(data.objects)(instantiate(data.reader)(split=split), background=background)


def rectangle(left, top, width, height):
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def write_coco(root, annotations, images=2, **more):
    for number in range(1, images + 1):
        save(root / f"train/{number}.png", np.zeros((*SIZE, 3)))
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in (1, 2)[:images]],
        "categories": [{"id": 10 * n, "name": name} for n, name in enumerate(NAMES, 1)],
        "annotations": annotations,
    }
    path = root / "annotations/instances_train.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | more))
    return path


def random_annotations(rng, count):
    """Return polygons of several parts, run lengths, some empty, and crowds."""
    found = []
    for number in range(count):
        mask = np.asfortranarray(rng.random(SIZE) < rng.choice([0.0, 0.1, 0.9]), dtype=np.uint8)
        lengths = official.encode(mask)
        drawn = {"size": list(SIZE), "counts": lengths["counts"].decode()}
        crowd = int(rng.random() < 0.3)
        if not crowd and rng.random() < 0.6:
            corners = rng.uniform(-5, 60, (int(rng.integers(1, 4)), int(rng.integers(3, 7)), 2))
            drawn = [part.ravel().tolist() for part in corners]
        found.append(
            {"id": 100 + number, "image_id": int(rng.integers(1, 3)), "category_id": 10 * int(rng.integers(1, 4))}
            | {"segmentation": drawn, "iscrowd": crowd, "area": 1, "bbox": [0, 0, 1, 1]}
        )
    return found


def masks_of(objects):
    """Return (class, crowd, pixels) of each object of layers, sorted."""
    found = []
    for value in np.unique(objects[objects > 0]).tolist():
        layer = [each == value for each in objects if (each == value).any()]
        assert len(layer) == 1  # an object lies in one layer
        found.append((int(object_classes(value)), int(crowd_flags(value)), layer[0].tobytes()))
    return sorted(found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_coco_objects_are_those_of_pycocotools(tmp_path, seed):
    path = write_coco(tmp_path, random_annotations(np.random.default_rng(seed), 25))
    data = read("coco_instances", tmp_path, "data.unlabelled=ignore")
    truth = COCO(path)
    ids = truth.getCatIds()
    assert list(data.classes) == NAMES and data.maps == {OBJECTS: ObjectMap(things=(0, 1, 2))}
    for name, sample in zip(data.names, data, strict=True):
        objects = sample["maps"][OBJECTS].numpy()
        expected = []
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=int(name)))
        for each in annotations:
            mask = truth.annToMask(each)
            if mask.any():
                expected.append((ids.index(each["category_id"]), each["iscrowd"], mask.astype(bool).tobytes()))
        assert masks_of(objects) == sorted(expected) and len(expected) <= len(annotations)
        assert data.pairs[data.names.index(name)].objects.count == len(annotations)
        numbers = np.unique(object_numbers(objects[objects > 0]))
        assert len(numbers) == len(expected) and 1 <= numbers.min() and numbers.max() <= len(annotations)


def test_objects_are_numbered_by_their_pixels(tmp_path):
    drawn = {1: rectangle(6, 18, 4, 4), 2: [5, 5, 45, 35, 45, 5, 5, 35], 3: rectangle(0, 20, 9, 900)}
    rows = [{"id": n, "image_id": 1, "category_id": 10 * n, "segmentation": [ring]} for n, ring in drawn.items()]
    crowd = [rows[0] | {"iscrowd": 1}, *rows[1:]]
    for order, kept, expected in (("area", rows, [2, 3, 1]), ("file", rows, [1, 2, 3]), ("area", crowd, [1, 2, 3])):
        write_coco(tmp_path, kept)
        objects = read("coco_instances", tmp_path, f"data.reader.shapes.order={order}")[0]["maps"][OBJECTS]
        values = sorted(objects[objects > 0].unique().tolist(), key=object_numbers)
        assert [object_classes(value) for value in values] == expected


def test_ignored_crowds_remain_objects(tmp_path):
    write_coco(tmp_path, random_annotations(np.random.default_rng(0), 25))
    shown = read("coco_instances", tmp_path)
    data = read("coco_instances", tmp_path, "data.reader.shapes.crowds=ignore")
    assert any((one["mask"] != two["mask"]).any() for one, two in zip(shown, data, strict=True))
    for one, two in zip(shown, data, strict=True):
        assert (one["maps"][OBJECTS] == two["maps"][OBJECTS]).all() and crowd_flags(two["maps"][OBJECTS]).any()


def test_crowds_may_be_objects(tmp_path):
    """CVAT exports brush masks as crowds: they are then equal to the same annotations without the flag."""
    rows = random_annotations(np.random.default_rng(0), 25)
    write_coco(tmp_path, [row | {"iscrowd": 0} for row in rows])
    expected = [(sample["mask"], sample["maps"][OBJECTS]) for sample in read("coco_instances", tmp_path)]
    write_coco(tmp_path, rows)
    data = read("coco_instances", tmp_path, "data.reader.shapes.crowds=object")
    for sample, (mask, objects) in zip(data, expected, strict=True):
        assert (sample["mask"] == mask).all() and (sample["maps"][OBJECTS] == objects).all()
        assert not crowd_flags(sample["maps"][OBJECTS]).any()


def test_objects_of_layers_are_refused(tmp_path):
    write_coco(tmp_path, random_annotations(np.random.default_rng(0), 5))
    words = ("data.unlabelled=null", "+data.reader.layers=true")
    assert_refused(lambda: read("coco_instances", tmp_path, *words), "task=semantic", "data=coco")


def test_semantic_reading_is_unchanged(tmp_path):
    write_coco(tmp_path, random_annotations(np.random.default_rng(3), 20))
    plain = instantiate(load("coco", tmp_path).reader)(split="train")
    data = read("coco_instances", tmp_path, background=0)
    assert plain.maps == {} and data.maps[OBJECTS].things == (1, 2, 3)
    assert all((one["mask"] == two["mask"]).all() for one, two in zip(plain, data, strict=True))
    assert "maps" not in plain[0] and plain.fingerprint() != data.fingerprint()


def test_things_are_named_or_all_but_the_background(tmp_path):
    write_coco(tmp_path, [
        {"id": n, "image_id": 1, "category_id": 10 * n, "segmentation": [rectangle(9 * n, 3, 8, 8)]} for n in (1, 2, 3)
    ])  # fmt: skip
    classes = {
        (): {1, 2, 3},
        ("data.things=[leaf]",): {2},
        ("data.things=[stem,sky]",): {1, 3},
    }
    for words, expected in classes.items():
        objects = read("coco_instances", tmp_path, *words, background=0)[0]["maps"][OBJECTS]
        assert {*object_classes(objects[objects > 0]).tolist()} == expected
        assert {*object_numbers(objects[objects > 0]).tolist()} == {*range(1, len(expected) + 1)}
    assert_refused(lambda: read("coco_instances", tmp_path, "data.things=[tree]"), "data.things=tree", "leaf")
    assert_refused(lambda: read("coco_instances", tmp_path, "data.things=[]"), "No class is a thing", "data.things=")
    (tmp_path / "classes.yaml").write_text("classes: [background, sky, leaf, stem]\nthings: [sky]\nmasks: labels\n")
    assert read("coco_instances", tmp_path).maps[OBJECTS].things == (1,)


def test_a_wrong_annotation_is_named_with_its_image(tmp_path):
    good = {"id": 7, "image_id": 1, "category_id": 10, "segmentation": [rectangle(3, 3, 8, 8)]}
    write_coco(tmp_path, [good, good])
    assert_refused(lambda: read("coco_instances", tmp_path), "1.png", "id 7", "unique")
    write_coco(tmp_path, [good, {**good, "image_id": 2}])
    assert len(read("coco_instances", tmp_path)) == 2
    for wrong, *words in (
        ({"category_id": 11}, "category_id is 11"),
        ({"segmentation": {"size": [2, 2], "counts": [4]}}, "[2, 2]", "[40, 56]"),
    ):
        write_coco(tmp_path, [good, {**good, "id": 8, **wrong}])
        data = read("coco_instances", tmp_path)
        assert data.names == ["2"] and all(word in data.lacking["1"] for word in ("annotation 8 of 1.png", *words))


def test_packed_objects_equal_those_of_the_file(tmp_path):
    write_coco(tmp_path, random_annotations(np.random.default_rng(5), 20))
    data = read("coco_instances", tmp_path)
    check_dataset(read("coco_instances", tmp_path))
    packed = pack(data, cache_dir=tmp_path / "cache", workers=1)
    assert all((packed[n]["maps"][OBJECTS] == data[n]["maps"][OBJECTS]).all() for n in range(2))
    before = data.fingerprint()
    write_coco(tmp_path, random_annotations(np.random.default_rng(6), 20))
    assert read("coco_instances", tmp_path).fingerprint() != before


@pytest.mark.parametrize("words", [("data.reader.partition.by=fraction",), ("data.folds=3", "data.fold=1")])
def test_tiles_of_an_image_stay_in_one_split(tmp_path, words):
    """So do the frames of a video: names of one group are on one side, each with its own objects."""
    names = [f"scan{number}_{tile}" for number in range(4) for tile in range(3)]
    for name in names:
        save(tmp_path / f"images/{name}.png", np.zeros((*SIZE, 3)))
    images = [
        {"id": n, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]} for n, name in enumerate(names)
    ]
    rows = [(n, k) for n in range(len(names)) for k in range(n % 5)]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "segmentation": [rectangle(9 * k, 3, 8, 8)]}
        for n, (image, k) in enumerate(rows)
    ]
    content = {"images": images, "categories": [{"id": 1, "name": "leaf"}], "annotations": annotations}
    halves = [{**content, "images": images[:6]}, {**content, "images": images[6:]}]
    for side, half in zip(("train", "val"), halves, strict=True):
        inside = {image["id"] for image in half["images"]}
        half["annotations"] = [each for each in annotations if each["image_id"] in inside]
        (tmp_path / f"{side}.json").write_text(json.dumps(half))
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    sides = []
    for split in ("train", "val"):
        data = read("coco_instances", tmp_path, "data.group='^[^_]+'", *words, split=split, background=0)
        assert all(pair.objects.count == names.index(pair.name) % 5 for pair in data.pairs)
        assert all(
            len({*sample["maps"][OBJECTS].unique().tolist()} - {0}) == names.index(sample["name"]) % 5
            for sample in data
        )
        sides.append(data.names)
    assert sorted(sides[0] + sides[1]) == names
    groups = [{name.split("_")[0] for name in side} for side in sides]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


def write_labelme(root, shapes):
    save(root / "train/a.png", np.zeros((*SIZE, 3)))
    rows = [{"label": label, "points": points, "group_id": group} for label, points, group in shapes]
    content = {"shapes": rows, "imagePath": "a.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    (root / "train/a.json").write_text(json.dumps(content))


def test_groups_of_labelme_join_shapes_of_one_class(tmp_path):
    def square(left):
        return [[left, 5], [left + 4, 5], [left + 4, 9], [left, 9]]

    shapes = [("leaf", 0, 1), ("leaf", 6, 1), ("stem", 12, 1), ("leaf", 18, None), ("leaf", 24, None), ("leaf", 30, 2)]
    write_labelme(tmp_path, [(label, square(left), group) for label, left, group in shapes])
    words = ("data.classes=[background,leaf,stem]", "data.background=background")
    data = read("labelme_instances", tmp_path, *words, background=0)
    (objects,) = data[0]["maps"][OBJECTS].numpy()
    at = [objects[7, left + 2] for _, left, _ in shapes]
    assert at[0] == at[1] and len({*at}) == 5 and objects[7, 5] == 0
    assert [int(object_classes(value)) for value in at] == [1, 1, 2, 1, 1, 1]
    assert data.pairs[0].objects.count == 5
    ((objects, _),) = [(each["maps"][OBJECTS], 0) for each in read("labelme_instances", tmp_path, *words[:1])]
    assert (objects > 0).sum() == sum(25 for _ in shapes)


def write_panoptic(root, ids, segments, **more):
    """Write one image whose segments are (id, category) or dicts."""
    save(root / "train/a.png", np.zeros((*SIZE, 3)))
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=2)
    save(root / "annotations/panoptic_train/a.png", colours)
    rows = [{"id": each[0], "category_id": each[1]} if isinstance(each, tuple) else each for each in segments]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 10 * n, "name": name, "isthing": int(n > 1)} for n, name in enumerate(NAMES, 1)],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": rows}],
    }
    (root / "annotations/panoptic_train.json").write_text(json.dumps(content | more))


def panoptic_ids():
    ids = np.zeros(SIZE, np.int64)
    ids[:10], ids[12:20, :9], ids[12:20, 20:30], ids[25:30] = 70001, 300, 5, 256**2 * 40 + 1
    return ids


SEGMENTS = [(70001, 10), (300, 20), (5, 20), {"id": 256**2 * 40 + 1, "category_id": 30, "iscrowd": 1}]


def test_panoptic_segments_are_objects_and_the_mask(tmp_path):
    ids = panoptic_ids()
    write_panoptic(tmp_path, ids, SEGMENTS)
    data = read("coco_panoptic", tmp_path)
    assert list(data.classes) == NAMES and data.maps[OBJECTS].things == (1, 2)
    sample = data[0]
    mask = np.full(SIZE, 255)
    for number, class_id in ((70001, 0), (300, 1), (5, 1), (256**2 * 40 + 1, 2)):
        mask[ids == number] = class_id
    np.testing.assert_array_equal(sample["mask"].numpy(), mask)
    objects = sample["maps"][OBJECTS].numpy()
    expected = [(class_id, crowd, (ids == n).tobytes()) for n, class_id, crowd in ((300, 1, 0), (5, 1, 0))]
    crowd = (2, 1, (ids == 256**2 * 40 + 1).tobytes())
    assert masks_of(objects) == sorted([*expected, crowd]) and objects.shape == (1, *SIZE)
    assert read("coco_panoptic", tmp_path, "data.things=[sky]").maps[OBJECTS].things == (0,)
    merged = ("data.classes=[leaf,stem]", "++data.reader.shapes.labels={sky: leaf}")
    assert read("coco_panoptic", tmp_path, *merged).maps[OBJECTS].things == (0, 1)
    check_dataset(read("coco_panoptic", tmp_path))
    flags = [{"id": 10 * n, "name": name, "isthing": n > 1} for n, name in enumerate(NAMES, 1)]
    write_panoptic(tmp_path, ids, SEGMENTS, categories=flags)
    assert read("coco_panoptic", tmp_path).maps[OBJECTS].things == (1, 2)


def test_panoptic_files_may_lie_next_to_the_annotations(tmp_path):
    """As in the layout of detectron2."""
    roots = tmp_path / "below", tmp_path / "beside"
    for root in roots:
        write_panoptic(root, panoptic_ids(), SEGMENTS)
    (roots[1] / "annotations/panoptic_train").rename(roots[1] / "panoptic_train")
    below, beside = (read("coco_panoptic", root)[0] for root in roots)
    assert (below["mask"] == beside["mask"]).all() and (below["maps"][OBJECTS] == beside["maps"][OBJECTS]).all()


def test_changed_panoptic_files_change_the_fingerprint(tmp_path):
    write_panoptic(tmp_path, panoptic_ids(), SEGMENTS)
    before = read("coco_panoptic", tmp_path).fingerprint()
    assert before == read("coco_panoptic", tmp_path).fingerprint()
    colours = np.zeros((*SIZE, 3))
    colours[..., 0] = 5
    save(tmp_path / "annotations/panoptic_train/a.png", colours)
    assert before != read("coco_panoptic", tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segments": SEGMENTS[1:]}, ("panoptic_train/a.png", "70001", "without a segment")),
        ({"segments": [*SEGMENTS, (99, 10)]}, ("panoptic_train/a.png", "99", "without pixels")),
        ({"ids": panoptic_ids()[:30]}, ("panoptic_train/a.png", "56 x 30", "56 x 40")),
        ({"segments": [*SEGMENTS, (5, 20)]}, ("annotation 5 of a.png", "segment of this image has the same id")),
        ({"segments": [*SEGMENTS, (5, 30)]}, ("annotation 5 of a.png", "segment of this image has the same id")),
        (
            {"segments": [{**SEGMENTS[3], "iscrowd": "1"}, *SEGMENTS[:3]]},
            ("annotation 2621441 of a.png", "iscrowd is '1'"),
        ),
        ({"categories": [{"id": 10, "name": "sky"}]}, ("panoptic_train.json", "categories[0]", "sky", "isthing")),
        *(
            ({"categories": [{"id": 10, "name": "sky", "isthing": flag}]}, ("categories[0].isthing is", "0, 1, true"))
            for flag in ("0", None, 2)
        ),
        ({"segments": [*SEGMENTS, (6, 11)]}, ("annotation 6 of a.png", "category_id is 11")),
        *(
            (
                {"annotations": [{"image_id": 1, "file_name": name, "segments_info": [{"id": 5, "category_id": 10}]}]},
                ("panoptic_train/a", "Cannot read"),
            )
            for name in ("a\0.png", "a\ud800.png")
        ),
        ({"segments": [*SEGMENTS, {"id": 6}]}, ("annotation 6 of a.png", "category_id is None")),
        (
            {"segments": [*SEGMENTS, (0, 10)]},
            ("panoptic_train.json", "annotations[0].segments_info[4].id is 0", "from 1"),
        ),
        ({"segments": [*SEGMENTS, ("5", 10)]}, ("panoptic_train.json", "segments_info[4].id is '5'", "whole number")),
        ({"annotations": [{}]}, ("panoptic_train.json", "annotations[0]", "segments_info")),
        (
            {"annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": []}] * 2},
            ("panoptic_train.json", "image 1 has 2 annotations", "overlap"),
        ),
        (
            {"annotations": [{"image_id": 8, "file_name": "a.png", "segments_info": [{"id": 5, "category_id": 10}]}]},
            ("panoptic_train.json", "image 8", "not in images"),
        ),
    ],
)
def test_panoptic_files_that_disagree_are_refused(tmp_path, changes, words):
    write_panoptic(tmp_path, **{"ids": panoptic_ids(), "segments": SEGMENTS} | changes)
    assert_refused(lambda: read("coco_panoptic", tmp_path)[0], *words)
    assert_refused(lambda: read("coco_panoptic", tmp_path, "data.things=[leaf]")[0], *words)


def test_things_of_a_panoptic_file_are_in_the_config(tmp_path):
    write_panoptic(tmp_path, panoptic_ids(), SEGMENTS)
    cfg = compose(["mode=train", "data=coco_panoptic", f"data.root={tmp_path}", "task=panoptic"])
    things = [name for number, name in enumerate(cfg.data.classes) if number in Builder(cfg).task.things]
    assert list(cfg.data.things) == things and {*things} < {*cfg.data.classes}
    assert read("coco_panoptic", tmp_path).maps[OBJECTS].things == tuple(sorted(Builder(cfg).task.things))
