import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from composed_data import load
from image_files import encode_image
from making import save
from mistakes import assert_refused
from PIL import Image

from dinoseg.config.nodes import instantiate
from dinoseg.data.scan.scan import scan
from dinoseg.data.splits import Partition
from dinoseg.extensions.annotations import annotated
from dinoseg.extensions.annotations.annotated import Shapes, annotated_dataset
from dinoseg.extensions.annotations.annotation_files import KINDS, AnnotationLayout, read_annotations
from dinoseg.extensions.annotations.rle import to_text
from dinoseg.extensions.packed.pack import pack
from dinoseg.testing import check_dataset

CLASSES = ("background", "leaf", "stem")
SIZE = (8, 10)
CORNERS = [1, 1, 5, 1, 5, 4, 1, 4]
OUTSIDE = ("../../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "C:\\x.png", ".", "a\0.png")
SMALL = [[2, 2, 4, 2, 4, 3, 2, 3]]


def open_annotated(kind, root, split="train", classes=CLASSES, layout=None, partition=None, **shapes):
    rules = Shapes(**{"order": "area" if kind == "coco" else "file"} | shapes)
    places = {"layout": layout or AnnotationLayout(), "partition": partition or Partition()}
    return annotated_dataset(root, split, kind=kind, classes=classes, shapes=rules, **places)


def refused(kind, root, *words, **options):
    assert_refused(lambda: open_annotated(kind, root, **options), *words)


def check_mask(expected, kind, root, **options):
    np.testing.assert_array_equal(open_annotated(kind, root, **options).mask(0), expected)


def png_text(pixels):
    """Return a PNG file as LabelMe stores it."""
    return base64.b64encode(encode_image(pixels)).decode()


def coco(path, images=("a.png",), annotations=None, categories=("leaf", "stem"), size=SIZE, whole=()):
    """Write a file of COCO; an annotation is (image's number, category's, segmentation) or a dict."""
    boxes = [(1, 1, [CORNERS])] if annotations is None else annotations
    rows = [
        {"id": number, "image_id": row[0], "category_id": row[1], "segmentation": row[2]} if type(row) is tuple else row
        for number, row in enumerate(boxes)
    ]
    content = {
        "images": [
            {"id": n, "file_name": name, "height": size[0], "width": size[1]} for n, name in enumerate(images, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, 1)],
        "annotations": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | dict(whole)))
    for name in images:
        if Path(name).name == name and Path(name).suffix and "\0" not in name:
            save(path.parent / name, np.zeros((*SIZE, 3)))
    return path.parent


def labelme(path, *shapes, image="a.png", size=SIZE, **changes):
    """Write a file of LabelMe; a shape is (label, kind, points) or (label, kind, points, mask)."""
    keys = ("label", "shape_type", "points", "mask")
    rows = [dict(zip(keys, shape, strict=False)) if type(shape) is tuple else shape for shape in shapes]
    content = {"imagePath": f"..\\{image}", "imageHeight": size[0], "imageWidth": size[1], "shapes": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"imageData": "AAAA"} | changes))
    save(path.parent / image, np.zeros((*SIZE, 3)))
    return path.parent


def mask_of_boxes(*boxes):
    """Return a mask with boxes of (id, top, bottom, left, right)."""
    ids = np.zeros(SIZE, np.uint8)
    for value, top, bottom, left, right in boxes:
        ids[top:bottom, left:right] = value
    return ids


def test_coco_polygons_masks_and_crowds_are_read(tmp_path):
    rle = {"size": list(SIZE), "counts": [0, 8, 72]}  # the first column
    whole = {**rle, "counts": to_text(np.array([0, 80]))}
    crowd = {"id": 9, "image_id": 1, "category_id": 2, "iscrowd": 1, "segmentation": whole}
    shapes = [(1, 2, SMALL), (1, 1, [CORNERS]), (1, 1, rle), crowd]
    coco(tmp_path / "train/_annotations.coco.json", annotations=shapes, images=("a.png", "b.png"))
    data = open_annotated("coco", tmp_path)
    assert data.classes == ("background", "leaf", "stem") and data.names == ["a", "b"]
    # the small one is seen on the large one, and the crowd of the whole picture below all
    leaves = mask_of_boxes((1, 1, 4, 1, 5), (1, 0, 8, 0, 1), (0, 2, 3, 2, 4))
    np.testing.assert_array_equal(data.mask(0), np.where(leaves, 1, 2))
    assert not data.mask(1).any()
    check_dataset(data)


def test_coco_export_of_cvat_is_read(tmp_path):
    names = ("walk/frame_000000.png", "walk/frame_000001.png")
    brush = {"segmentation": {"counts": [0, 8, 72], "size": list(SIZE)}, "bbox": [0.0, 0.0, 0.0, 7.0], "iscrowd": 1}
    rows = [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [CORNERS], "area": 12.0, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 2, "area": 8.0, **brush},
    ]
    rows = [row | {"attributes": {"occluded": False}} for row in rows]
    whole = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}
    coco(tmp_path / "annotations/instances_default.json", images=names, annotations=rows, whole=whole)
    for name in names:
        save(tmp_path / "images/default" / name, np.zeros((*SIZE, 3)))
    (tmp_path / "all.txt").write_text("\n".join(names))
    data = open_annotated("coco", tmp_path, partition=Partition("lists", {"train": "all.txt"}))
    assert data.names == ["walk/frame_000000", "walk/frame_000001"]
    np.testing.assert_array_equal(data.mask(0), mask_of_boxes((1, 1, 4, 1, 5)))
    np.testing.assert_array_equal(data.mask(1), mask_of_boxes((2, 0, 8, 0, 1)))


def test_missing_files_and_archives_are_refused(tmp_path):
    refused("coco", tmp_path, "No file of COCO for split train in ", ": looked for annotations/instances_tr")
    (tmp_path / "export.zip").write_bytes(b"PK")
    refused("coco", tmp_path, "export.zip exists, but archives are not read: unpack it")
    refused("coco", tmp_path / "export.zip", "Archives are not read: unpack it and give the folder")


def test_small_shapes_lie_on_large_ones_unless_ordered_by_file(tmp_path):
    root = coco(tmp_path / "train.json", annotations=[(1, 2, SMALL), (1, 1, [CORNERS])])
    by_area = open_annotated("coco", root)
    by_file = open_annotated("coco", root, order="file")
    np.testing.assert_array_equal(by_area.mask(0), mask_of_boxes((1, 1, 4, 1, 5), (2, 2, 3, 2, 4)))
    np.testing.assert_array_equal(by_file.mask(0), mask_of_boxes((1, 1, 4, 1, 5)))
    assert by_area.fingerprint() != by_file.fingerprint()
    coco(tmp_path / "train.json", annotations=[(1, 2, [CORNERS]), (1, 1, [CORNERS])])
    check_mask(mask_of_boxes((1, 1, 4, 1, 5)), "coco", root)  # of equal ones, the later one is on top
    one = {"size": list(SIZE), "counts": [8 + 2, 1, 69]}  # the pixel of column 1 and row 2
    coco(tmp_path / "train.json", annotations=[(1, 2, one), (1, 1, [CORNERS])])
    check_mask(mask_of_boxes((1, 1, 4, 1, 5), (2, 2, 3, 1, 2)), "coco", root)


TALL = ([0, 0, 2, 0, 2, 900, 0, 900], [0, 0, 5, 0, 5, 8, 0, 8])  # the first lies mostly outside of the image
CROSSING = ([1, 3, 3, 3, 3, 5, 1, 5], [1, 1, 9, 7, 9, 1, 1, 7])  # signed areas of the second add up to 0


@pytest.mark.parametrize(
    ("kind", "rings", "pixel"),
    [
        ("coco", (CROSSING[:1], CROSSING[1:]), (4, 2)),
        ("coco", (TALL[:1], TALL[1:]), (4, 1)),
        ("coco", ([CORNERS, CORNERS], [[1, 1, 6, 1, 6, 5, 1, 5]]), (2, 2)),
        ("labelme", (CROSSING[:1], CROSSING[1:]), (4, 2)),
        ("labelme", (TALL[:1], TALL[1:]), (4, 1)),
    ],
)
def test_order_by_area_counts_annotated_pixels(tmp_path, kind, rings, pixel):
    small, large = rings
    if kind == "coco":
        root = coco(tmp_path / "train.json", annotations=[(1, 2, small), (1, 1, large)])
    else:
        points = [[*zip(ring[::2], ring[1::2], strict=True)] for (ring,) in rings]
        shapes = [("stem", "polygon", points[0]), ("leaf", "polygon", points[1])]
        root = labelme(tmp_path / "train/a.json", *shapes).parent
    mask = open_annotated(kind, root, order="area").mask(0)
    assert mask[pixel] == 2 and (mask == 1).any()
    assert open_annotated(kind, root, order="file").mask(0)[pixel] == 1


def test_labelme_draws_as_it_does_itself(tmp_path):
    labelme(
        tmp_path / "train/a.json",
        ("leaf", "polygon", [[1, 1], [5, 1], [5, 4], [1, 4]]),
        ("stem", "rectangle", [[6, 2], [4, 1]]),
        ("__ignore__", "rectangle", [[0, 7], [0, 7]]),
        ("stem", "mask", [[7, 5], [8, 6]], png_text(np.array([[1, 0], [1, 1]], bool))),
    )
    expected = mask_of_boxes((1, 1, 5, 1, 6), (2, 1, 3, 4, 7), (2, 5, 7, 7, 9), (0, 5, 6, 8, 9), (255, 7, 8, 0, 1))
    check_mask(expected, "labelme", tmp_path, labels={"__ignore__": "ignore"})


def test_first_and_latest_versions_of_labelme(tmp_path):
    first = {"label": "leaf", "line_color": None, "points": [[1, 1], [4, 1], [4, 3], [1, 3]]}
    root = labelme(tmp_path / "train/a.json", first, imageHeight=None, imageWidth=None).parent
    check_mask(mask_of_boxes((1, 1, 4, 1, 5)), "labelme", root)
    strip = ("leaf", "linestrip", [[1, 30], [30, 1], [59, 30]])
    drawn = []
    for version in ("6.3.1", "7.0.0", "odd"):
        labelme(tmp_path / "train/a.json", strip, size=(60, 60), version=version)
        drawn.append(open_annotated("labelme", root).mask(0))
    assert (drawn[1] != drawn[0]).any() and (drawn[1] >= drawn[0]).all()  # corners are round from version 7 on
    np.testing.assert_array_equal(drawn[2], drawn[0])


@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ([[-1, 6], [1, 8]], (6, 8, 0, 2)), ([[1, 1], [2, 2]], (1, 3, 1, 3)), ([[0.6, 0.6], [2.4, 2.4]], (1, 4, 1, 4)),
    ],
)  # fmt: skip
def test_labelme_masks_are_clipped_and_aligned_to_pixels(tmp_path, corners, box):
    text = png_text(np.ones((3, 3), np.uint8))  # 0 and 1 in bytes, as the latest versions write
    root = labelme(tmp_path / "train/a.json", ("leaf", "mask", corners, text)).parent
    check_mask(mask_of_boxes((1, *box)), "labelme", root)


def test_labels_are_merged_ignored_and_given_to_the_rest(tmp_path):
    shapes = [(1, 1, [CORNERS]), (1, 2, [[6, 1, 9, 1, 9, 2, 6, 2]]), (1, 3, [[6, 3, 9, 3, 9, 4, 6, 4]])]
    root = coco(tmp_path / "train.json", annotations=shapes, categories=("leaf", "old leaf", "odd"))
    words = "labels that are not classes: old leaf (1), odd (1). data.classes has ground"
    refused("coco", root, words, classes=["ground", "leaf"], unlabelled="ground")
    given = {"classes": ["ground", "leaf"], "unlabelled": "ignore", "others": "ignore"}
    plants = mask_of_boxes((1, 1, 4, 1, 5), (1, 1, 2, 6, 9))
    check_mask(np.where(plants, 1, 255), "coco", root, **given, labels={"old leaf": "leaf"})
    (root / "classes.yaml").write_text(
        "classes: {earth: , plant: {labels: [leaf, old leaf]}}\nignore: {labels: [odd]}\nmasks: labels"
    )
    cfg = load("coco", root, "data.unlabelled=earth")
    data = instantiate(cfg.reader)(split="train")
    assert data.classes == ("earth", "plant") and cfg.num_classes == 2
    np.testing.assert_array_equal(data.mask(0), plants + mask_of_boxes((255, 3, 4, 6, 9)))
    words = "is not a class: data.classes has earth, plant"
    assert_refused(lambda: instantiate(load("coco", root).reader)(split="train"), f"data.unlabelled=background {words}")
    no_class = load("coco", root, "data.unlabelled=null")
    assert_refused(lambda: instantiate(no_class.reader)(split="train"), f"data.unlabelled=null {words}")
    (root / "classes.yaml").write_text("classes: [background, leaf]")
    words = "data=coco rasterises masks from labelled shapes: write `masks: labels`"
    assert_refused(lambda: load("coco", root).classes, words)


def test_classes_of_a_checkpoint_and_the_background(tmp_path):
    root = coco(tmp_path / "train.json")
    assert load("coco", root).background == "background" and load("coco", root).num_classes == 3
    assert load("coco", root, "data.unlabelled=ignore").background is None
    assert load("coco", root, "data.unlabelled=ignore").classes == ["leaf", "stem"]
    assert load("coco", root, "data.classes=[background,leaf]").background == "background"
    assert load("coco", root, "data.classes=[soil,leaf]").background is None


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_one_annotation_file_can_be_partitioned(tmp_path, kind):
    names = [f"{number}.png" for number in range(5)]
    if kind == "coco":
        coco(tmp_path / "annotations.json", images=names)
    for name in names if kind == "labelme" else ():
        labelme(tmp_path / name.replace("png", "json"), ("leaf", "rectangle", [[1, 1], [2, 2]]), image=name)
    refused(kind, tmp_path, "divide it by data.reader.partition.by=fraction")
    parts = [open_annotated(kind, tmp_path, split, partition=Partition("fraction")) for split in ("train", "val")]
    assert all(map(len, parts)) and sorted(name for part in parts for name in part.names) == [*"01234"]
    (tmp_path / "chosen.txt").write_text("3.png\n1")
    lists = Partition("lists", {"train": "chosen.txt"})
    assert open_annotated(kind, tmp_path, partition=lists).names == ["1", "3"]
    (tmp_path / "chosen.txt").write_text("nobody")
    refused(kind, tmp_path, "has 1 name without annotation: nobody", partition=lists)


def test_annotated_dataset_can_be_scanned_packed_and_checked(tmp_path):
    root = coco(tmp_path / "train.json", images=("a.png", "b.png"), annotations=[(1, 1, [CORNERS]), (2, 2, [CORNERS])])
    data = open_annotated("coco", root)
    records = scan(data.pairs, data.reader, cache_dir=tmp_path / "cache")
    assert [record.problems for record in records] == [{}, {}] and records[1].pixels == {0: 68, 2: 12}
    other = open_annotated("coco", root, labels={"stem": "leaf"})
    assert scan(other.pairs, other.reader, cache_dir=tmp_path / "cache")[1].pixels == {0: 68, 1: 12}
    packed = pack(data, cache_dir=tmp_path / "cache", workers=1)
    np.testing.assert_array_equal(packed.mask(1), data.mask(1))
    coco(tmp_path / "train.json", size=(9, 10), images=("a.png", "b.png"))
    assert_refused(lambda: open_annotated("coco", root)[0], "a.png is 10 x 8", "train.json, image a.png is 10 x 9")


def test_names_that_no_disk_can_have_and_names_with_dots(tmp_path):
    root = coco(tmp_path / "train.json", images=("a.v2.png", "b.png", "a.png"))
    content = json.loads((root / "train.json").read_text())
    content["images"] = content["images"][:2]
    content["images"][0]["file_name"] = "a.v2"
    (root / "train.json").write_text(json.dumps(content))
    assert open_annotated("coco", root).pairs[0].image == root / "a.v2.png"
    content["images"][0]["file_name"] = "a" * 5000
    (root / "train.json").write_text(json.dumps(content))
    assert open_annotated("coco", root).names == ["b"]


def test_replaced_files_are_read_again_and_huge_ones_refused(tmp_path, monkeypatch):
    path = tmp_path / "annotations.json"
    for names in (("leaf", "stem"), ("leaf", "root")):
        coco(path, categories=names)
        os.utime(path, ns=(1, 1))
        assert list(read_annotations(KINDS["coco"], path).labels) == [*names]
    monkeypatch.setattr("dinoseg.extensions.annotations.annotation_files.LARGEST_FILE", 100)
    refused("coco", coco(tmp_path / "train.json"), "bytes; the limit is 100: divide it into several")


@pytest.mark.parametrize("flag", [1, True])
def test_crowds_may_be_ignored(tmp_path, flag):
    crowd = {"image_id": 1, "category_id": 2, "iscrowd": flag, "segmentation": {"size": list(SIZE), "counts": [0, 80]}}
    root = coco(tmp_path / "train.json", annotations=[(1, 1, [CORNERS]), crowd])
    box = mask_of_boxes((1, 1, 4, 1, 5))
    check_mask(np.where(box, 1, 255), "coco", root, crowds="ignore")
    check_mask(np.where(box, 1, 2), "coco", root, order="file")  # below
    coco(tmp_path / "train.json", annotations=[crowd | {"segmentation": SMALL}, (1, 1, [CORNERS])])
    check_mask(box, "coco", root)  # however small
    coco(tmp_path / "train.json", annotations=[crowd | {"segmentation": [CORNERS]}])
    check_mask(255 * box, "coco", root, crowds="ignore")


def test_supercategories_may_be_the_classes(tmp_path):
    categories = [
        {"id": 7, "name": "oak", "supercategory": "tree"}, {"id": 3, "name": "car", "supercategory": "vehicle"},
        {"id": 90, "name": "elm", "supercategory": "tree"}, {"id": 91, "name": "sky", "supercategory": ""},
    ]  # fmt: skip
    shapes = [(1, 90, [CORNERS]), (1, 7, [[6, 1, 9, 1, 9, 2, 6, 2]]), (1, 91, [[6, 3, 9, 3, 9, 4, 6, 4]])]
    root = coco(tmp_path / "train.json", annotations=shapes, whole={"categories": categories})
    assert load("coco", root).classes == ["background", "car", "oak", "elm", "sky"]
    cfg = load("coco", root, "data.reader.shapes.grouped=true")
    assert cfg.classes == ["background", "vehicle", "tree", "sky"]
    expected = mask_of_boxes((2, 1, 4, 1, 5), (2, 1, 2, 6, 9), (3, 3, 4, 6, 9))
    np.testing.assert_array_equal(instantiate(cfg.reader)(split="train").mask(0), expected)
    coco(tmp_path / "train.json")
    refused("coco", root, "no groups (supercategory)", "Set data.reader.shapes.grouped=false", grouped=True)


def test_unused_category_that_groups_others_is_no_class(tmp_path):
    project = {"id": 0, "name": "leaf", "supercategory": "none"}  # as Roboflow writes the name of a project
    classes = [{"id": 1, "name": "leaf", "supercategory": "leaf"}, {"id": 2, "name": "stem", "supercategory": "leaf"}]
    person = {"id": 3, "name": "person", "supercategory": "person"}  # as in COCO
    root = coco(tmp_path / "train.json", whole={"categories": [project, *classes, person]})
    assert load("coco", root).classes == ["background", "leaf", "stem", "person"]
    np.testing.assert_array_equal(open_annotated("coco", root).mask(0), mask_of_boxes((1, 1, 4, 1, 5)))
    assert load("coco", root, "data.reader.shapes.grouped=true").classes == ["background", "leaf", "person"]
    tree = {"id": 0, "name": "tree", "supercategory": "plant"}  # a class that groups others, if it has shapes
    leaf = {"id": 1, "name": "leaf", "supercategory": "tree"}
    root = coco(tmp_path / "2/train.json", annotations=[(1, 0, [CORNERS])], whole={"categories": [tree, leaf]})
    assert load("coco", root).classes == ["background", "tree", "leaf"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_json_in_other_encodings(tmp_path, encoding):
    root = coco(tmp_path / "train.json")
    (root / "train.json").write_text((root / "train.json").read_text(), encoding=encoding)
    assert open_annotated("coco", root).mask(0).sum() == 12


def test_images_without_or_with_too_many_shapes(tmp_path, caplog, monkeypatch):
    root = coco(tmp_path / "train.json", images=("a.png", "b.png"))
    assert len(open_annotated("coco", root)) == 2
    assert "1 of 2 images have no shape and are read as background" in caplog.text
    assert open_annotated("coco", root, without_shapes="skip").names == ["a"]
    coco(tmp_path / "train.json", images=("a.png", "b.png"), annotations=[(1, 1, [CORNERS]), (2, 1, [[1, 2, 3]])])
    # what is wrong is told, and not left out unsaid
    assert "b" in open_annotated("coco", root, without_shapes="skip").lacking
    coco(tmp_path / "train.json", images=("a.png", "b.png"), annotations=[])
    refused("coco", root, "no image with a shape. Annotate some, or set ", without_shapes="skip")
    monkeypatch.setattr(annotated, "MAX_SHAPES", 2)
    for of_b in ([(2, 1, [CORNERS])] * 3, [(2, 1, [CORNERS] * 3)]):  # the polygons of one object count, too
        boxes = [(1, 1, [CORNERS])] * 2 + of_b
        coco(tmp_path / "train.json", images=("a.png", "b.png"), annotations=boxes)
        data = open_annotated("coco", root)
        assert data.names == ["a"] and "b.png has 3 shapes, over 2" in data.lacking["b"]


def test_missing_images_are_reported_and_other_folders_read(tmp_path):
    root = coco(tmp_path / "train.json", images=("a.png", "b.png"))
    (root / "b.png").unlink()
    data = open_annotated("coco", root)
    assert data.names == ["a"] and "names the image b.png, which is not in" in data.lacking["b"]
    save(root / "pictures/b.png", np.zeros((*SIZE, 3)))
    coco(root / "train.json", images=("b.png",))
    assert open_annotated("coco", root, layout=AnnotationLayout(images="pictures")).names == ["b"]
    refused("coco", root, "no folder ", "nowhere", layout=AnnotationLayout(images="nowhere"))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"whole": {"images": "x"}}, "must be a list"),
        ({"categories": ()}, "category_id is 1, which is not in categories"),
        ({"whole": {"annotations": 3}}, "no list named annotations"),
        ({"annotations": [3]}, "annotations[0] is not an object"),
        ({"annotations": [{"image_id": 1, "segments_info": []}]}, "panoptic format, whose masks are PNG"),
        ({"annotations": [(7, 1, [CORNERS])]}, "belongs to image 7, which is not in images"),
        ({"annotations": [("1", 1, [CORNERS])]}, "ids must be whole numbers"),
        ({"annotations": [(2**63, 1, [CORNERS])]}, "ids must be whole numbers of 64 bits"),
        *(
            (
                {
                    "annotations": [
                        {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [CORNERS], "iscrowd": flag}
                    ]
                },
                "train.json: annotation 7 of a.png: its iscrowd is " + shown,
            )
            for flag, shown in (("1", "'1'; it must be 0, 1, true or false"), (None, "None"), (2, "2"), (1.0, "1.0"))
        ),
        ({"annotations": [(1, 1, [])]}, "no segmentation, only a box"),
        ({"annotations": [(1, 1, [[1, 2, 3, 4]])]}, "2 points and needs at least 3"),
        ({"annotations": [(1, 1, [[1, 2, 3, 4, 5, "6"]])]}, "not a list of numbers"),
        ({"annotations": [(1, 1, [[1, 2, 3, 4, 10**400, 6]])]}, "larger than any image"),
        ({"annotations": [(1, 1, {"size": [9, 9], "counts": [81]})]}, "size [9, 9], its image [8, 10]"),
        ({"annotations": [(1, 1, {"size": [8, 10], "counts": [81]})]}, "whole numbers from 0 to 80"),
        ({"size": (10**5, 10**5)}, "not an image size:"),
        ({"size": (1.5, 3)}, "not an image size:"),
        ({"categories": ("a", "a")}, "name of 2 categories"),
        ({"images": ["a.png", "a.png"]}, "names 1 image more than once"),
        ({"images": ["a.png", "a.jpg"]}, "names 1 image more than once"),
        ({"images": [""]}, "must be a name"),
        *(({"images": [name]}, "outside of the image folder") for name in OUTSIDE),
    ],
)
def test_invalid_coco_files_are_refused(tmp_path, changes, wrong):
    refused("coco", coco(tmp_path / "train.json", **changes), wrong)


@pytest.mark.parametrize("text", [b"", b"[" * 10**5, b'{"\xe4": 3}', b'{"images": NaN}', b"\xff\xfe\x00", b"[]"])
def test_invalid_json_is_refused(tmp_path, text):
    (tmp_path / "train.json").write_bytes(text)
    refused("coco", tmp_path, "train.json is not a readable COCO file: ", "Export it again")


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        (("leaf", "polygon", [[1, 1], [2, 2]]), "shapes[0] ('leaf'): it is a polygon of 2 points; a polygon needs 3"),
        (("leaf", "circle", [[1, 1], [2, 2], [3, 3]]), "a circle of 3 points"),
        (("leaf", "point", [[1, 1], [2, 2]]), "a point of 2 points"),
        (("leaf", "spiral", [[1, 1]]), "shape_type is 'spiral'"), (("", "point", [[1, 1]]), "must be a name"),
        ((3, "point", [[1, 1]]), "must be a name"), (("leaf", "point", [[1]]), "not a list of pairs"),
        (("leaf", "circle", [[1, 1], [1e30, 1]]), "away"), (("leaf", "mask", [[1, 1], [2, 2]]), "an image in base64"),
        (("a", "mask", [[1, 1], [2, 2]], "AAAA"), "PNG of 2 x 2 pixels"),
        (("a", "mask", [[1, 1], [1e7, 2]], "AAAA"), "outside of any image"),
        (("a", "mask", [[1, 1], [0, 1]], "AAAA"), "PNG of 0 x 1 pixels"),
        (("leaf", "circle", [[0, 0], [1e6, 1e6]]), "a radius above 262144 pixels"),
    ],
)  # fmt: skip
def test_invalid_labelme_shapes_are_refused(tmp_path, shape, wrong):
    root = labelme(tmp_path / "train/a.json", shape).parent
    refused("labelme", root, wrong)
    labelme(tmp_path / "train/b.json", ("leaf", "point", [[1, 1]]), image="b.png")
    assert open_annotated("labelme", root).names == ["b"]


def test_old_and_foreign_files_in_a_labelme_folder_are_skipped(tmp_path):
    root = labelme(tmp_path / "train/a.json", imageHeight=None).parent  # the width alone
    labelme(tmp_path / "train/b.json", ("leaf", "point", [[1, 1]]), image="b.png")
    (root / "train/c.json").write_text("{}")
    data = open_annotated("labelme", root)
    assert data.names == ["b"] and "not an image size:" in data.lacking["a"]
    assert "an object with shapes" in str(data.lacking)


@pytest.mark.parametrize("corners", [[[0, 0], [9, 8]], [[0, 0], [10, 7]], [[0.5, 0], [2, 2]], [[0, 0], [1, 1]]])
def test_labelme_masks_larger_than_the_image_are_refused(tmp_path, monkeypatch, corners):
    root = labelme(tmp_path / "train/a.json", ("leaf", "mask", corners, png_text(np.ones((9, 11), bool)))).parent
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the pixels were decoded"))
    refused("labelme", root, "11 x 9 pixels, but its image only 10 x 8")


def test_labelme_masks_need_the_size_of_the_image(tmp_path):
    mask = ("leaf", "mask", [[0, 0], [1, 1]], png_text(np.ones((2, 2), bool)))
    root = labelme(tmp_path / "train/a.json", mask, imageHeight=None, imageWidth=None).parent
    refused("labelme", root, "imageHeight and imageWidth")
    labelme(tmp_path / "train/a.json", mask, ("leaf", "circle", [[0, 0], [1e5, 1e5]]))
    assert open_annotated("labelme", root).names == ["a"]


def test_lone_surrogates_in_names_are_one_error(tmp_path):
    bad = "\udc80"
    polygon = ("leaf", "polygon", [[1, 1], [5, 1], [5, 4]])
    coco(tmp_path / "label/train.json", categories=(bad, "stem"))
    coco(tmp_path / "image/train.json", images=(f"{bad}.png",))
    labelme(tmp_path / "shape/train/a.json", polygon, imagePath=f"{bad}.png")
    labelme(tmp_path / "name/train/a.json", (bad, *polygon[1:]))
    for kind, folder in (("coco", "label"), ("coco", "image"), ("labelme", "shape"), ("labelme", "name")):
        refused(kind, tmp_path / folder, "valid Unicode")
